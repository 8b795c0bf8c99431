//! What the file system, the fork thread, the housekeeper and the host's answers share.
//!
//! ```text
//!  kernel ──> reader thread (never waits) ──> queue ──> fork thread ──> doorbell
//!                    │ questions                            │
//!                    v                                      v replies
//!                  host ──> answers ──> replies      housekeeper: time limits, signals
//! ```
//!
//! Requests are read by one thread, because only so their order is known (see [`crate::state`],
//! the barrier). Therefore no handler may wait: what takes time is kept here, with its reply.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Duration;

use fuser::{Errno, PollNotifier, ReplyData, ReplyWrite};
use guest_wire::{ChildInfo, Status};
use uuid::Uuid;

use super::handle::Handles;
use super::node::{ChildFile, status_text};
use crate::host::{Host, HostError};
use crate::processes::{Proc, since_boot};
use crate::state::{Constants, Machine, Refused};
use crate::stats::Stats;
use crate::sync::{lock, wait};

/// How long the host may take to tell about a child.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// For so long after a fork the host may not know the child yet, and is asked again now and then.
const AMNESTY: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(100);
/// How often it is looked whether somebody who waits has got a signal.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(200);

/// A write to `fork`.
pub(crate) struct ForkRequest {
    pub(crate) tid: u32,
    len_bytes: u32,
    reply: ReplyWrite,
}

impl ForkRequest {
    pub(crate) fn succeed(self) {
        self.reply.written(self.len_bytes);
    }

    pub(crate) fn fail(self, errno: Errno) {
        self.reply.error(errno);
    }
}

/// A write to `wait`.
struct Waiter {
    child: u32,
    tid: u32,
    len_bytes: u32,
    reply: ReplyWrite,
}

/// A read of something that only the host knows.
struct Asked {
    child: u32,
    file: ChildFile,
    handle: u64,
    limit: Duration,
    size: u32,
    reply: ReplyData,
}

/// A question that the host is to be asked, or asked again.
#[derive(Clone, Copy)]
enum Again {
    /// For the end of this child.
    Wait(u32),
    /// For the read with this number.
    Read(u64),
}

/// Behind the lock.
pub(super) struct Inner {
    pub(super) machine: Machine<ForkRequest>,
    pub(super) handles: Handles,
    pub(super) serial: u32,
    /// The thread whose open file is the barrier, and that file.
    barrier_tid: Option<u32>,
    barrier: Option<u64>,
    /// The barrier that is on its way.
    passing: Option<u64>,
    waiters: Vec<Waiter>,
    polls: BTreeMap<u64, (u32, PollNotifier)>,
    asked: BTreeMap<u64, Asked>,
    next_asked: u64,
    again: Vec<(Duration, Again)>,
    pub(crate) stats: Stats,
    closed: bool,
}

/// Shared by all threads of the agent.
pub struct Service {
    inner: Mutex<Inner>,
    /// A fork request waits.
    work: Condvar,
    /// There is something to look after.
    tick: Condvar,
    host: Mutex<Option<Arc<dyn Host>>>,
    this: Weak<Self>,
}

impl Service {
    /// With room for `queue` forks that wait; children that have stopped stay for `retention`.
    #[must_use]
    pub fn new(queue: usize, retention: Duration) -> Arc<Self> {
        let inner = Inner {
            machine: Machine::new(queue, retention),
            handles: Handles::default(),
            serial: 0,
            barrier_tid: None,
            barrier: None,
            passing: None,
            waiters: Vec::new(),
            polls: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_asked: 0,
            again: Vec::new(),
            stats: Stats::default(),
            closed: false,
        };
        Arc::new_cyclic(|this| Self {
            inner: Mutex::new(inner),
            work: Condvar::new(),
            tick: Condvar::new(),
            host: Mutex::default(),
            this: this.clone(),
        })
    }

    /// Whom to ask about children.
    pub fn set_host(&self, host: Arc<dyn Host>) {
        *lock(&self.host) = Some(host);
    }

    /// The host says who this instance is. Returns whether that agrees with what is known.
    pub fn welcomed(&self, uuid: Uuid) -> bool {
        self.lock().machine.welcomed(uuid)
    }

    /// UUID and generation of this instance.
    #[must_use]
    pub fn identity(&self) -> (Uuid, u64) {
        let inner = self.lock();
        (inner.machine.own(), inner.machine.generation())
    }

    /// Counts and times.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let inner = self.lock();
        Stats {
            uuid: inner.machine.own(),
            generation: inner.machine.generation(),
            queued: inner.machine.queue.waiting(),
            children: inner.machine.children.iter().count(),
            ..inner.stats.clone()
        }
    }

    /// Ends fork thread and housekeeper. Requests that wait fail with `EIO`.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.waiters.clear();
        inner.asked.clear();
        inner.polls.clear();
        self.work.notify_all();
        self.tick.notify_all();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    fn host(&self) -> Option<Arc<dyn Host>> {
        lock(&self.host).clone()
    }

    /// A write to `fork`.
    pub(super) fn submit(&self, tid: u32, len_bytes: u32, reply: ReplyWrite) {
        let mut inner = self.lock();
        match inner.machine.queue.submit(ForkRequest { tid, len_bytes, reply }) {
            Ok(()) => self.work.notify_one(),
            Err((request, refused)) => {
                drop(inner);
                request.fail(match refused {
                    Refused::Full => Errno::EBUSY,
                    Refused::OfParent => Errno::EIO,
                });
            }
        }
    }

    /// The next fork request, when there is one. `None` when the agent ends.
    pub(crate) fn next_fork(&self) -> Option<ForkRequest> {
        let mut inner = self.lock();
        loop {
            if inner.closed {
                return None;
            }
            if let Some(request) = inner.machine.queue.take() {
                return Some(request);
            }
            inner = wait(&self.work, inner, None);
        }
    }

    /// The next file that this thread opens is the barrier.
    pub(crate) fn expect_barrier(&self, tid: u32) {
        self.lock().barrier_tid = Some(tid);
    }

    /// The fork gave `child`, and this is the parent.
    pub(crate) fn forked(&self, request: ForkRequest, tgid: u32, child: Uuid, took: Duration) {
        let mut inner = self.lock();
        let number = inner.machine.forked(request.tid, tgid, since_boot(), child);
        inner.stats.forks += 1;
        inner.stats.last_fork_us = Some(micros(took));
        // By the housekeeper: this thread has priority, and who forked wants to go on.
        inner.again.push((Duration::ZERO, Again::Wait(number)));
        self.tick.notify_one();
        drop(inner);
        request.succeed();
    }

    fn ask_for_end(&self, number: u32, child: Uuid) {
        let (Some(host), this) = (self.host(), self.this.clone()) else { return };
        let then = move |code| {
            if let Some(service) = this.upgrade() {
                service.ended(number, code);
            }
        };
        host.wait(child, Box::new(then));
    }

    /// There was no fork.
    pub(crate) fn fork_failed(&self, request: ForkRequest) {
        let mut inner = self.lock();
        inner.machine.queue.done();
        inner.stats.failed += 1;
        drop(inner);
        request.fail(Errno::EIO);
    }

    /// This is the child. Everything that was asked of the parent is answered; the request that
    /// forked is not yet, and the barrier has to be closed.
    pub(crate) fn became_child(&self, own: Uuid, generation: u64) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.passing = inner.barrier.take();
        let forks = inner.machine.became_child(own, generation, inner.passing.is_some());
        let waiters = std::mem::take(&mut inner.waiters);
        let asked = std::mem::take(&mut inner.asked);
        let polls = std::mem::take(&mut inner.polls);
        inner.again.clear();
        inner.stats = Stats::default();
        drop(guard);
        for request in forks {
            request.fail(Errno::EIO);
        }
        for waiter in waiters {
            waiter.reply.error(Errno::ESTALE);
        }
        for asked in asked.into_values() {
            asked.reply.error(Errno::ESTALE);
        }
        // They ask again, and get an error.
        notify(polls.into_values().map(|(_, notifier)| notifier));
        if let Some(host) = self.host() {
            host.became_child();
        }
    }

    /// How long the birth of this child took.
    pub(crate) fn born(&self, birth: Duration, renew: Duration) {
        let mut inner = self.lock();
        inner.stats.birth_us = Some(micros(birth));
        inner.stats.renew_us = Some(micros(renew));
    }

    /// A file was opened; whether it is the barrier.
    pub(super) fn opened(inner: &mut Inner, tid: u32, handle: u64) {
        if inner.barrier_tid == Some(tid) {
            inner.barrier_tid = None;
            inner.barrier = Some(handle);
        }
    }

    /// A file was closed.
    pub(super) fn closed(&self, handle: u64) {
        let mut inner = self.lock();
        if inner.passing == Some(handle) {
            inner.passing = None;
            inner.machine.queue.barrier_passed();
        }
        inner.polls.remove(&handle);
        let Some(closed) = inner.handles.close(handle) else { return };
        if let Some(child) = closed.node.child() {
            inner.machine.children.closed(child, handle);
        }
    }

    /// A write to `wait` of a child that lives.
    pub(super) fn wait_for(
        &self,
        inner: &mut Inner,
        child: u32,
        tid: u32,
        len_bytes: u32,
        reply: ReplyWrite,
    ) {
        inner.waiters.push(Waiter { child, tid, len_bytes, reply });
        self.tick.notify_one();
    }

    /// Somebody polls `wait` of a child that lives.
    pub(super) fn poll(inner: &mut Inner, child: u32, handle: u64, notifier: PollNotifier) {
        inner.polls.insert(handle, (child, notifier));
    }

    /// Asks the host for the contents of a file, and answers the read when it knows.
    pub(super) fn ask(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        (child, file): (u32, ChildFile),
        uuid: Uuid,
        (handle, size): (u64, u32),
        reply: ReplyData,
    ) {
        let id = inner.next_asked;
        inner.next_asked += 1;
        let limit = since_boot().saturating_add(ANSWER_LIMIT);
        inner.asked.insert(id, Asked { child, file, handle, limit, size, reply });
        self.tick.notify_one();
        drop(inner);
        self.ask_for_read(id, uuid);
    }

    fn ask_for_read(&self, id: u64, child: Uuid) {
        let (Some(host), this) = (self.host(), self.this.clone()) else { return };
        let then = move |info| {
            if let Some(service) = this.upgrade() {
                service.answered(id, info);
            }
        };
        host.child(child, Box::new(then));
    }

    fn answered(&self, id: u64, info: Result<ChildInfo, HostError>) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(asked) = inner.asked.remove(&id) else { return };
        let info = match info {
            Ok(info) => info,
            Err(HostError::Unknown) if inner.is_young(asked.child) => {
                inner.asked.insert(id, asked);
                inner.again.push((since_boot().saturating_add(AGAIN), Again::Read(id)));
                self.tick.notify_one();
                return;
            }
            Err(error) => {
                drop(guard);
                return asked.reply.error(errno(error));
            }
        };
        let constants = Constants { snapshot: info.snapshot, creation_time: info.creation_time };
        inner.machine.children.learned(asked.child, constants);
        let text = match asked.file {
            ChildFile::Status => status_text(info.status),
            file => constant_text(constants, file),
        };
        let text = text.as_bytes();
        if let Some(handle) = inner.handles.get(asked.handle) {
            handle.keep(text);
        }
        drop(guard);
        let size = usize::try_from(asked.size).unwrap_or(usize::MAX);
        asked.reply.data(text.get(..size).unwrap_or(text));
        if let (Status::Stopped, Some(code)) = (info.status, info.exit) {
            self.ended(asked.child, Ok(code));
        }
    }

    /// A child has stopped, or the host does not know it.
    fn ended(&self, child: u32, code: Result<i32, HostError>) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        match code {
            Ok(code) => inner.machine.children.stopped(child, code, since_boot()),
            Err(HostError::Unknown) if inner.is_young(child) => {
                inner.again.push((since_boot().saturating_add(AGAIN), Again::Wait(child)));
                self.tick.notify_one();
                return;
            }
            Err(HostError::Unknown) => inner.machine.children.disown(child),
            Err(HostError::OfParent | HostError::TooMany) => return,
        }
        let is_there = inner.machine.children.get(child).is_ok();
        let (let_go, stay) =
            std::mem::take(&mut inner.waiters).into_iter().partition(|w| w.child == child);
        let let_go: Vec<Waiter> = let_go;
        inner.waiters = stay;
        for _ in &let_go {
            inner.machine.children.released(child);
        }
        let polls = inner.take_polls(child);
        self.tick.notify_one();
        drop(guard);
        for waiter in let_go {
            if is_there {
                waiter.reply.written(waiter.len_bytes);
            } else {
                waiter.reply.error(Errno::ESTALE);
            }
        }
        notify(polls);
    }

    /// Looks after time limits, retention and signals until the agent ends. Sleeps while there is
    /// nothing to look after: a guest that does nothing should do nothing.
    pub fn keep_house(&self) {
        let mut inner = self.lock();
        while !inner.closed {
            let now = since_boot();
            let interrupted = inner.take_interrupted();
            let late = inner.take_late(now);
            let polls = inner.expire(now);
            let again = inner.take_again(now);
            let quiet = interrupted.is_empty() && late.is_empty();
            if !(quiet && polls.is_empty() && again.is_empty()) {
                drop(inner);
                for (what, child) in again {
                    match what {
                        Again::Wait(number) => self.ask_for_end(number, child),
                        Again::Read(id) => self.ask_for_read(id, child),
                    }
                }
                for waiter in interrupted {
                    waiter.reply.error(Errno::EINTR);
                }
                for asked in late {
                    asked.reply.error(Errno::EIO);
                }
                notify(polls);
                inner = self.lock();
                continue;
            }
            let limit = inner.next_look(now);
            inner = wait(&self.tick, inner, limit);
        }
    }
}

impl Inner {
    fn take_polls(&mut self, child: u32) -> Vec<PollNotifier> {
        let of_child = self.polls.extract_if(.., |_, (of, _)| *of == child);
        of_child.map(|(_, (_, notifier))| notifier).collect()
    }

    /// The kernel tells of signals (`FUSE_INTERRUPT`), but the FUSE library does not pass it on, and
    /// who waits for an answer of ours cannot even be killed. So it is looked after.
    fn take_interrupted(&mut self) -> Vec<Waiter> {
        self.waiters.extract_if(.., |waiter| Proc.is_interrupted(waiter.tid)).collect()
    }

    fn take_late(&mut self, now: Duration) -> Vec<Asked> {
        self.asked.extract_if(.., |_, asked| asked.limit <= now).map(|(_, asked)| asked).collect()
    }

    fn expire(&mut self, now: Duration) -> Vec<PollNotifier> {
        self.machine.children.expire(now);
        let children = &self.machine.children;
        let gone = self.polls.extract_if(.., |_, (child, _)| children.get(*child).is_err());
        gone.map(|(_, (_, notifier))| notifier).collect()
    }

    /// Whether the host may not know the child yet.
    fn is_young(&self, child: u32) -> bool {
        let known = self.machine.children.get(child);
        known.is_ok_and(|known| since_boot().saturating_sub(known.since) < AMNESTY)
    }

    /// What is to be asked again now, and about whom.
    fn take_again(&mut self, now: Duration) -> Vec<(Again, Uuid)> {
        let due = self.again.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>();
        let whom = |what| {
            let number = match what {
                Again::Wait(number) => Some(number),
                Again::Read(id) => self.asked.get(&id).map(|asked| asked.child),
            };
            let child = self.machine.children.get(number?).ok()?;
            Some((what, child.uuid))
        };
        due.into_iter().filter_map(|(_, what)| whom(what)).collect()
    }

    fn next_look(&self, now: Duration) -> Option<Duration> {
        let signals = (!self.waiters.is_empty()).then_some(SIGNAL_INTERVAL);
        let answers = self.asked.values().map(|asked| asked.limit).min();
        let again = self.again.iter().map(|(at, _)| *at).min();
        let times = [answers, again, self.machine.children.next_expiry()].into_iter().flatten();
        signals.into_iter().chain(times.map(|time| time.saturating_sub(now))).min()
    }
}

/// Makes those who poll look again. The kernel may have forgotten them, which is as good.
fn notify(polls: impl IntoIterator<Item = PollNotifier>) {
    for notifier in polls {
        drop(notifier.notify());
    }
}

/// What the files show that do not change.
pub(super) fn constant_text(constants: Constants, file: ChildFile) -> String {
    match file {
        ChildFile::Snapshot => format!("{}\n", constants.snapshot),
        ChildFile::CreationTime => format!("{}\n", constants.creation_time),
        ChildFile::Status | ChildFile::Wait => String::new(),
    }
}

fn errno(error: HostError) -> Errno {
    match error {
        HostError::Unknown | HostError::OfParent => Errno::ESTALE,
        HostError::TooMany => Errno::EIO,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
