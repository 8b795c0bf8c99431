//! The process that runs a tree of instances: starts roots, hears from every child, and asks them
//! for things.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use runtime::owner::Owner;
//! use runtime::proto::InstanceConfig;
//!
//! runtime::owner::instance_if_asked(); // first line of main: instances are this same program
//! let owner = Owner::new()?;
//! let root = owner.start(InstanceConfig::default())?;
//! let children = owner.branch(root, 2)?;
//! assert_eq!(children.len(), 2);
//! # Ok(())
//! # }
//! ```
//!
//! When the owner goes, its instances end.

mod agents;
mod error;
mod folder;
mod listen;
mod measured;
mod probes;
mod root;
mod state;

use std::io::PipeReader;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest_wire::Status;
use uuid::Uuid;

pub use crate::program::play_part as instance_if_asked;
use agents::Agents;
pub use error::OwnerError;
use folder::Folder;
pub use folder::folders;
use root::Root;
pub use state::{CONSOLE, Known, Listener};
use state::{Memory, Shared};

use crate::agent::{Agent, AgentError};
use crate::fork::ForkReport;
use crate::proto::{Envelope, InstanceConfig, Reply, Request, WireStep};
use crate::sys::{self, SysError};

/// How long killed instances may take to be gone.
const GOODBYE: Duration = Duration::from_secs(10);
/// How soon a child calls that lives, on the busiest host.
const CALLS: Duration = Duration::from_secs(20);
/// How long a request may take unless said otherwise.
const PATIENCE: Duration = Duration::from_secs(90);
/// Bytes that are typed with one request.
const TYPED: usize = 16 * 1024;

/// Runs instances.
#[derive(Debug)]
pub struct Owner {
    shared: Arc<Shared>,
    folder: Folder,
    roots: Mutex<Vec<Root>>,
    /// Answers guests that have an agent, from the first one on.
    agents: Mutex<Option<Agents>>,
}

impl Owner {
    /// An owner without instances.
    ///
    /// # Errors
    ///
    /// If its socket cannot be made.
    pub fn new() -> Result<Self, SysError> {
        Self::with_listener(Box::new(|_, _| {}))
    }

    /// An owner that tells `listener` every event, on its own thread.
    ///
    /// # Errors
    ///
    /// If its socket cannot be made.
    pub fn with_listener(listener: Listener) -> Result<Self, SysError> {
        Self::make(listener, Memory::Everything)
    }

    /// An owner that tells `listener` every event, and itself keeps neither console output nor
    /// notes, reports and results, and only the last instances that ended: it may run for years.
    ///
    /// # Errors
    ///
    /// If its socket cannot be made.
    pub fn forwarding(listener: Listener) -> Result<Self, SysError> {
        Self::make(listener, Memory::Little)
    }

    fn make(listener: Listener, memory: Memory) -> Result<Self, SysError> {
        let folder = Folder::new()?;
        let socket = listen::socket(&folder.path().join("owner"))?;
        let shared = Shared::new(listener, memory, folder.path())?;
        listen::start(&shared, socket)?;
        Ok(Self { shared, folder, roots: Mutex::default(), agents: Mutex::default() })
    }

    /// The folder of its sockets, see [`folders`]. It goes with the owner.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a root instance and returns when it runs.
    ///
    /// # Errors
    ///
    /// Why it could not be started.
    pub fn start(&self, mut config: InstanceConfig) -> Result<Uuid, OwnerError> {
        config.owner = self.folder.path().join("owner");
        if config.is_linux() {
            self.answer_agents()?;
            if config.vsock.as_os_str().is_empty() {
                self.folder.path().clone_into(&mut config.vsock);
            }
        }
        let (ours, theirs) = sys::socket_pair()?;
        let root = Root::spawn(&theirs)?;
        let pid = root.pid();
        drop(theirs);
        // If it does not come that far, its connection tells.
        if listen::is_ready(&ours, PATIENCE) {
            // Before it forks anything: it waits for its configuration.
            self.shared.watch.track(pid);
        }
        let mut roots = self.roots();
        // Those of which nothing is left need no place.
        roots.retain_mut(|root| !root.is_over());
        roots.push(root);
        drop(roots);
        let request = Envelope { id: 0, request: Request::Start(Box::new(config)) };
        listen::send(&ours, &request)?;
        let number = self.shared.adopt(ours, Some(pid))?;
        let uuid = self.shared.wait("start of the instance", PATIENCE, |state| {
            // A short program may have ended, and its connection be closed.
            if let Some(uuid) = state.came_over(number) {
                return Some(Ok(uuid));
            }
            match state.connection(number) {
                Some(connection) => connection
                    .exit
                    .clone()
                    .map(|(code, why)| Err(OwnerError::Ended { uuid: Uuid::nil(), code, why })),
                None => Some(Err(OwnerError::Unknown(Uuid::nil()))),
            }
        });
        let uuid = uuid.flatten().inspect_err(|_| self.shared.closed_for_good(number))?;
        if let Some(root) = self.roots().iter_mut().find(|root| root.pid() == pid) {
            root.uuid = Some(uuid);
        }
        Ok(uuid)
    }

    fn answer_agents(&self) -> Result<(), SysError> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if agents.is_none() {
            *agents = Some(Agents::start(&self.shared, self.folder.path())?);
        }
        Ok(())
    }

    fn roots(&self) -> MutexGuard<'_, Vec<Root>> {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A descriptor that hangs up when the last process of a root's tree is gone: instances,
    /// standbys, zygotes.
    #[must_use]
    pub fn lifeline(&self, root: Uuid) -> Option<Arc<PipeReader>> {
        let roots = self.roots();
        roots.iter().find(|known| known.uuid == Some(root)).map(|known| known.lifeline.clone())
    }

    /// Returns when everything is heard that instances said before the call.
    pub fn settle(&self) {
        self.shared.settle();
    }

    /// Asks an instance for something.
    ///
    /// # Errors
    ///
    /// Its refusal, or that it is gone.
    pub fn ask(&self, uuid: Uuid, request: Request) -> Result<Reply, OwnerError> {
        let id = self.shared.send(uuid, request)?;
        self.shared.wait("answer", PATIENCE, |state| {
            let known = match state.instance(uuid) {
                Ok(known) => known,
                Err(error) => return Some(Err(error)),
            };
            if let Some(result) = known.replies.remove(&id) {
                return Some(result.map_err(OwnerError::Refused));
            }
            known.ended(uuid).map(Err)
        })?
    }

    /// Forks an instance from the host's side, all children or none.
    ///
    /// A Linux guest forks itself, by its agent, one child after the other: its kernel would give the
    /// same random bytes in a child that nobody has told what it is.
    ///
    /// # Errors
    ///
    /// The step that failed ([`OwnerError::fork_failure`]), what the agent says, or that there is none.
    pub fn branch(&self, uuid: Uuid, children: u32) -> Result<Vec<Uuid>, OwnerError> {
        let (linux, ended) = self.with(uuid, |known| (known.linux, known.ended(uuid)))?;
        if let Some(ended) = ended {
            return Err(ended);
        }
        if !linux {
            return self.branch_unaware(uuid, children);
        }
        let mut made = Vec::new();
        for _ in 0..children {
            let child = match Agent::connect(self.folder.path(), uuid) {
                // Its socket may have been taken away.
                Err(AgentError::NoAgent | AgentError::NoSocket { .. }) => Err(OwnerError::Unaware),
                Err(error) => Err(error.into()),
                Ok(agent) => agent.fork().map_err(OwnerError::from),
            };
            match child.and_then(|child| self.called(child, uuid, PATIENCE)) {
                Ok(child) => made.push(child),
                Err(error) => {
                    self.kill_all(&made);
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    /// Waits for a child of `parent`, which is what a guest says that it is. One that is late is killed.
    fn called(&self, child: Uuid, parent: Uuid, time: Duration) -> Result<Uuid, OwnerError> {
        self.wait_for(child, time).inspect_err(|_| self.shared.state().unwelcome(child))?;
        let known = self.with(child, |known| known.parent)?;
        if known == Some(parent) { Ok(child) } else { Err(OwnerError::Unknown(child)) }
    }

    fn kill_all(&self, instances: &[Uuid]) {
        for instance in instances {
            // It may have ended by itself.
            self.kill(*instance).unwrap_or(());
        }
    }

    /// As [`Owner::branch`], but nobody in the guest is asked or told: a Linux child has its parent's
    /// random numbers, names and connections.
    ///
    /// # Errors
    ///
    /// The step that failed, or that a child has not called: then all of them are killed.
    pub fn branch_unaware(&self, uuid: Uuid, children: u32) -> Result<Vec<Uuid>, OwnerError> {
        let Reply::Forked { children } = self.ask(uuid, Request::Branch { children })? else {
            return Ok(Vec::new());
        };
        for child in &children {
            // Whoever hears of it asks for it next. One that was killed meanwhile never calls, nor one
            // that this process has no descriptor for.
            if let Err(error) = self.called(*child, uuid, CALLS) {
                self.kill_all(&children);
                return Err(error);
            }
        }
        Ok(children)
    }

    /// Types on the console of a Linux guest (`/dev/hvc0`); returns how many of the bytes there was
    /// room for. The rest can be typed when the guest has read something.
    ///
    /// # Errors
    ///
    /// That it has none, or is gone.
    pub fn type_in(&self, uuid: Uuid, bytes: &[u8]) -> Result<usize, OwnerError> {
        let bytes = bytes.get(..TYPED).unwrap_or(bytes);
        match self.ask(uuid, Request::Type { bytes: bytes.to_vec() })? {
            Reply::Typed { count } => Ok(count.min(bytes.len())),
            _ => Ok(0),
        }
    }

    /// Starts a program on a vCPU of a bare guest; returns its sequence number.
    ///
    /// # Errors
    ///
    /// Its refusal.
    pub fn program(&self, uuid: Uuid, vcpu: u32, steps: &[WireStep]) -> Result<u64, OwnerError> {
        match self.ask(uuid, Request::Program { vcpu, steps: steps.to_vec() })? {
            Reply::Started { seq } => Ok(seq),
            _ => Ok(0),
        }
    }

    /// Results of a program that was started in this instance or, before it was forked, in its
    /// parent.
    ///
    /// # Errors
    ///
    /// That the instance ended, or took too long.
    pub fn results(
        &self,
        uuid: Uuid,
        vcpu: u32,
        seq: u64,
        time: Duration,
    ) -> Result<Vec<u64>, OwnerError> {
        self.shared.wait("results of a program", time, |state| {
            let known = state.maybe_instance(uuid)?;
            if let Some(results) = known.results.remove(&(vcpu, seq)) {
                return Some(Ok(results));
            }
            known.ended(uuid).map(Err)
        })?
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    ///
    /// As [`Owner::program`] and [`Owner::results`].
    pub fn run(&self, uuid: Uuid, steps: &[WireStep]) -> Result<Vec<u64>, OwnerError> {
        let seq = self.program(uuid, 0, steps)?;
        self.results(uuid, 0, seq, PATIENCE)
    }

    /// The next report of a fork that was not taken yet.
    ///
    /// # Errors
    ///
    /// That the instance ended, or took too long.
    pub fn next_fork(&self, uuid: Uuid, time: Duration) -> Result<ForkReport, OwnerError> {
        self.shared.wait("report of a fork", time, |state| {
            let known = match state.instance(uuid) {
                Ok(known) => known,
                Err(error) => return Some(Err(error)),
            };
            if let Some(report) = known.forks.pop_front() {
                return Some(Ok(report));
            }
            known.ended(uuid).map(Err)
        })?
    }

    /// Waits until an instance has called.
    ///
    /// # Errors
    ///
    /// That it did not in time.
    pub fn wait_for(&self, uuid: Uuid, time: Duration) -> Result<(), OwnerError> {
        self.shared.wait("call of a child", time, |state| state.maybe_instance(uuid).map(|_| ()))
    }

    /// Waits until an instance has ended; its exit code, 137 if it was killed.
    ///
    /// # Errors
    ///
    /// That it did not in time.
    pub fn wait_exit(
        &self,
        uuid: Uuid,
        time: Duration,
    ) -> Result<(i32, Option<String>), OwnerError> {
        self.shared.wait("end of an instance", time, |state| match state.instance(uuid) {
            Ok(known) => known.gone.then(|| Ok(known.exit.clone().unwrap_or((137, None)))),
            Err(error) => Some(Err(error)),
        })?
    }

    /// Ends an instance at once.
    ///
    /// # Errors
    ///
    /// That there is none.
    pub fn kill(&self, uuid: Uuid) -> Result<(), OwnerError> {
        let mut state = self.shared.state();
        state.instance(uuid)?.kill();
        Ok(())
    }

    /// Has a guest with an agent end by itself: its workload gets SIGTERM and may finish what it is
    /// at. Meanwhile its parent sees it as [`Status::Draining`]. Returns whether it has ended.
    ///
    /// # Errors
    ///
    /// That there is no such instance, or no agent in it.
    pub fn drain(&self, uuid: Uuid, time: Duration) -> Result<bool, OwnerError> {
        if let Some(ended) = self.with(uuid, |known| known.ended(uuid))? {
            return Err(ended);
        }
        let agent = Agent::connect(self.folder.path(), uuid)?;
        let before =
            self.with(uuid, |known| std::mem::replace(&mut known.status, Status::Draining))?;
        if let Err(error) = agent.terminate() {
            self.with(uuid, |known| known.status = before)?;
            return Err(error.into());
        }
        match self.wait_exit(uuid, time) {
            Ok(_) => Ok(true),
            Err(OwnerError::Timeout { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets an instance that has ended.
    pub fn forget(&self, uuid: Uuid) {
        self.shared.state().forget(uuid);
    }

    /// What is known of an instance.
    ///
    /// # Errors
    ///
    /// That there is none.
    pub fn with<R>(&self, uuid: Uuid, f: impl FnOnce(&mut Known) -> R) -> Result<R, OwnerError> {
        self.shared.state().instance(uuid).map(f)
    }

    /// What `f` makes of every instance that is known, also of those that have ended.
    pub fn each<R>(&self, mut f: impl FnMut(Uuid, &Known) -> R) -> Vec<R> {
        self.shared.state().all().map(|(uuid, known)| f(uuid, known)).collect()
    }

    /// All instances that run.
    #[must_use]
    pub fn alive(&self) -> Vec<Uuid> {
        self.shared.state().alive()
    }

    /// Waits until `f` gives something; it is asked again whenever anything happens.
    ///
    /// # Errors
    ///
    /// That it did not in time.
    pub fn wait_until<R>(
        &self,
        what: &'static str,
        time: Duration,
        mut f: impl FnMut(&[Uuid]) -> Option<R>,
    ) -> Result<R, OwnerError> {
        self.shared.wait(what, time, |state| f(&state.alive()))
    }
}

impl Owner {
    /// Ends every instance at once and waits until no process of theirs is left.
    pub fn shutdown(&self) {
        let end = Instant::now() + GOODBYE;
        // One that never called is known by its process alone.
        self.roots().iter_mut().filter(|root| root.uuid.is_none()).for_each(Root::kill);
        loop {
            // Again and again: a child that is just being born calls later.
            self.shared.state().kill_all();
            let gone = self.shared.state().all_gone() && self.roots().iter().all(Root::is_gone);
            if gone || Instant::now() > end {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shutdown();
        self.roots().iter_mut().for_each(Root::reap);
        self.shared.stop();
    }
}
