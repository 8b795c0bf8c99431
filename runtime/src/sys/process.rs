//! Processes: forking, ending, what they cost.
#![expect(unsafe_code, reason = "fork, prctl and close_range have no safe wrapper")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::SysError;

/// Which side of [`fork`] this is.
#[derive(Debug)]
pub enum Forked {
    /// The calling process goes on.
    Parent {
        /// The new process.
        child: rustix::process::Pid,
    },
    /// The new process.
    Child,
}

/// fork(2).
///
/// # Safety
///
/// The calling process has exactly one thread: the child has only the calling thread, so a lock
/// that another thread held would stay locked for ever.
///
/// # Errors
///
/// What fork(2) says, `EAGAIN` and `ENOMEM` above all.
pub unsafe fn fork() -> Result<Forked, SysError> {
    // SAFETY: single-threaded by this function's contract.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(SysError::last("fork")),
        0 => Ok(Forked::Child),
        pid => match rustix::process::Pid::from_raw(pid) {
            Some(child) => Ok(Forked::Parent { child }),
            None => Err(SysError::last("fork")),
        },
    }
}

/// Asks the kernel for SIGKILL when the process that forked this one ends; `false` takes it back.
pub fn die_with_parent(on: bool) {
    let signal = if on { libc::SIGKILL } else { 0 };
    // SAFETY: PR_SET_PDEATHSIG takes an integer and touches no memory. It cannot fail for a valid
    // signal number or 0.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) };
}

/// Lets the processes of this program look at each other's memory and at their own files in /proc, if
/// the program file has capabilities: the kernel makes whoever executes it undumpable (prctl(2),
/// `PR_SET_DUMPABLE`), and that shuts out the process itself, too.
///
/// It does not let other processes of the same user in: to trace a process takes all capabilities
/// that it has (`cap_ptrace_access_check` in security/commoncap.c). And no core is written, as
/// before; where a program receives cores, guest memory is none of it (`Mapping`).
pub fn open_to_its_own() {
    use rustix::process::{
        DumpableBehavior, Resource, Rlimit, dumpable_behavior, getrlimit, set_dumpable_behavior,
        setrlimit,
    };
    if dumpable_behavior() == Ok(DumpableBehavior::Dumpable) {
        return;
    }
    let maximum = getrlimit(Resource::Core).maximum;
    let no_core = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum });
    // Without it rehearsals fail, and say so.
    no_core.and_then(|()| set_dumpable_behavior(DumpableBehavior::Dumpable)).unwrap_or(());
}

/// Gives this process a name that ps(1) shows (at most 15 bytes are kept).
pub fn set_process_name(name: &str) {
    let mut bytes = [0_u8; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: PR_SET_NAME reads a NUL-terminated string of at most 16 bytes; the array's last
    // byte is never written.
    unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr()) };
}

/// Lets the kernel reap ended children of this process at once, so that none stays a zombie.
pub fn reap_children_automatically() {
    // SAFETY: SIG_IGN is a valid disposition for SIGCHLD; no handler code is involved.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Closes every file descriptor but those listed and the standard ones.
///
/// # Safety
///
/// No object that owns one of the closed descriptors is used or dropped afterwards.
pub unsafe fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().chain([RawFd::MAX]) {
        if from < fd {
            // SAFETY: the caller gave up every descriptor in the range.
            unsafe {
                libc::syscall(
                    libc::SYS_close_range,
                    from.cast_unsigned(),
                    (fd - 1).cast_unsigned(),
                    0,
                )
            };
        }
        from = fd.saturating_add(1);
    }
}

/// Adopts the descriptor that this process was started with as `fd`.
///
/// # Safety
///
/// `fd` is open, and nothing else in this process owns it.
#[must_use]
pub unsafe fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: open and unowned by this function's contract.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// CPU time of this process, all threads, in nanoseconds.
#[must_use]
pub fn cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Page faults of this process that needed no I/O, all threads.
#[must_use]
pub fn minor_faults() -> u64 {
    // SAFETY: an all-zero rusage is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a valid destination.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    if result < 0 { 0 } else { u64::try_from(usage.ru_minflt).unwrap_or(0) }
}

/// CPU time of another process, all threads, in nanoseconds; 0 if it is gone.
#[must_use]
pub fn cpu_ns_of(pid: rustix::process::Pid) -> u64 {
    let mut clock = 0;
    // SAFETY: a valid destination.
    if unsafe { libc::clock_getcpuclockid(pid.as_raw_nonzero().get(), &raw mut clock) } != 0 {
        return 0;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid destination; a process that has gone meanwhile gives EINVAL.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } < 0 {
        return 0;
    }
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}
