//! A door for the fuzz targets: the file system over any descriptor that keeps message borders, and
//! forks that no thread makes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{Session, SessionACL};
use uuid::Uuid;

use super::{Libukp, Service};

/// What became of a fork.
#[derive(Clone, Copy, Debug)]
pub enum Came {
    /// This is the parent.
    Parent(Uuid),
    /// This is the child.
    Child(Uuid, u64),
    /// There was none.
    Failed,
}

/// Answers what is read from `kernel`, until that ends.
///
/// # Errors
///
/// What ended it.
pub fn serve(service: Arc<Service>, kernel: OwnedFd) -> io::Result<()> {
    let files = Libukp { service, started: SystemTime::UNIX_EPOCH };
    Session::from_fd(files, kernel, SessionACL::All, super::config())?.run()
}

/// Ends the fork that waits for longest, and tells whether there was one.
pub fn fork(service: &Service, came: Came) -> bool {
    let Some(request) = service.lock().machine.queue.take() else { return false };
    match came {
        Came::Parent(child) => {
            let tgid = request.tid;
            service.forked(request, tgid, child, Duration::ZERO);
        }
        Came::Child(own, generation) => {
            service.became_child(own, generation, (request.tid, request.tid));
            request.succeed();
        }
        Came::Failed => service.fork_failed(request),
    }
    true
}

/// The next file that this thread opens is the barrier.
pub fn expect_barrier(service: &Service, tid: u32) {
    service.expect_barrier(tid);
}
