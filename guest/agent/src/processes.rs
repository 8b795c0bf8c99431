//! What `/proc` says about processes.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::state::{Process, Processes};

/// The machine's `/proc`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Proc;

impl Processes for Proc {
    fn thread(&self, tid: u32) -> Option<Process> {
        let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
        let stat = fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
        Some(Process {
            tgid: field(&status, "Tgid:")?,
            parent: field(&status, "PPid:")?,
            started: started(&stat)?,
        })
    }
}

impl Proc {
    /// The process that the thread `tid` belongs to; the thread's own number if it has ended.
    #[must_use]
    pub fn thread_group(self, tid: u32) -> u32 {
        let status = fs::read_to_string(format!("/proc/{tid}/status"));
        status.ok().and_then(|status| field(&status, "Tgid:")).unwrap_or(tid)
    }

    /// Whether the thread `tid` has a signal to take, or is gone. It cannot while it waits for an
    /// answer of ours.
    #[must_use]
    pub fn is_interrupted(self, tid: u32) -> bool {
        let status = fs::read_to_string(format!("/proc/{tid}/status"));
        status.map_or(true, |status| has_signal(&status))
    }
}

/// Time since this machine was booted; a child goes on where its parent was.
#[must_use]
pub fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn line<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

fn field(status: &str, name: &str) -> Option<u32> {
    line(status, name)?.parse().ok()
}

/// Field 22 of `stat`. The second is a name, in parentheses, that may hold anything.
fn started(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_millis(ticks.saturating_mul(1000) / per_second))
}

fn has_signal(status: &str) -> bool {
    let mask = |name| {
        let digits = line(status, name).unwrap_or("0");
        u64::from_str_radix(digits, 16).unwrap_or(0)
    };
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:") & !PATIENT != 0
}

/// Signals that do not end a wait. The kernel would start the call again after their handlers, if
/// those want that, but not once we have answered; and a shell has a handler for its children's ends.
const PATIENT: u64 =
    bit(libc::SIGCHLD) | bit(libc::SIGCONT) | bit(libc::SIGURG) | bit(libc::SIGWINCH);

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found() {
        let process = Proc.thread(std::process::id()).unwrap();
        assert_eq!(process.tgid, std::process::id());
        assert_ne!(process.parent, 0);
        assert!(process.started <= since_boot());
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        assert_eq!(Proc.thread_group(tid), std::process::id());
        assert!(!Proc.is_interrupted(tid));
        assert!(Proc.is_interrupted(u32::MAX));
    }

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) R (b) S 1 7 7 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 1234 0 0";
        let ticks = rustix::param::clock_ticks_per_second();
        assert_eq!(started(stat), Some(Duration::from_millis(1_234_000 / ticks)));
        assert_eq!(started("7 (a"), None);
        assert_eq!(started("7 (a) R"), None);
    }

    #[test]
    fn blocked_signals_do_not_interrupt() {
        let status = |pending, shared, blocked| {
            format!("SigPnd:\t{pending}\nShdPnd:\t{shared}\nSigBlk:\t{blocked}\n")
        };
        assert!(!has_signal(&status("0", "0", "0")));
        assert!(has_signal(&status("0", "0000000000000100", "0")));
        assert!(!has_signal(&status("2", "0", "2")));
        assert!(has_signal(&status("2", "0", "1")));
        // SIGCHLD and SIGWINCH; with SIGTERM beside them.
        assert!(!has_signal(&status("10000", "8000000", "0")));
        assert!(has_signal(&status("10000", "4000", "0")));
        assert!(!has_signal("nonsense"));
    }
}
