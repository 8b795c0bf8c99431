//! A process that lives no longer than the measurement that started it.
#![expect(unsafe_code, reason = "fork and _exit have no safe wrapper")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use runtime::sys::{SysError, die_with_parent, futex_wait, futex_wake, now_ns};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions};

use super::BaselineError;
use super::board::{Board, Shared, state};

/// How long an order is waited for by spinning, as the parent of a real fork keeps its processor.
const SPIN: Duration = Duration::from_millis(5);
/// How long it is waited for at all.
const LIMIT: Duration = Duration::from_secs(5);

/// A forked process that runs one function. It is killed and reaped when this is dropped.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    who: &'static str,
    board: Shared,
}

impl Child {
    /// Forks a process that runs `body`. What it returns, or that it panicked, is in the board's
    /// state.
    pub(super) fn start(
        who: &'static str,
        body: impl FnOnce(&Board) -> Result<(), BaselineError>,
    ) -> Result<Self, BaselineError> {
        let board = Shared::new()?;
        let parent = rustix::process::getpid();
        // SAFETY: other threads may exist, so the child may use only what their absence cannot have
        // left locked: memory that it owns, system calls, and the allocator (glibc puts malloc
        // right in the child of a process with several threads). It does not print, and it ends in
        // `_exit` without returning from this function.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(SysError::last("fork").into());
        }
        match Pid::from_raw(pid) {
            Some(pid) => Ok(Self { pid, who, board }),
            None => live(&board, parent, body),
        }
    }

    /// What is shared with it.
    pub(super) fn board(&self) -> &Board {
        &self.board
    }

    /// Gives the next order and waits until it is carried out. Returns the moment just before, in
    /// nanoseconds of the monotonic clock.
    pub(super) fn order(&self) -> Result<u64, BaselineError> {
        let board = self.board();
        let number = board.order.0.load(Ordering::Relaxed).wrapping_add(1);
        let spins = board.spin.load(Ordering::Relaxed) == 1;
        let start = now_ns();
        board.order.0.store(number, Ordering::Release);
        if !spins {
            futex_wake(&board.order.0);
        }
        let answered = || board.answer.0.load(Ordering::Acquire) == number;
        let until = Instant::now() + SPIN;
        while !answered() && Instant::now() < until {
            std::hint::spin_loop();
        }
        self.wait(LIMIT, answered)?;
        Ok(start)
    }

    /// Waits until it is through, for `limit` at most.
    pub(super) fn finish(&self, limit: Duration) -> Result<(), BaselineError> {
        self.wait(limit, || self.state() == state::DONE)
    }

    /// Waits until it waits for an order.
    pub(super) fn ready(&self) -> Result<(), BaselineError> {
        self.wait(LIMIT, || self.state() == state::WAITING)
    }

    fn state(&self) -> u32 {
        self.board.state.0.load(Ordering::Acquire)
    }

    fn wait(&self, limit: Duration, done: impl Fn() -> bool) -> Result<(), BaselineError> {
        let end = Instant::now() + limit;
        let failed = |message| Err(BaselineError::Child { who: self.who, message });
        while !done() {
            if self.state() == state::FAILED {
                return failed(self.board.message());
            }
            // Asked before looking once more: it may be done and gone since.
            let gone = self.is_gone();
            if gone && !done() && self.state() != state::FAILED {
                return failed("it ended without a word".to_owned());
            }
            if !gone && Instant::now() >= end {
                return Err(BaselineError::Silent { who: self.who, limit_ms: limit.as_millis() });
            }
            sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        // An error is ECHILD: ended, and reaped by the kernel because SIGCHLD is ignored here.
        rustix::process::waitid(WaitId::Pid(self.pid), options)
            .map_or_else(|errno| errno == rustix::io::Errno::CHILD, |status| status.is_some())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails only if it is gone and was reaped by the kernel (SIGCHLD ignored).
        if rustix::process::kill_process(self.pid, Signal::KILL).is_ok() {
            reap(self.pid);
        }
    }
}

/// Waits for the end of a process and forgets it.
pub(super) fn reap(pid: Pid) {
    // Anything but an interruption is the end: its status, or ECHILD where the kernel reaps.
    while let Err(rustix::io::Errno::INTR) =
        rustix::process::waitpid(Some(pid), WaitOptions::empty())
    {}
}

/// The whole life of a started process.
fn live(board: &Board, parent: Pid, body: impl FnOnce(&Board) -> Result<(), BaselineError>) -> ! {
    die_with_parent(true);
    // The parent may have ended before the line above, and then nobody sends the signal.
    if rustix::process::getppid() == Some(parent) {
        match catch_unwind(AssertUnwindSafe(|| body(board))) {
            Ok(Ok(())) => board.state.0.store(state::DONE, Ordering::Release),
            Ok(Err(error)) => board.fail(&runtime::sys::chain(&error)),
            Err(_) => board.fail("it panicked"),
        }
    }
    // SAFETY: ends this process without running what its parent registered for its own end.
    unsafe { libc::_exit(0) }
}

/// In the child: waits for the order after `seen`, asleep or spinning, and returns its number. The
/// caller stamps the moment at once. While it spins it also notes when it last looked in vain.
pub(super) fn park(board: &Board, seen: u32) -> u32 {
    let spins = board.spin.load(Ordering::Relaxed) == 1;
    board.state.0.store(state::WAITING, Ordering::Release);
    let mut looked_ns = 0;
    loop {
        // Before the look: if this process loses its processor anywhere in the loop, the time that
        // it noted is from before that.
        let looking_ns = if spins { now_ns() } else { 0 };
        let order = board.order.0.load(Ordering::Acquire);
        if order != seen {
            board.looked_ns.store(looked_ns, Ordering::Relaxed);
            return order;
        }
        if spins {
            looked_ns = looking_ns;
            std::hint::spin_loop();
        } else {
            futex_wait(&board.order.0, seen, None);
        }
    }
}

/// In the child: reports that an order is carried out.
pub(super) fn answer(board: &Board, order: u32) {
    board.state.0.store(state::STARTING, Ordering::Relaxed);
    board.answer.0.store(order, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exists(pid: Pid) -> bool {
        rustix::process::test_kill_process(pid).is_ok()
    }

    #[test]
    fn a_child_is_gone_when_it_is_dropped() {
        let child = Child::start("idle", |board| {
            park(board, 0);
            Ok(())
        })
        .unwrap();
        child.ready().unwrap();
        let pid = child.pid;
        assert!(exists(pid));
        drop(child);
        assert!(!exists(pid));
    }

    #[test]
    fn what_a_child_says_arrives() {
        let child = Child::start("loser", |_| {
            Err(SysError { call: "luck", source: std::io::ErrorKind::NotFound.into() }.into())
        })
        .unwrap();
        let error = child.finish(LIMIT).unwrap_err().to_string();
        assert!(error.starts_with("the loser process failed: luck failed: "), "{error}");
    }

    #[test]
    fn a_silent_death_is_noticed() {
        let child = Child::start("victim", |_| {
            // SAFETY: ends the process.
            unsafe { libc::_exit(3) }
        })
        .unwrap();
        let error = child.finish(LIMIT).unwrap_err();
        assert!(matches!(error, BaselineError::Child { who: "victim", .. }), "{error}");
    }

    #[test]
    fn a_child_ends_with_its_parent() {
        let parent = Child::start("parent", |board| {
            let child = Child::start("orphan", |board| {
                park(board, 0);
                Ok(())
            })?;
            child.ready()?;
            board.value.store(
                u64::from(child.pid.as_raw_nonzero().get().unsigned_abs()),
                Ordering::Release,
            );
            park(board, 0);
            Ok(())
        })
        .unwrap();
        parent.ready().unwrap();
        let stat = format!("/proc/{}/stat", parent.board().value.load(Ordering::Acquire));
        assert!(std::fs::exists(&stat).unwrap(), "{stat}");
        drop(parent);
        // Gone, or waiting for whoever adopted it to read its status.
        let ended = || std::fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "));
        let end = Instant::now() + LIMIT;
        while !ended() {
            assert!(Instant::now() < end, "{stat} is still there");
            sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_child_that_is_late_is_not_waited_for() {
        let child = Child::start("sleeper", |_| {
            sleep(Duration::from_mins(1));
            Ok(())
        })
        .unwrap();
        let error = child.finish(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, BaselineError::Silent { who: "sleeper", limit_ms: 20 }), "{error}");
    }
}
