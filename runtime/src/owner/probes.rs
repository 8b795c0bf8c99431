//! Probes of an owner: which processes are its.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ebpf_loader::{Level, ProbeError, Probes};

use crate::{beacon, sys};

/// How often what was counted of processes that have ended is taken out of the kernel: there is room
/// for so many.
const SWEEP: Duration = Duration::from_secs(10);

/// The probes of an owner, if it has any.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch(Arc<Watched>);

#[derive(Debug, Default)]
struct Watched {
    probes: Mutex<Option<Probes>>,
    /// Why what was counted of processes that have ended could not be taken out, the first time.
    unread: OnceLock<String>,
    /// Processes that were heard of while the probes were being read.
    heard: Mutex<Vec<u32>>,
}

impl Watch {
    /// Loads them.
    pub(super) fn load(&self, level: Level) -> Result<(), ProbeError> {
        *self.lock() = Some(Probes::load(level)?);
        let watch = Arc::downgrade(&self.0);
        // It ends with the owner. Without a thread nobody sweeps but who reads, and the losses tell.
        let sweeper = std::thread::Builder::new().name("sweeper".into());
        drop(sweeper.spawn(move || {
            while let Some(watch) = {
                std::thread::sleep(SWEEP);
                watch.upgrade()
            } {
                let read = Self(watch.clone()).lock().as_mut().map(Probes::read);
                if let Some(Err(error)) = read {
                    // What is told already stays.
                    watch.unread.get_or_init(|| sys::chain(&error));
                }
            }
        }));
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Probes>> {
        let mut probes = self.0.probes.lock().unwrap_or_else(PoisonError::into_inner);
        self.catch_up(&mut probes);
        probes
    }

    /// Why room in the kernel is not given back, if it is not.
    pub(super) fn unread(&self) -> Option<String> {
        self.0.unread.get().cloned()
    }

    fn catch_up(&self, probes: &mut Option<Probes>) {
        let heard = std::mem::take(&mut *self.heard());
        for pid in heard {
            if let Some(probes) = probes
                && probes.descends(pid)
            {
                insert(probes, pid);
            }
        }
    }

    fn heard(&self) -> MutexGuard<'_, Vec<u32>> {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures a root, and what it forks from now on.
    pub(super) fn track(&self, pid: u32) {
        if let Some(probes) = &mut *self.lock() {
            insert(probes, pid);
        }
    }

    /// The same of a process that an instance calls a relative of its own: by descent it is measured
    /// already, unless it has executed this program anew. Does not wait for a reader, as the
    /// listener calls it: whoever takes the probes next sees to it.
    pub(super) fn track_relative(&self, pid: u32) {
        self.heard().push(pid);
        if let Ok(mut probes) = self.0.probes.try_lock() {
            self.catch_up(&mut probes);
        }
    }
}

fn insert(probes: &mut Probes, pid: u32) {
    if probes.knows(pid) {
        return;
    }
    if let Some(beacon) = beacon_of(pid) {
        // Without room it is not measured, which the losses tell.
        probes.track(pid, beacon).unwrap_or(());
        // It may have ended before, and nobody would take it out.
        if beacon_of(pid).is_none() {
            probes.forget(pid);
        }
    }
}

/// Where another process of this program has its beacon: as far from where the program is mapped as
/// in this process.
fn beacon_of(pid: u32) -> Option<u64> {
    let own = base(Path::new("/proc/self"))?;
    let other = base(Path::new(&format!("/proc/{pid}")))?;
    Some(beacon::address().wrapping_sub(own).wrapping_add(other))
}

/// Where a process has its program mapped.
fn base(process: &Path) -> Option<u64> {
    let program = fs::read_link(process.join("exe")).ok()?;
    let maps = fs::read_to_string(process.join("maps")).ok()?;
    let line = maps.lines().find(|line| line.ends_with(&*program.to_string_lossy()))?;
    u64::from_str_radix(line.split_once('-')?.0, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beacon_of_this_process_is_found_from_outside() {
        assert_eq!(beacon_of(std::process::id()), Some(beacon::address()));
    }
}
