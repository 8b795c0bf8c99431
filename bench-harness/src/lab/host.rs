//! The machine that the laboratory stands on: signals, memory, settings.
#![expect(unsafe_code, reason = "a signal handler, and memory that is touched by raw pointers")]

use std::fs;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use runtime::memory::BackingKind;
use runtime::sys::SysError;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::error::Trouble;
use super::process;
use crate::session::LabError;

const THP: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Memory that is left to everybody else.
const RESERVE_BYTES: u64 = 1 << 30;
/// Memory that is touched ahead besides twice what a scenario needs, and the time for it.
const WARM_BYTES: u64 = 1 << 30;
const WARM_TIME: Duration = Duration::from_secs(2);
/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Turns the first SIGINT, SIGTERM or SIGHUP into an error of the scenario, so that everything is
/// put back; the second one ends the process at once.
pub(super) fn catch_signals() {
    extern "C" fn note(_signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::SeqCst);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: all-zero is a valid `sigaction`: no flags, an empty mask, the default action.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_RESETHAND;
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe; the structure
        // is initialised, and the old action is not asked for.
        let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        debug_assert_eq!(result, 0);
    }
}

/// An error once a signal has asked for the end.
pub(super) fn go_on() -> Result<(), Trouble> {
    if INTERRUPTED.load(Ordering::SeqCst) { Err(Trouble::Interrupted) } else { Ok(()) }
}

/// Touches free memory for 2 s at most, before each scenario: memory that this machine has not used
/// lately is 6 to 60 times slower on its first touch, where a hypervisor below takes free memory
/// back and has to find it again.
pub(super) fn warm_memory(needed: u64) -> Result<(), SysError> {
    let wanted = (process::available_bytes().unwrap_or(0) / 2).min(WARM_BYTES + 2 * needed);
    let bytes = usize::try_from(wanted).unwrap_or(0) & !((2 << 20) - 1);
    if bytes == 0 {
        return Ok(());
    }
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
    let start =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) }
            .map_err(SysError::new("mmap"))?;
    // SAFETY: our own mapping; the advice does not change contents. Without huge pages it is slower.
    unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxHugepage) }.unwrap_or(());
    let end = Instant::now() + WARM_TIME;
    if let Some(first) = NonNull::new(start.cast::<u8>()) {
        for offset in (0..bytes).step_by(4096) {
            if offset % (2 << 20) == 0 && Instant::now() > end {
                break;
            }
            // SAFETY: the offset lies inside the mapping.
            let byte = unsafe { first.add(offset) };
            // SAFETY: mapped, writable, and nobody else's.
            unsafe { byte.write_volatile(1) };
        }
    }
    // SAFETY: our own mapping, which nothing refers to any more.
    unsafe { rustix::mm::munmap(start, bytes) }.map_err(SysError::new("munmap"))
}

/// Whether there is as much memory.
pub(super) fn require_memory(bytes: u64) -> Result<(), LabError> {
    let needed = bytes + RESERVE_BYTES;
    // Where the kernel does not tell it is tried.
    let available = process::available_bytes().unwrap_or(u64::MAX);
    if needed <= available {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    Err(LabError::Unavailable {
        reason: format!(
            "{} MiB of memory are needed, {} MiB are available",
            mib(needed),
            mib(available)
        ),
    })
}

/// A setting of the kernel that is put back when this is dropped.
#[derive(Debug)]
pub(super) struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Writes `value`; `before` is what is to be written at the end.
    fn change(path: &Path, value: &str, before: String) -> std::io::Result<Self> {
        fs::write(path, value)?;
        Ok(Self { path: path.to_owned(), before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // It could be written before, and there is nobody to tell.
        fs::write(&self.path, &self.before).unwrap_or(());
    }
}

/// Makes a backing available where that takes a setting of the kernel. What was set is in `notes`,
/// and stays until the result is dropped.
pub(super) fn provide(
    backing: BackingKind,
    image_bytes: u64,
    notes: &mut Vec<String>,
) -> Result<Option<Setting>, LabError> {
    match backing {
        BackingKind::Small => Ok(None),
        BackingKind::Thp => shmem_thp(notes),
        BackingKind::Hugetlb => hugetlb(image_bytes, notes).map(Some),
    }
}

fn unavailable(reason: String) -> LabError {
    LabError::Unavailable { reason }
}

fn shmem_thp(notes: &mut Vec<String>) -> Result<Option<Setting>, LabError> {
    let text = fs::read_to_string(THP).unwrap_or_default();
    let chosen = text.split('[').nth(1).and_then(|rest| rest.split(']').next()).unwrap_or_default();
    if !matches!(chosen, "never" | "deny") {
        return Ok(None);
    }
    let setting =
        Setting::change(Path::new(THP), "advise", chosen.to_owned()).map_err(|error| {
            unavailable(format!("{THP} is `{chosen}` and could not be set to `advise`: {error}"))
        })?;
    notes.push(format!("{THP} was `{chosen}`; `advise` for this scenario"));
    Ok(Some(setting))
}

/// Images of a size that the pool is made for: those of parent, zygote, standby and child can all
/// become private, 2 MiB at a time, and one more is for what is on its way in or out.
const IMAGES: u64 = 6;

fn hugetlb(image_bytes: u64, notes: &mut Vec<String>) -> Result<Setting, LabError> {
    let number = |path: &str| -> u64 {
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let free = || number("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let needed = image_bytes.div_ceil(HUGE) * IMAGES;
    let before = number(POOL);
    let missing = needed.saturating_sub(free());
    require_memory(missing * HUGE)?;
    let setting =
        Setting::change(Path::new(POOL), &(before + missing).to_string(), before.to_string())
            .map_err(|error| {
                unavailable(format!(
                    "the pool has {} free huge pages, {needed} are needed, and {POOL} could not \
                     be raised: {error}",
                    free()
                ))
            })?;
    if free() < needed {
        let reason = format!("{needed} huge pages are needed, the kernel found {}", free());
        return Err(unavailable(reason));
    }
    notes.push(format!("{POOL} was {before}; {} for this scenario", before + missing));
    Ok(setting)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_put_back() {
        let path = std::env::temp_dir().join(format!("setting-{}", std::process::id()));
        fs::write(&path, "never").unwrap();
        let setting = Setting::change(&path, "advise", "never".into()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "advise");
        drop(setting);
        assert_eq!(fs::read_to_string(&path).unwrap(), "never");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn memory_that_is_not_there_is_not_used() {
        assert!(require_memory(1 << 20).is_ok());
        let error = require_memory(1 << 60).unwrap_err().to_string();
        assert!(error.contains("MiB of memory are needed"), "{error}");
    }
}
