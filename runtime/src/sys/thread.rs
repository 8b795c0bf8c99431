//! Threads: waiting for each other, being stopped, where and how they run.
#![expect(unsafe_code, reason = "signals, timers and scheduling have no safe wrapper")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

pub use rustix::thread::CpuSet;
use rustix::thread::futex;

use super::SysError;

/// Waits until `word` is no longer `expected`, a wake-up, a signal or the end of `timeout`.
///
/// The futex is shared between processes. All four outcomes look the same: the caller looks at
/// the word again.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) {
    let timeout = timeout.map(|timeout| rustix::time::Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    // Every errno of FUTEX_WAIT (EAGAIN, EINTR, ETIMEDOUT) means "look again".
    futex::wait(word, futex::Flags::empty(), expected, timeout.as_ref()).unwrap_or(());
}

/// Wakes every waiter of `word`.
pub fn futex_wake(word: &AtomicU32) {
    // Fails only for an address that is not mapped, which a reference rules out.
    futex::wake(word, futex::Flags::empty(), i32::MAX.cast_unsigned()).unwrap_or(0);
}

/// The signal that makes a vCPU leave the guest.
#[must_use]
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Installs an empty handler for the kick signal, and for that of [`limit_realtime`]: their arrival
/// alone interrupts `KVM_RUN`.
///
/// # Errors
///
/// What sigaction(2) says.
pub fn install_kick_handler() -> Result<(), SysError> {
    extern "C" fn ignore(_: libc::c_int) {}
    extern "C" fn note(_: libc::c_int) {
        REALTIME_LIMIT_HIT.store(true, Ordering::Relaxed);
    }
    // SAFETY: an all-zero sigaction is a valid value: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let ignore = ignore as extern "C" fn(libc::c_int) as usize;
    let note = note as extern "C" fn(libc::c_int) as usize;
    for (signal, handler) in [(kick_signal(), ignore), (libc::SIGXCPU, note)] {
        action.sa_sigaction = handler;
        // SAFETY: `action` is initialised; the handlers store to an atomic at most, which is
        // async-signal-safe.
        let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        if result < 0 {
            return Err(SysError::last("sigaction"));
        }
    }
    Ok(())
}

/// Sends the kick signal to one thread of this process.
pub fn kick(tid: i32) {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: tgkill touches no memory; a thread that is gone gives ESRCH, which is fine.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, kick_signal()) };
}

/// Thread id of the caller.
#[must_use]
pub fn thread_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// How a thread shares processors with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// `SCHED_FIFO`, priority 1.
    Realtime,
    /// `SCHED_OTHER`.
    Normal,
}

/// Puts the calling thread under `policy`.
///
/// # Errors
///
/// `EPERM` for [`Policy::Realtime`] without `CAP_SYS_NICE` or `RLIMIT_RTPRIO`.
pub fn set_policy(policy: Policy) -> Result<(), SysError> {
    let (policy, sched_priority) = match policy {
        Policy::Realtime => (libc::SCHED_FIFO, 1),
        Policy::Normal => (libc::SCHED_OTHER, 0),
    };
    let param = libc::sched_param { sched_priority };
    // SAFETY: `param` is a valid sched_param and thread 0 is the caller.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
    if result < 0 { Err(SysError::last("sched_setscheduler")) } else { Ok(()) }
}

/// Whether the kernel has interrupted a thread since [`limit_realtime`], and so raised the limit.
static REALTIME_LIMIT_HIT: AtomicBool = AtomicBool::new(false);

/// Sets the limit anew if it was hit: the next one would be a second away.
pub fn renew_realtime_limit(us: u64) {
    if REALTIME_LIMIT_HIT.swap(false, Ordering::Relaxed) {
        limit_realtime(us);
    }
}

/// Makes the kernel interrupt a thread of this process that has run for `us` under `SCHED_FIFO`
/// without sleeping (`RLIMIT_RTTIME`; the handler is that of the kick). It looks at every tick, and
/// raises the limit when it has: so it is set anew after each run. Unlike a timer it costs nothing
/// when it is not needed; setting one takes 10 µs where this machine is virtual itself.
pub fn limit_realtime(us: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Rttime).maximum;
    // Only the hard limit needs permission.
    setrlimit(Resource::Rttime, Rlimit { current: Some(us), maximum }).unwrap_or(());
}

/// Restricts the calling thread to the processors of `mask` (bit n: processor n).
///
/// # Errors
///
/// `EINVAL` if no processor of the mask is there.
pub fn set_affinity(mask: u64) -> Result<(), SysError> {
    let mut set = rustix::thread::CpuSet::new();
    for cpu in 0..64 {
        if mask >> cpu & 1 == 1 {
            set.set(cpu);
        }
    }
    rustix::thread::sched_setaffinity(None, &set).map_err(SysError::new("sched_setaffinity"))
}

/// Restricts another thread to the processors of `mask`.
///
/// # Errors
///
/// `ESRCH` if it is gone, `EPERM` if it belongs to somebody else.
pub fn set_affinity_of(tid: i32, mask: u64) -> Result<(), SysError> {
    // SAFETY: the mask is 8 bytes, which is a valid length of a CPU mask.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, tid, size_of::<u64>(), &raw const mask)
    };
    if result < 0 { Err(SysError::last("sched_setaffinity")) } else { Ok(()) }
}

/// The processor that the caller runs on.
#[must_use]
pub fn current_cpu() -> u32 {
    u32::try_from(rustix::thread::sched_getcpu()).unwrap_or(0)
}

/// Processors that the calling thread may use, of the first 64 (bit n: processor n).
#[must_use]
pub fn affinity() -> u64 {
    rustix::thread::sched_getaffinity(None)
        .map_or(u64::MAX, |set| (0..64).filter(|cpu| set.is_set(*cpu)).map(|cpu| 1 << cpu).sum())
}

/// All processors that the calling thread may use; `None` where there are more than the 1,024 that a
/// set has room for.
#[must_use]
pub fn all_affinity() -> Option<CpuSet> {
    rustix::thread::sched_getaffinity(None).ok()
}

/// Lets the calling thread use the processors of a set that it, or who made it, had before.
///
/// # Errors
///
/// `EINVAL` if none of them is there any more.
pub fn set_affinity_to(set: &CpuSet) -> Result<(), SysError> {
    rustix::thread::sched_setaffinity(None, set).map_err(SysError::new("sched_setaffinity"))
}

/// Sends the kick signal to the thread that made it, again and again once it is set, until it is
/// dropped: a run of the guest that would not end by itself does.
#[derive(Debug)]
pub struct KickTimer {
    timer: libc::timer_t,
}

impl KickTimer {
    /// A timer that is not set yet.
    ///
    /// # Errors
    ///
    /// What `timer_create(2)` says.
    pub fn new() -> Result<Self, SysError> {
        // SAFETY: an all-zero sigevent is a valid value.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        event.sigev_notify_thread_id = thread_id();
        let mut timer = std::ptr::null_mut();
        // SAFETY: both pointers are valid for the call.
        let result =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        if result < 0 {
            return Err(SysError::last("timer_create"));
        }
        Ok(Self { timer })
    }

    /// Sets it: the first signal comes after `first_us`, the next ones every millisecond, because
    /// one that arrives before the guest is entered is lost.
    ///
    /// # Errors
    ///
    /// What `timer_settime(2)` says.
    pub fn set(&self, first_us: i64) -> Result<(), SysError> {
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 },
            it_value: libc::timespec { tv_sec: 0, tv_nsec: first_us * 1000 },
        };
        // SAFETY: the timer exists and the specification is valid.
        let result =
            unsafe { libc::timer_settime(self.timer, 0, &raw const spec, std::ptr::null_mut()) };
        if result < 0 { Err(SysError::last("timer_settime")) } else { Ok(()) }
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: the timer exists and is deleted once.
        let result = unsafe { libc::timer_delete(self.timer) };
        debug_assert_eq!(result, 0);
    }
}
