//! The thread that forks.
//!
//! ```text
//!  request ──> announce ──> who asks? ──> doorbell ──┬──> parent: record, reply
//!                                                    ├──> failed: EIO
//!                                                    └──> child: renew, answer the parent's
//!                                                         requests, pass the barrier, reply
//! ```
//!
//! It is the only thread that rings the doorbell's fork port, and both machines go on in it. In the
//! child the reply is the last thing: who wrote runs only when the machine is another one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::console::{chain, say};
use crate::doorbell::{Doorbell, Identity, Outcome};
use crate::freezer::Freezer;
use crate::fs::{ForkRequest, Service};
use crate::haste::before_others;
use crate::processes::Proc;
use crate::renew::Renew;

/// How long a standby may wait for the doorbell once it was announced: twice what finding out who
/// asks takes.
const ANNOUNCE_US: u32 = 200;

/// What the thread works with.
pub struct Forker {
    /// Has the requests.
    pub service: Arc<Service>,
    /// Forks.
    pub doorbell: Arc<dyn Doorbell>,
    /// Makes a child another machine.
    pub renew: Arc<dyn Renew>,
    /// Freezes the workload meanwhile.
    pub freezer: Option<Freezer>,
    /// Called if this machine could not be made unique: it has to be stopped.
    pub fatal: Box<dyn Fn() + Send>,
}

impl Forker {
    /// Starts it; the file system must be mounted at `mounted`.
    ///
    /// # Errors
    ///
    /// There is no thread for it.
    pub fn start(self, mounted: &Path) -> io::Result<std::thread::JoinHandle<()>> {
        let mut thread = Thread { with: self, path: mounted.join("fork"), barrier: None };
        std::thread::Builder::new().name("ukp-fork".into()).spawn(move || thread.run())
    }
}

struct Thread {
    with: Forker,
    /// What is opened as the barrier.
    path: PathBuf,
    barrier: Option<File>,
}

impl Thread {
    fn run(&mut self) {
        // The fewer others run in a child before it is another machine, the better; where there is
        // one processor none do. It is done without, if it has to.
        if let Err(error) = before_others() {
            say(format_args!("forks have no priority: {error}"));
        }
        self.raise_barrier();
        while let Some(request) = self.with.service.next_fork() {
            self.fork(request);
            if self.barrier.is_none() {
                self.raise_barrier();
            }
        }
    }

    /// Opens a file. Closing it sends a request to our own file system without waiting for it
    /// (`fuse_release`), behind all those that were sent before.
    fn raise_barrier(&mut self) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        self.with.service.expect_barrier(tid);
        match File::open(&self.path) {
            Ok(file) => self.barrier = Some(file),
            Err(error) => say(format_args!("cannot open {}: {error}", self.path.display())),
        }
    }

    fn fork(&mut self, request: ForkRequest) {
        // While a standby wakes up there is time to find out who asks. Its failure is told by the
        // fork, if that fails too.
        drop(self.with.doorbell.announce(ANNOUNCE_US));
        let tgid = Proc.thread_group(request.tid);
        if self.barrier.is_none() {
            // What its parent's programs have asked for, a child would do once more.
            say("fork failed: without the file that a child closes first");
            return self.with.service.fork_failed(request);
        }
        if let Some(Err(error)) = self.with.freezer.as_ref().map(Freezer::freeze) {
            say(format_args!("fork failed: the workload cannot be frozen: {error}"));
            return self.with.service.fork_failed(request);
        }
        let rung = Instant::now();
        let outcome = self.with.doorbell.fork().map(|words| Outcome::of(&words));
        let took = rung.elapsed();
        // A child goes on when it is another machine.
        if !matches!(outcome, Ok(Outcome::Child(_))) {
            self.thaw();
        }
        match outcome {
            Ok(Outcome::Child(identity)) => self.become_child(request, tgid, &identity),
            Ok(Outcome::Parent { child, own }) => {
                self.with.service.welcomed(own);
                self.with.service.forked(request, tgid, child, took);
            }
            Ok(Outcome::Failed { errno, step }) => {
                let error = io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(0));
                say(format_args!("fork failed in step {step} of the host: {error}"));
                self.with.service.fork_failed(request);
            }
            Err(error) => {
                say(format_args!("fork failed: the doorbell cannot be rung: {error}"));
                self.with.service.fork_failed(request);
            }
        }
    }

    fn thaw(&self) {
        // The workload would stand still for good, and nothing can be done about it here.
        if let Some(Err(error)) = self.with.freezer.as_ref().map(Freezer::thaw) {
            say(format_args!("the workload cannot be thawed: {error}"));
        }
    }

    fn become_child(&mut self, request: ForkRequest, tgid: u32, identity: &Identity) {
        let born = Instant::now();
        if let Err(error) = self.with.renew.renew(identity) {
            say(chain(&error));
            (self.with.fatal)();
            return request.fail(fuser::Errno::EIO);
        }
        let renewed = born.elapsed();
        let forker = (request.tid, tgid);
        self.with.service.became_child(identity.uuid, identity.generation, forker);
        self.barrier = None;
        self.thaw();
        self.with.service.born(born.elapsed(), renewed);
        request.succeed();
    }
}
