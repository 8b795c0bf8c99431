//! Ctrl-C and its kin, taken in order instead of at any moment.
#![expect(unsafe_code, reason = "signal masks and signalfd have no safe wrapper")]

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use runtime::sys::SysError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Signals that end `run`.
const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Pending signals of this process.
#[derive(Debug)]
pub struct Signals {
    file: OwnedFd,
}

impl Signals {
    /// Blocks the signals in this thread and all that it starts from now on. Called before there
    /// are others: an unblocked signal would end the process, and leave things behind.
    ///
    /// # Errors
    ///
    /// What signalfd(2) says.
    pub fn block() -> Result<Self, SysError> {
        // SAFETY: an all-zero set is valid memory; sigemptyset makes it a valid set.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: a valid destination.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in ENDING.into_iter().filter(|signal| !is_ignored(*signal)) {
            // SAFETY: a valid set and a valid signal number.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: a valid set; the old mask is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(SysError::new("pthread_sigmask")(rustix::io::Errno::from_raw_os_error(
                result,
            )));
        }
        // SAFETY: a valid set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(SysError::last("signalfd"));
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// Waits for a signal for so long; returns its number.
    pub fn wait(&self, time: Duration) -> Option<i32> {
        let time = Timespec::try_from(time).ok();
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        // EINTR: the caller looks again.
        let ready = poll(&mut fds, time.as_ref()).is_ok_and(|ready| ready > 0);
        ready.then(|| self.read())
    }

    /// Waits for a signal, or until `other` hangs up; returns the signal's number.
    pub fn wait_or_hang_up(&self, other: impl AsFd) -> Option<i32> {
        loop {
            let mut fds =
                [PollFd::new(&self.file, PollFlags::IN), PollFd::new(&other, PollFlags::empty())];
            // EINTR: look again.
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let hung_up = !fds[1].revents().is_empty();
            if !fds[0].revents().is_empty() {
                return Some(self.read());
            }
            if hung_up {
                return None;
            }
        }
    }

    /// Does `work`. If a signal comes meanwhile, its number is there, too, and `haste` was called.
    pub fn during<T>(
        &self,
        haste: impl FnOnce() + Send,
        work: impl FnOnce() -> T,
    ) -> (T, Option<i32>) {
        let Ok((over, working)) = std::io::pipe() else { return (work(), None) };
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| self.wait_or_hang_up(over).inspect(|_| haste()));
            // On this thread: an instance ends with the one that started it.
            let done = work();
            drop(working);
            (done, watcher.join().unwrap_or(None))
        })
    }

    fn read(&self) -> i32 {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        // The number of the signal is the first word.
        match rustix::io::read(&self.file, &mut info) {
            Ok(4..) => i32::from_ne_bytes([info[0], info[1], info[2], info[3]]),
            _ => libc::SIGTERM,
        }
    }
}

/// As under nohup(1): a blocked signal would come through all the same.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: an all-zero sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; a valid destination.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}
