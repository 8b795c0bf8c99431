//! What an owner knows of its instances.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebpf_loader::Counted;
use guest_wire::Status;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use uuid::Uuid;

use super::probes::Watch;
use super::{OwnerError, listen};
use crate::agent::socket_of;
use crate::fork::ForkReport;
use crate::proto::{Envelope, Event, Failure, Reply, Request};
use crate::sys::SysError;

/// Told every event, with the instance that it comes from.
pub type Listener = Box<dyn Fn(Uuid, &Event) + Send + Sync>;

/// An instance, as its owner knows it.
#[derive(Debug)]
pub struct Known {
    /// Its parent.
    pub parent: Option<Uuid>,
    /// Its process.
    pub pid: i32,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest RAM.
    pub memory_mib: u32,
    /// Whether its guest is Linux.
    pub linux: bool,
    /// When it called, in seconds since the epoch.
    pub created: u64,
    /// When it called, in nanoseconds of the monotonic clock.
    pub called_ns: u64,
    /// Results of programs by vCPU and sequence number.
    pub results: HashMap<(u32, u64), Vec<u64>>,
    /// Forks not yet taken.
    pub forks: VecDeque<ForkReport>,
    /// The last one.
    pub last_fork: Option<ForkReport>,
    /// Console output, the last [`CONSOLE`] bytes of it at most.
    pub console: Vec<u8>,
    /// Lines for the log.
    pub notes: Vec<String>,
    /// Stages of its forks; at its end its calls to KVM, too.
    pub counted: Counted,
    /// How long arming took.
    pub armed_us: Option<u64>,
    /// What it does, as long as it has not said that it ends. Only a guest with an agent is more than
    /// [`Status::Starting`].
    pub status: Status,
    /// Exit code and reason, once it has said so.
    pub exit: Option<(i32, Option<String>)>,
    /// Its connection is closed.
    pub gone: bool,
    pub(super) replies: HashMap<u64, Result<Reply, Failure>>,
    process: Option<OwnedFd>,
    connection: u64,
}

impl Known {
    /// One that has called a moment ago.
    pub(super) fn made(parent: Option<Uuid>, pid: i32, connection: u64) -> Self {
        Self {
            parent,
            pid,
            vcpus: 0,
            memory_mib: 0,
            linux: false,
            created: crate::sys::realtime_ns() / 1_000_000_000,
            called_ns: crate::sys::now_ns(),
            results: HashMap::new(),
            forks: VecDeque::new(),
            last_fork: None,
            console: Vec::new(),
            notes: Vec::new(),
            counted: Counted::new(),
            armed_us: None,
            status: Status::Starting,
            exit: None,
            gone: false,
            replies: HashMap::new(),
            process: None,
            connection,
        }
    }

    pub(super) fn ended(&self, uuid: Uuid) -> Option<OwnerError> {
        self.gone.then(|| {
            let (code, why) = self.exit.clone().unwrap_or((KILLED, None));
            OwnerError::Ended { uuid, code, why }
        })
    }

    pub(super) fn kill(&self) {
        if let Some(process) = &self.process {
            // ESRCH: it has ended by itself.
            rustix::process::pidfd_send_signal(process, Signal::KILL).unwrap_or(());
        }
    }
}

/// A connection, from the moment it is made.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Arc<OwnedFd>,
    /// The process at its other end.
    peer: i32,
    asked_for: bool,
    pub(super) uuid: Option<Uuid>,
    pub(super) exit: Option<(i32, Option<String>)>,
}

/// Behind the lock.
#[derive(Debug, Default)]
pub(super) struct State {
    connections: HashMap<u64, Connection>,
    instances: HashMap<Uuid, Known>,
    next: u64,
    next_request: u64,
    /// Children that were waited for in vain: who asked for them was told that they were not made.
    unwelcome: HashSet<Uuid>,
    /// In the order in which they ended, if only some are kept.
    ended: VecDeque<Uuid>,
    /// What was counted of instances that have ended, all together.
    pub(super) counted_of_ended: Counted,
    /// How often the listening thread has heard of [`Shared::settle`].
    settled: u64,
    pub(super) stopped: bool,
}

/// Shared by the owner and its listening thread.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pub(super) epoll: OwnedFd,
    /// An eventfd.
    pub(super) settling: OwnedFd,
    listener: Listener,
    memory: Memory,
    /// Where the sockets of its instances are.
    folder: PathBuf,
    pub(super) watch: Watch,
}

/// What an owner keeps of the events that it hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Everything, until it is taken or forgotten.
    Everything,
    /// What requests wait for, and the last instances that ended: its listener sees the rest.
    Little,
}

/// Exit code of a process that was killed.
pub(super) const KILLED: i32 = 137;
/// Console output that is kept of one instance: no guest fills its owner's memory.
pub const CONSOLE: usize = 32 << 20;
/// Ended instances that an owner with a little memory still knows.
const KEEP_ENDED: usize = 1024;
/// What is said when an instance is not listened to.
pub(super) const TURNED_AWAY: &str = "an instance was turned away and ends: no descriptor is left; \
    raise RLIMIT_NOFILE (`nofile` in /etc/security/limits.conf)";
/// Longest wait for the listening thread.
const SETTLE_TIME: Duration = Duration::from_secs(5);

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(
        listener: Listener,
        memory: Memory,
        folder: &Path,
    ) -> Result<Arc<Self>, SysError> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(SysError::new("epoll_create"))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let settling = eventfd(0, flags).map_err(SysError::new("eventfd"))?;
        let state = Mutex::new(State { next: 1, ..State::default() });
        let (changed, watch, folder) = (Condvar::new(), Watch::default(), folder.to_owned());
        Ok(Arc::new(Self { state, changed, epoll, settling, listener, memory, folder, watch }))
    }

    /// Returns when everything is heard that was said before the call.
    ///
    /// Two rounds: sockets become ready in the order in which they are looked at. The first one
    /// accepts who had called, the second one hears them out.
    pub(super) fn settle(&self) {
        for _ in 0..2 {
            let before = self.state().settled;
            rustix::io::write(&self.settling, &1_u64.to_ne_bytes()).unwrap_or(0);
            let heard = |state: &mut State| (state.settled > before).then_some(());
            // Out of time: whoever waits for an event then does so with a limit of its own.
            self.wait("listening thread", SETTLE_TIME, heard).unwrap_or(());
        }
    }

    pub(super) fn settled(&self) {
        rustix::io::read(&self.settling, &mut [0_u8; 8]).unwrap_or(0);
        self.state().settled += 1;
        self.changed.notify_all();
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever waits looks again.
    pub(super) fn wake(&self) {
        // Between its look and its sleep nobody is waiting: with the lock it is past that.
        drop(self.state());
        self.changed.notify_all();
    }

    /// Ends the listening thread.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        rustix::io::write(&self.settling, &1_u64.to_ne_bytes()).unwrap_or(0);
    }

    /// Listens to a connection from now on; at its other end is the process `root`, or whoever made it.
    /// What is known of a root stays when it is closed: somebody waits to hear whether it becomes an
    /// instance.
    pub(super) fn adopt(&self, socket: OwnedFd, root: Option<u32>) -> Result<u64, SysError> {
        let peer = if let Some(pid) = root {
            pid.cast_signed()
        } else {
            let peer = socket_peercred(&socket).map_err(SysError::new("SO_PEERCRED"))?;
            peer.pid.as_raw_nonzero().get()
        };
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(number), epoll::EventFlags::IN)
            .map_err(SysError::new("epoll_ctl"))?;
        let socket = Arc::new(socket);
        let asked_for = root.is_some();
        let connection = Connection { socket, peer, asked_for, uuid: None, exit: None };
        state.connections.insert(number, connection);
        Ok(number)
    }

    /// Sends a request and returns its number.
    pub(super) fn send(&self, uuid: Uuid, request: Request) -> Result<u64, OwnerError> {
        let (socket, id) = {
            let mut state = self.state();
            state.next_request += 1;
            let id = state.next_request;
            let known = state.instance(uuid)?;
            if let Some(error) = known.ended(uuid) {
                return Err(error);
            }
            let number = known.connection;
            let connection = state.connection(number).ok_or(OwnerError::Unknown(uuid))?;
            (connection.socket.clone(), id)
        };
        listen::send(&socket, &Envelope { id, request })?;
        Ok(id)
    }

    /// Waits until `f` gives something.
    pub(super) fn wait<R>(
        &self,
        what: &'static str,
        time: Duration,
        mut f: impl FnMut(&mut State) -> Option<R>,
    ) -> Result<R, OwnerError> {
        let begin = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(result) = f(&mut state) {
                return Ok(result);
            }
            let Some(left) = time.checked_sub(begin.elapsed()) else {
                return Err(OwnerError::Timeout { what, waited_ms: time.as_millis() });
            };
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes in what came over connection `number`. Returns whether it stays: an instance that cannot
    /// be ended when it has to be, or says that it is another one, is not listened to.
    pub(super) fn event(&self, number: u64, event: Event) -> bool {
        if let Event::Hello { pid, .. } | Event::Zygote { pid } = &event {
            self.watch.track_relative(pid.cast_unsigned());
        }
        let mut state = self.state();
        let from = match state.event(number, &event) {
            Ok(from) => from,
            Err(refused) => {
                drop(state);
                if matches!(refused, Refused::Full) {
                    self.note(TURNED_AWAY);
                }
                return false;
            }
        };
        if let Some(uuid) = from {
            drop(state);
            (self.listener)(uuid, &event);
            state = self.state();
            if let Some(known) = state.instances.get_mut(&uuid) {
                known.keep(event, self.memory);
            }
        }
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Something that concerns no instance that is known.
    pub(super) fn note(&self, text: &str) {
        (self.listener)(Uuid::nil(), &Event::Note { text: text.to_owned() });
    }

    /// The other end of connection `number` is gone. The listener hears of every end: an instance that
    /// was killed does not tell of its own.
    pub(super) fn closed(&self, number: u64) {
        let mut state = self.state();
        if let Some(uuid) = state.ends_untold(number) {
            drop(state);
            (self.listener)(uuid, &Event::Exited { code: KILLED, reason: None });
            state = self.state();
        }
        if let Some(connection) = state.connections.remove(&number) {
            // Without this the descriptor would stay in the set until its last copy is closed.
            epoll::delete(&self.epoll, &*connection.socket).unwrap_or(());
            if let Some(uuid) = connection.uuid {
                if state.instances.get(&uuid).is_some_and(|known| known.linux) {
                    // One that was killed leaves it behind.
                    std::fs::remove_file(socket_of(&self.folder, uuid)).unwrap_or(());
                }
                state.end(uuid, self.memory);
            } else if connection.asked_for {
                let exit = connection.exit.clone().or(Some((KILLED, None)));
                state.connections.insert(number, Connection { exit, ..connection });
            }
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl Shared {
    /// Nobody waits any more to hear what became of connection `number`.
    pub(super) fn closed_for_good(&self, number: u64) {
        if let Some(connection) = self.state().connections.remove(&number) {
            // It is in the set only if the other end is still there.
            epoll::delete(&self.epoll, &*connection.socket).unwrap_or(());
        }
    }
}

impl State {
    pub(super) fn connection(&mut self, number: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&number)
    }

    pub(super) fn instance(&mut self, uuid: Uuid) -> Result<&mut Known, OwnerError> {
        self.instances.get_mut(&uuid).ok_or(OwnerError::Unknown(uuid))
    }

    pub(super) fn maybe_instance(&mut self, uuid: Uuid) -> Option<&mut Known> {
        self.instances.get_mut(&uuid)
    }

    /// The instance that came over connection `number`, also after that was closed.
    pub(super) fn came_over(&self, number: u64) -> Option<Uuid> {
        let mut known = self.instances.iter();
        known.find(|(_, known)| known.connection == number).map(|(uuid, _)| *uuid)
    }

    /// The instance at the other end of connection `number`, if it has not said that it ends.
    fn ends_untold(&self, number: u64) -> Option<Uuid> {
        let connection = self.connections.get(&number)?;
        connection.uuid.filter(|_| connection.exit.is_none())
    }

    fn end(&mut self, uuid: Uuid, memory: Memory) {
        let Some(known) = self.instances.get_mut(&uuid) else { return };
        known.gone = true;
        // There is nothing left to be killed, and many more may end.
        known.process = None;
        ebpf_loader::merge(&mut self.counted_of_ended, &known.counted);
        // Whoever started a root asks how it ended, however many ended since.
        if memory == Memory::Little && known.parent.is_some() {
            self.ended.push_back(uuid);
            if self.ended.len() > KEEP_ENDED
                && let Some(oldest) = self.ended.pop_front()
            {
                self.instances.remove(&oldest);
            }
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (Uuid, &Known)> {
        self.instances.iter().map(|(uuid, known)| (*uuid, known))
    }

    pub(super) fn alive(&self) -> Vec<Uuid> {
        self.instances.iter().filter(|(_, known)| !known.gone).map(|(uuid, _)| *uuid).collect()
    }

    pub(super) fn forget(&mut self, uuid: Uuid) {
        if self.instances.get(&uuid).is_some_and(|known| known.gone) {
            self.instances.remove(&uuid);
        }
    }

    /// It is not listened to, and so ends, should it call after all.
    pub(super) fn unwelcome(&mut self, child: Uuid) {
        if !self.instances.contains_key(&child) {
            self.unwelcome.insert(child);
        }
    }

    pub(super) fn kill_all(&mut self) {
        for known in self.instances.values().filter(|known| !known.gone) {
            known.kill();
        }
    }

    pub(super) fn all_gone(&self) -> bool {
        self.instances.values().all(|known| known.gone)
    }

    /// The instance that `event` comes from, made known if it says hello.
    fn event(&mut self, number: u64, event: &Event) -> Result<Option<Uuid>, Refused> {
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(None) };
        match event {
            Event::Hello { uuid, parent, pid, vcpus, memory_mib, linux } => {
                let again = connection.uuid.is_some() || self.instances.contains_key(uuid);
                if again || *pid != connection.peer || self.unwelcome.remove(uuid) {
                    return Err(Refused::Untrue);
                }
                let process = Pid::from_raw(*pid).ok_or(Refused::Untrue)?;
                let process = match pidfd_open(process, PidfdFlags::empty()) {
                    Ok(process) => Some(process),
                    // It has ended already.
                    Err(Errno::SRCH) => None,
                    Err(Errno::MFILE | Errno::NFILE) => return Err(Refused::Full),
                    Err(_) => return Err(Refused::Untrue),
                };
                connection.uuid = Some(*uuid);
                let (vcpus, memory_mib, linux) = (*vcpus, *memory_mib, *linux);
                let made = Known::made(*parent, *pid, number);
                let known = Known { vcpus, memory_mib, linux, process, ..made };
                self.instances.insert(*uuid, known);
            }
            Event::Exited { code, reason } => connection.exit = Some((*code, reason.clone())),
            _ => {}
        }
        Ok(connection.uuid)
    }
}

/// An instance is not listened to.
#[derive(Debug)]
enum Refused {
    /// It is not what it says that it is.
    Untrue,
    /// It could not be ended: there is no descriptor left for its process.
    Full,
}

impl Known {
    fn keep(&mut self, event: Event, memory: Memory) {
        if let Event::Forked(report) = &event {
            self.last_fork = Some((**report).clone());
            report.count_stages(&mut self.counted);
        }
        match event {
            Event::Hello { .. } | Event::Zygote { .. } => {}
            Event::Forked(_) | Event::Done { .. } | Event::Console { .. } | Event::Note { .. }
                if memory == Memory::Little => {}
            Event::Reply { id, result } => {
                self.replies.insert(id, result);
            }
            Event::Forked(report) => self.forks.push_back(*report),
            Event::Armed { took_us } => self.armed_us = Some(took_us),
            Event::Done { vcpu, seq, results } => {
                self.results.insert((vcpu, seq), results);
            }
            Event::Console { bytes } => {
                self.console.extend(bytes);
                if self.console.len() > CONSOLE {
                    self.console.drain(..self.console.len() - CONSOLE / 2);
                }
            }
            Event::Note { text } => self.notes.push(text),
            Event::Calls { rows } => {
                ebpf_loader::merge(&mut self.counted, &ebpf_loader::counted(&rows));
            }
            Event::Exited { code, reason } => self.exit = Some((code, reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    fn hello(uuid: Uuid, pid: u32) -> Event {
        let pid = pid.cast_signed();
        Event::Hello { uuid, parent: None, pid, vcpus: 1, memory_mib: 1, linux: false }
    }

    /// Who says hello decides whom `kill` kills.
    #[test]
    fn an_instance_is_no_other_process_and_no_other_instance() {
        let shared = Shared::new(Box::new(|_, _| {}), Memory::Everything, Path::new("."))
            .expect("an owner's state");
        let own = std::process::id();
        let call =
            |pid| shared.adopt(sys::socket_pair().expect("sockets").0, pid).expect("it is open");
        let (first, second, root) = (call(None), call(None), call(Some(own)));
        let uuid = Uuid::new_v4();
        assert!(!shared.event(first, hello(uuid, own + 1)), "another process");
        assert!(shared.event(first, hello(uuid, own)));
        assert!(!shared.event(first, hello(Uuid::new_v4(), own)), "a second name");
        assert!(!shared.event(second, hello(uuid, own)), "another's name");
        assert!(!shared.event(root, hello(Uuid::new_v4(), 1)), "another process than was started");
        assert!(shared.event(root, hello(Uuid::new_v4(), own)));
        assert_eq!(shared.state().alive().len(), 2);
    }

    #[test]
    fn the_end_of_a_long_console_is_kept() {
        let mut known = Known::made(None, 1, 0);
        let line = |byte| Event::Console { bytes: vec![byte; CONSOLE / 4] };
        for byte in *b"abcdefg" {
            known.keep(line(byte), Memory::Everything);
            assert!(known.console.len() <= CONSOLE);
        }
        assert_eq!(known.console.last(), Some(&b'g'));
        assert!(known.console.len() >= CONSOLE / 2);
    }
}
