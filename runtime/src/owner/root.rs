//! The process of a root instance.

use std::io::PipeReader;
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uuid::Uuid;

use crate::program::{self, Part};
use crate::sys::SysError;

/// A root instance that was started.
#[derive(Debug)]
pub(super) struct Root {
    process: Child,
    /// Once it has called.
    pub(super) uuid: Option<Uuid>,
    /// Hangs up when the last process of its tree is gone.
    pub(super) lifeline: Arc<PipeReader>,
}

impl Root {
    /// Starts this program as an instance whose connection is `line`.
    ///
    /// Its standard input is the writing end of a pipe, and so is that of every process forked from
    /// it: the pipe hangs up when the last one is gone. Nobody writes to it.
    pub(super) fn spawn(line: &OwnedFd) -> Result<Self, SysError> {
        let failed = |source| SysError { call: "starting an instance", source };
        let (lifeline, theirs) = std::io::pipe().map_err(failed)?;
        let process = program::spawn(Part::Instance, line, Stdio::from(theirs))?;
        Ok(Self { process, uuid: None, lifeline: Arc::new(lifeline) })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Whether no process of its tree is left.
    pub(super) fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&*self.lifeline, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// The same, and its exit status is taken.
    pub(super) fn is_over(&mut self) -> bool {
        self.is_gone() && self.process.try_wait().is_ok_and(|status| status.is_some())
    }

    pub(super) fn kill(&mut self) {
        // An error means that it has ended and was reaped.
        drop(self.process.kill());
    }

    /// Kills it and takes its exit status.
    pub(super) fn reap(&mut self) {
        self.kill();
        drop(self.process.wait());
    }
}
