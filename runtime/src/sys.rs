//! System calls that `std` does not wrap, each with an error that names the call.
#![expect(unsafe_code, reason = "fork, prctl, signals and close_range have no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::thread::futex;

/// A system call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct SysError {
    /// Name of the call, with its operation where one call has many.
    pub call: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl SysError {
    /// The error of `call` from `errno`.
    #[must_use]
    pub fn last(call: &'static str) -> Self {
        Self { call, source: io::Error::last_os_error() }
    }

    /// Wraps any error that is an errno.
    pub fn new(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self { call, source: errno.into() }
    }

    /// The errno, `EIO` if there is none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(libc::EIO)
    }
}

/// Monotonic clock in nanoseconds; the same in all processes of this machine.
#[must_use]
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both parts are non-negative and far from the limits until the year 2500.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Wall clock in nanoseconds since the epoch.
#[must_use]
pub fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

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

/// Number of threads of this process, as /proc tells.
#[must_use]
pub fn thread_count() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// Asks the kernel for SIGKILL when the process that forked this one ends; `false` takes it back.
pub fn die_with_parent(on: bool) {
    let signal = if on { libc::SIGKILL } else { 0 };
    // SAFETY: PR_SET_PDEATHSIG takes an integer and touches no memory. It cannot fail for a valid
    // signal number or 0.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) };
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

/// The signal that makes a vCPU leave the guest.
#[must_use]
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Installs an empty handler for the kick signal: its arrival alone interrupts `KVM_RUN`.
///
/// # Errors
///
/// What sigaction(2) says.
pub fn install_kick_handler() -> Result<(), SysError> {
    extern "C" fn ignore(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is a valid value: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is initialised and the handler only returns, which is async-signal-safe.
    let result = unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    if result < 0 { Err(SysError::last("sigaction")) } else { Ok(()) }
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

/// Puts the calling thread under `SCHED_FIFO` (priority 1) or back under `SCHED_OTHER`.
///
/// # Errors
///
/// `EPERM` without `CAP_SYS_NICE` or `RLIMIT_RTPRIO`.
pub fn set_realtime(on: bool) -> Result<(), SysError> {
    let policy = if on { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let param = libc::sched_param { sched_priority: i32::from(on) };
    // SAFETY: `param` is a valid sched_param and thread 0 is the caller.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
    if result < 0 { Err(SysError::last("sched_setscheduler")) } else { Ok(()) }
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

/// Sends one message with file descriptors.
///
/// # Errors
///
/// `EPIPE` and `ECONNRESET` if the peer is gone, `EMSGSIZE` if the message is too long.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SysError> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(SysError { call: "sendmsg", source: io::ErrorKind::InvalidInput.into() });
    }
    let parts = [io::IoSlice::new(bytes)];
    loop {
        match rustix::net::sendmsg(socket.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SysError::new("sendmsg")(errno)),
        }
    }
}

/// Receives one message and its file descriptors; an empty message means that the peer is gone.
///
/// # Errors
///
/// `EAGAIN` on a non-blocking socket, `EMSGSIZE` for a message longer than `bytes`.
pub fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> Result<(usize, Vec<OwnedFd>), SysError> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(bytes)];
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match rustix::net::recvmsg(socket.as_fd(), &mut parts, &mut control, flags) {
            Ok(message) => break message,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SysError::new("recvmsg")(errno)),
        }
    };
    if message.flags.contains(rustix::net::ReturnFlags::TRUNC) {
        return Err(SysError {
            call: "recvmsg",
            source: io::Error::from_raw_os_error(libc::EMSGSIZE),
        });
    }
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    Ok((message.bytes, fds))
}

/// A pair of connected sockets that keep message borders.
///
/// # Errors
///
/// `EMFILE` above all.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), SysError> {
    rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(SysError::new("socketpair"))
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

/// Raw numbers of some descriptors, for [`close_all_but`].
pub fn raw(fds: &[&dyn AsRawFd]) -> Vec<RawFd> {
    fds.iter().map(|fd| fd.as_raw_fd()).collect()
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

/// Sends the kick signal to the calling thread again and again until it is dropped: a run of the
/// guest that would not end by itself does.
#[derive(Debug)]
pub struct KickTimer {
    timer: libc::timer_t,
}

impl KickTimer {
    /// The first signal comes after `first_us`, the next ones every millisecond: one that arrives
    /// before the guest is entered is lost.
    ///
    /// # Errors
    ///
    /// What `timer_create(2)` says.
    pub fn start(first_us: i64) -> Result<Self, SysError> {
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
        let this = Self { timer };
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 },
            it_value: libc::timespec { tv_sec: 0, tv_nsec: first_us * 1000 },
        };
        // SAFETY: the timer exists and the specification is valid.
        let result =
            unsafe { libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()) };
        if result < 0 { Err(SysError::last("timer_settime")) } else { Ok(this) }
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: the timer exists and is deleted once.
        let result = unsafe { libc::timer_delete(self.timer) };
        debug_assert_eq!(result, 0);
    }
}

/// Reads `bytes` of another process's memory, at the same addresses as in this one, into place.
///
/// # Safety
///
/// The range is mapped and writable here, and nothing else uses it meanwhile.
///
/// # Errors
///
/// `ESRCH` if the process is gone, `EPERM` if it may not be read, `EFAULT` if it has less mapped.
pub unsafe fn copy_from_twin(
    pid: rustix::process::Pid,
    ranges: &[(std::ptr::NonNull<u8>, usize)],
) -> Result<(), SysError> {
    for part in ranges.chunks(512) {
        let vectors: Vec<libc::iovec> = part
            .iter()
            .map(|(start, bytes)| libc::iovec { iov_base: start.as_ptr().cast(), iov_len: *bytes })
            .collect();
        let expected: usize = part.iter().map(|(_, bytes)| bytes).sum();
        // SAFETY: the local side is writable by this function's contract; the remote side is
        // checked by the kernel.
        let read = unsafe {
            libc::process_vm_readv(
                pid.as_raw_nonzero().get(),
                vectors.as_ptr(),
                vectors.len() as libc::c_ulong,
                vectors.as_ptr(),
                vectors.len() as libc::c_ulong,
                0,
            )
        };
        match usize::try_from(read) {
            Ok(read) if read == expected => {}
            Ok(_) => {
                return Err(SysError {
                    call: "process_vm_readv",
                    source: io::ErrorKind::UnexpectedEof.into(),
                });
            }
            Err(_) => return Err(SysError::last("process_vm_readv")),
        }
    }
    Ok(())
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

/// Unmaps pages of this process's private mappings: they show what is below them again.
///
/// # Safety
///
/// Nothing that was written to the ranges is needed any more.
///
/// # Errors
///
/// `EINVAL` before Linux 6.13, which allows this only for hints.
pub unsafe fn unmap_pages(ranges: &[(std::ptr::NonNull<u8>, usize)]) -> Result<(), SysError> {
    /// `PIDFD_SELF_THREAD_GROUP` (Linux 6.15; before that a pidfd has to be opened).
    const PIDFD_SELF: libc::c_int = -10_001;
    let bytes: usize = ranges.iter().map(|(_, bytes)| bytes).sum();
    // A pointer and a length, in this order: the layout of an iovec.
    let vectors: Vec<libc::iovec> = ranges
        .iter()
        .map(|(start, bytes)| libc::iovec { iov_base: start.as_ptr().cast(), iov_len: *bytes })
        .collect();
    // SAFETY: the vectors are valid; giving up the contents is allowed by this function's contract.
    let advised = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            PIDFD_SELF,
            vectors.as_ptr(),
            vectors.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    match usize::try_from(advised) {
        Ok(advised) if advised == bytes => Ok(()),
        Ok(_) => {
            Err(SysError { call: "process_madvise", source: io::ErrorKind::UnexpectedEof.into() })
        }
        Err(_) => Err(SysError::last("process_madvise")),
    }
}

/// An error and everything below it, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
