//! Processes that the agent starts, and their ends.
//!
//! As PID 1 the agent has to reap every process that nobody else does. One thread does that for all;
//! whoever started a process is told its exit code. It holds the table while it reaps, and so does
//! who starts a process: the standard library itself waits for one that could not be executed.

use std::collections::BTreeMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process_group, wait, waitid,
    waitpid,
};

use crate::sync::{lock, wait as wait_for};

/// Told the exit code: 128+n for signal n.
pub type Ended = Box<dyn FnOnce(i32) + Send>;

/// The table of processes.
#[derive(Default)]
pub struct Reaper {
    running: Mutex<BTreeMap<u32, Ended>>,
    started: Condvar,
    /// Nobody calls [`Reaper::reap`], so each process has a thread that waits for it.
    each: bool,
}

impl Reaper {
    /// For PID 1, which calls [`Reaper::reap`].
    #[must_use]
    pub fn of_init() -> Arc<Self> {
        Arc::default()
    }

    /// For any other process: children that it did not start by this are left alone.
    #[must_use]
    pub fn of_process() -> Arc<Self> {
        Arc::new(Self { each: true, ..Self::default() })
    }

    /// Starts a process. `ended` is called once, by another thread.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn spawn(
        self: &Arc<Self>,
        command: &mut Command,
        ended: Ended,
    ) -> io::Result<std::process::Child> {
        let mut running = lock(&self.running);
        let child = command.spawn()?;
        running.insert(child.id(), ended);
        self.started.notify_all();
        drop(running);
        if self.each {
            let (reaper, pid) = (self.clone(), child.id());
            std::thread::Builder::new().spawn(move || reaper.reap_one(pid))?;
        }
        Ok(child)
    }

    /// Sends a signal to the process group of a process that was started by this. One that has ended
    /// is left alone: its number may be another's.
    pub fn signal(&self, pid: u32, signal: Signal) {
        let running = lock(&self.running);
        if running.contains_key(&pid)
            && let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        {
            // Its group may be gone while it is a zombie.
            kill_process_group(pid, signal).unwrap_or_default();
        }
    }

    /// Reaps, forever.
    pub fn reap(&self) -> ! {
        loop {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match waitid(WaitId::All, options) {
                Ok(_) => {}
                Err(Errno::CHILD) => {
                    let running = lock(&self.running);
                    if running.is_empty() {
                        drop(wait_for(&self.started, running, None));
                    }
                    continue;
                }
                Err(_) => continue,
            }
            let mut running = lock(&self.running);
            let mut ends = Vec::new();
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                let ended = running.remove(&pid.as_raw_nonzero().get().unsigned_abs());
                ends.extend(ended.map(|ended| (ended, code(status))));
            }
            drop(running);
            for (ended, code) in ends {
                ended(code);
            }
        }
    }

    fn reap_one(&self, pid: u32) {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
        // As long as it is not reaped its number is its own, so signals may be sent meanwhile.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while waitid(WaitId::Pid(raw), options).is_err_and(|errno| errno == Errno::INTR) {}
        let mut running = lock(&self.running);
        let status = waitpid(Some(raw), WaitOptions::NOHANG).ok().flatten();
        let ended = running.remove(&pid);
        drop(running);
        if let (Some(ended), Some((_, status))) = (ended, status) {
            ended(code(status));
        }
    }
}

/// Exit code as shells have it.
fn code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn codes_and_signals() {
        let reaper = Reaper::of_process();
        for (script, expected) in [("exit 3", 3), ("kill -9 $$", 137), ("true", 0)] {
            let (sender, codes) = channel();
            let ended = Box::new(move |code| sender.send(code).unwrap());
            let mut command = Command::new("/bin/sh");
            drop(reaper.spawn(command.args(["-c", script]), ended).unwrap());
            assert_eq!(codes.recv_timeout(Duration::from_secs(10)), Ok(expected), "{script}");
        }
        reaper.signal(1, Signal::KILL);
        assert!(lock(&reaper.running).is_empty());
    }
}
