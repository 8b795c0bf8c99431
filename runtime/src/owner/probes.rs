//! Probes of an owner: which processes are its.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ebpf_loader::{Level, ProbeError, Probes};

use crate::beacon;

/// How often what was counted of processes that have ended is taken out of the kernel: there is room
/// for so many.
const SWEEP: Duration = Duration::from_secs(10);

/// The probes of an owner, if it has any.
#[derive(Debug, Default)]
pub(super) struct Watch(Arc<Mutex<Option<Probes>>>);

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
                // Whoever has it reads, too.
                if let Ok(mut probes) = watch.try_lock() {
                    drop(probes.as_mut().map(Probes::read));
                }
            }
        }));
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Probes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures a process of this program, and what it forks from now on.
    pub(super) fn track(&self, pid: u32) {
        if let Some(probes) = &mut *self.lock()
            && !probes.knows(pid)
        {
            // Without room it is not measured, which the losses tell.
            probes.track(pid, beacon_of(pid).unwrap_or(0)).unwrap_or(());
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
