//! fork(2) of a process that has touched as much memory, and `posix_spawn` of `true`.
#![expect(unsafe_code, reason = "fork and posix_spawn have no safe wrapper")]

use std::ffi::CString;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use runtime::sys::{SysError, now_ns};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::process::Pid;

use super::board::{Board, MAX_SAMPLES};
use super::child::{Child, reap};
use super::{BaselineError, Rounds, us_between, us_since};

/// The process that is forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForkConfig {
    /// Memory that it has written to, page by page, in MiB.
    pub memory_mib: u32,
    /// In transparent huge pages, if the host gives them; else in pages of 4 KiB.
    pub thp: bool,
    /// Most samples, at most 1024.
    pub samples: usize,
    /// Most time for all forks; five are made whatever the time.
    pub limit: Duration,
    /// Most time for touching the memory before. Memory that the machine never used is slow.
    pub touch_limit: Duration,
}

impl Default for ForkConfig {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            thp: false,
            samples: 30,
            limit: Duration::from_secs(2),
            touch_limit: Duration::from_secs(10),
        }
    }
}

/// What forks of a process take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProcessForks {
    /// From the call of fork(2) to the first statement of the child, in µs.
    pub fork_us: Vec<f64>,
    /// Share of the memory that really is in huge pages, 0 to 1.
    pub huge_share: f64,
}

/// Memory to be left for everybody else, in MiB.
const RESERVE_MIB: u64 = 512;
/// Forks before the first that counts.
const WARM_UP: usize = 1;

/// Touches the memory in a process started for it, which then forks again and again.
///
/// # Errors
///
/// [`BaselineError::NoMemory`] if the host has not as much; the step that failed.
pub fn fork(config: &ForkConfig) -> Result<ProcessForks, BaselineError> {
    let (needed_mib, available_mib) = (u64::from(config.memory_mib) + RESERVE_MIB, available_mib());
    if available_mib < needed_mib {
        return Err(BaselineError::NoMemory { needed_mib, available_mib });
    }
    let child = Child::start("forking", |board| forking(board, config))?;
    // Five forks of a process of any size end within ten times the limit, or never.
    child.finish(2 * config.touch_limit + 10 * config.limit.max(Duration::from_secs(1)))?;
    let board = child.board();
    let bytes = us_between(0, (u64::from(config.memory_mib) << 20) * 1000);
    let huge_share = us_between(0, board.value.load(Ordering::Relaxed) * 1000) / bytes;
    Ok(ProcessForks { fork_us: board.samples_us(), huge_share })
}

/// The forked process: its memory, then its forks.
fn forking(board: &Board, config: &ForkConfig) -> Result<(), BaselineError> {
    // If memory runs out all the same, this process is to go and no other. It needs no permission
    // to say so; where /proc is not writable, it does without.
    std::fs::write("/proc/self/oom_score_adj", "1000").unwrap_or(());
    touch((config.memory_mib as usize) << 20, config)?;
    board.value.store(huge_bytes(), Ordering::Relaxed);
    for counts in Rounds::new(WARM_UP, config.samples.min(MAX_SAMPLES), config.limit) {
        let start = now_ns();
        // SAFETY: this process has one thread, being forked from another (`Child::start`).
        match unsafe { libc::fork() } {
            -1 => return Err(SysError::last("fork").into()),
            0 => {
                board.stamps.0[0].store(now_ns(), Ordering::Release);
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(0) };
            }
            pid => {
                if let Some(pid) = Pid::from_raw(pid) {
                    reap(pid);
                }
            }
        }
        let end = board.stamps.0[0].swap(0, Ordering::Acquire);
        if end < start {
            return Err(BaselineError::NoSamples { what: "fork(2), whose child was killed" });
        }
        if counts {
            board.push(end - start);
        }
    }
    Ok(())
}

/// Memory that is touched between two looks at the clock, in bytes.
const CHUNK: usize = 16 << 20;

/// Writes to every page of fresh memory, which stays for the rest of this process.
fn touch(bytes: usize, config: &ForkConfig) -> Result<(), BaselineError> {
    let end = Instant::now() + config.touch_limit;
    // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(SysError::new("mmap"))?;
    let advice = if config.thp { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: our own mapping; neither advice changes contents.
    unsafe { rustix::mm::madvise(start, bytes, advice) }.map_err(SysError::new("madvise"))?;
    let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| SysError::last("mmap"))?;
    for offset in (0..bytes).step_by(CHUNK) {
        if Instant::now() >= end {
            let limit_ms = config.touch_limit.as_millis();
            return Err(BaselineError::TooLong { what: "touching the memory", limit_ms });
        }
        // SAFETY: the offset lies inside the mapping.
        let chunk = unsafe { start.add(offset) };
        let len = CHUNK.min(bytes - offset);
        // Write faults without the faults: the same pages in a fraction of the time.
        // SAFETY: inside our own mapping; contents do not change.
        let done =
            unsafe { rustix::mm::madvise(chunk.as_ptr().cast(), len, Advice::LinuxPopulateWrite) };
        if done.is_err() {
            // Before Linux 5.14.
            // SAFETY: inside our own mapping, which nobody else uses.
            unsafe { chunk.as_ptr().write_bytes(1, len) };
        }
    }
    Ok(())
}

/// Memory of this process in anonymous huge pages, in bytes.
fn huge_bytes() -> u64 {
    field_kib("/proc/self/smaps_rollup", "AnonHugePages:") << 10
}

fn available_mib() -> u64 {
    field_kib("/proc/meminfo", "MemAvailable:") >> 10
}

/// A line `Name:   123 kB` of a file in /proc, 0 if it is not there.
fn field_kib(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// From the call of `posix_spawn` of `true` until its end was waited for, in µs.
///
/// # Errors
///
/// What `posix_spawn` says; `ENOENT` without such a program.
pub fn spawn_true(samples: usize, limit: Duration) -> Result<Vec<f64>, BaselineError> {
    let path = ["/bin/true", "/usr/bin/true"].into_iter().find(|path| Path::new(path).exists());
    let missing = || SysError { call: "posix_spawn", source: std::io::ErrorKind::NotFound.into() };
    let path = path.and_then(|path| CString::new(path).ok()).ok_or_else(missing)?;
    let argv = [path.as_ptr().cast_mut(), std::ptr::null_mut()];
    let environment = [std::ptr::null_mut()];
    let mut spawned = Vec::with_capacity(samples);
    for counts in Rounds::new(WARM_UP, samples, limit) {
        let mut pid = 0;
        let start = now_ns();
        // SAFETY: path, argv and environment are NUL-terminated and outlive the call, which does
        // not write to them; null stands for default actions and attributes.
        let errno = unsafe {
            libc::posix_spawn(
                &raw mut pid,
                path.as_ptr(),
                std::ptr::null(),
                std::ptr::null(),
                argv.as_ptr(),
                environment.as_ptr(),
            )
        };
        if errno != 0 {
            let source = std::io::Error::from_raw_os_error(errno);
            return Err(SysError { call: "posix_spawn", source }.into());
        }
        if let Some(pid) = Pid::from_raw(pid) {
            reap(pid);
        }
        if counts {
            spawned.push(us_since(start));
        }
    }
    Ok(spawned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn children() -> String {
        std::fs::read_to_string("/proc/thread-self/children").unwrap()
    }

    #[test]
    fn a_fork_costs_by_memory_touched() {
        let p50 = |memory_mib| {
            let config = ForkConfig { memory_mib, samples: 9, ..ForkConfig::default() };
            let forks = fork(&config).unwrap();
            assert!(forks.huge_share < 0.1, "{forks:?}");
            assert!(forks.fork_us.len() >= 5 && forks.fork_us.iter().all(|us| *us > 1.0));
            let mut sorted = forks.fork_us;
            sorted.sort_unstable_by(f64::total_cmp);
            sorted[sorted.len() / 2]
        };
        let (small, large) = (p50(4), p50(256));
        assert!(large > 2.0 * small, "{small} µs with 4 MiB, {large} µs with 256 MiB");
        assert_eq!(children(), "");
    }

    #[test]
    fn huge_pages_are_reported_as_they_are() {
        let config = ForkConfig { memory_mib: 64, thp: true, samples: 5, ..ForkConfig::default() };
        let forks = fork(&config).unwrap();
        assert!((0.0..=1.1).contains(&forks.huge_share), "{forks:?}");
        assert!(forks.fork_us.iter().all(|us| *us > 1.0), "{forks:?}");
    }

    #[test]
    fn memory_that_is_not_there_is_not_touched() {
        let error = fork(&ForkConfig { memory_mib: u32::MAX, ..ForkConfig::default() });
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("4294967807 MiB of memory are needed"), "{text}");
    }

    #[test]
    fn touching_is_not_waited_for() {
        let config = ForkConfig { touch_limit: Duration::ZERO, ..ForkConfig::default() };
        let text = fork(&config).unwrap_err().to_string();
        assert!(text.ends_with("touching the memory took longer than 0 ms"), "{text}");
    }

    #[test]
    fn true_is_spawned_and_reaped() {
        let spawned = spawn_true(5, Duration::from_secs(2)).unwrap();
        assert_eq!(spawned.len(), 5);
        assert!(spawned.iter().all(|us| *us > 10.0), "{spawned:?}");
        assert_eq!(children(), "");
    }
}
