//! The workload's control group, frozen across forks if that is asked for.
//!
//! ```text
//!  freeze ──> doorbell ──┬──> parent: thaw, reply
//!                        └──> child:  renew, thaw, reply
//! ```
//!
//! Nothing of the group executes an instruction of its own in a child before that is another
//! machine. Who asked for the fork waits for its answer anyway; all others are told to stop before
//! the doorbell is rung, and stop when they would next go back to user mode: at once if they do not
//! run, and with the interrupt that the kernel sends them if they run on another processor. What
//! the kernel was doing for them goes on.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// The control group.
#[derive(Clone, Debug)]
pub struct Freezer {
    freeze: Arc<File>,
    processes: Arc<File>,
}

impl Freezer {
    /// Makes the group `workload` in the control groups mounted at `root`.
    ///
    /// # Errors
    ///
    /// There are no control groups of version 2, or this is not root.
    pub fn new(root: &Path) -> io::Result<Self> {
        let group = root.join("workload");
        if let Err(error) = fs::create_dir(&group)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        let open = |file| OpenOptions::new().write(true).open(group.join(file)).map(Arc::new);
        Ok(Self { freeze: open("cgroup.freeze")?, processes: open("cgroup.procs")? })
    }

    /// What a process writes `0` to, to join.
    #[must_use]
    pub fn processes(&self) -> Arc<File> {
        self.processes.clone()
    }

    /// Tells all to stop.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn freeze(&self) -> io::Result<()> {
        self.freeze.write_all_at(b"1", 0)
    }

    /// Lets all go on.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn thaw(&self) -> io::Result<()> {
        self.freeze.write_all_at(b"0", 0)
    }
}
