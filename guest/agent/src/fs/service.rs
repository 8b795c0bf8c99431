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

use fuser::{Errno, PollNotifier, ReplyWrite};
use uuid::Uuid;

use super::handle::Handles;
use super::house::notify;
use super::questions::{Again, Asked};
use crate::host::Host;
use crate::processes::since_boot;
use crate::state::{Machine, Refused};
use crate::stats::Stats;
use crate::sync::{lock, wait};

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

/// A write to `wait`, or to `template_instance`.
pub(super) struct Waiter {
    pub(super) child: u32,
    pub(super) tid: u32,
    pub(super) len_bytes: u32,
    pub(super) reply: ReplyWrite,
}

/// Behind the lock.
pub(super) struct Inner {
    pub(super) machine: Machine<ForkRequest>,
    /// Who this was before the last fork in which it became a child.
    former: Uuid,
    pub(super) handles: Handles,
    pub(super) serial: u32,
    /// The thread whose open file is the barrier, and that file.
    barrier_tid: Option<u32>,
    barrier: Option<u64>,
    /// The barrier that is on its way.
    passing: Option<u64>,
    pub(super) waiters: Vec<Waiter>,
    /// Writes to `template_instance`, which return in clones.
    pub(super) in_clones: Vec<Waiter>,
    pub(super) polls: BTreeMap<u64, (u32, PollNotifier)>,
    pub(super) asked: BTreeMap<u64, Asked>,
    pub(super) next_asked: u64,
    pub(super) again: Vec<(Duration, Again)>,
    stats: Stats,
    pub(super) closed: bool,
}

/// Shared by all threads of the agent.
pub struct Service {
    inner: Mutex<Inner>,
    /// A fork request waits.
    work: Condvar,
    /// A fork is over.
    settled: Condvar,
    /// There is something to look after.
    pub(super) tick: Condvar,
    host: Mutex<Option<Arc<dyn Host>>>,
    pub(super) this: Weak<Self>,
}

impl Service {
    /// With room for `queue` forks that wait; children that have stopped stay for `retention`.
    #[must_use]
    pub fn new(queue: usize, retention: Duration) -> Arc<Self> {
        let inner = Inner {
            machine: Machine::new(queue, retention),
            former: Uuid::nil(),
            handles: Handles::default(),
            serial: 0,
            barrier_tid: None,
            barrier: None,
            passing: None,
            waiters: Vec::new(),
            in_clones: Vec::new(),
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
            settled: Condvar::new(),
            tick: Condvar::new(),
            host: Mutex::default(),
            this: this.clone(),
        })
    }

    /// Whom to ask about children.
    pub fn set_host(&self, host: Arc<dyn Host>) {
        *lock(&self.host) = Some(host);
    }

    /// The host or the doorbell says who this instance is. Returns whether that agrees with what is known.
    pub fn welcomed(&self, uuid: Uuid) -> bool {
        self.lock().machine.welcomed(uuid)
    }

    /// UUID and generation of this instance.
    #[must_use]
    pub fn identity(&self) -> (Uuid, u64) {
        let inner = self.lock();
        (inner.machine.own(), inner.machine.generation())
    }

    /// Whether this machine is a child of `uuid`, and was that before. Asked after [`Service::settle`].
    #[must_use]
    pub fn was(&self, uuid: Uuid) -> bool {
        !uuid.is_nil() && self.lock().former == uuid
    }

    /// Waits until it is known which machine this is, if a fork is in progress: what is done before
    /// could be done in a child that is not another machine yet. Forks that come meanwhile are not
    /// waited for.
    pub fn settle(&self) {
        let mut inner = self.lock();
        let fork = inner.machine.queue.in_progress();
        while fork.is_some() && inner.machine.queue.in_progress() == fork && !inner.closed {
            inner = wait(&self.settled, inner, None);
        }
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
        inner.in_clones.clear();
        inner.asked.clear();
        inner.polls.clear();
        self.work.notify_all();
        self.settled.notify_all();
        self.tick.notify_all();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    pub(super) fn host(&self) -> Option<Arc<dyn Host>> {
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
        self.settled.notify_all();
        drop(inner);
        request.succeed();
    }

    /// There was no fork.
    pub(crate) fn fork_failed(&self, request: ForkRequest) {
        let mut inner = self.lock();
        inner.machine.queue.done();
        inner.stats.failed += 1;
        self.settled.notify_all();
        drop(inner);
        request.fail(Errno::EIO);
    }

    /// This is the child. Everything that was asked of the parent is answered; the request that
    /// forked is not yet, and the barrier has to be closed.
    pub(crate) fn became_child(&self, own: Uuid, generation: u64, (tid, tgid): (u32, u32)) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.former = inner.machine.own();
        inner.passing = inner.barrier.take();
        let barrier = inner.passing.is_some();
        let machine = &mut inner.machine;
        let forks = machine.became_child((own, generation), (tid, tgid), since_boot(), barrier);
        let waiters = std::mem::take(&mut inner.waiters);
        let in_clones = std::mem::take(&mut inner.in_clones);
        let asked = std::mem::take(&mut inner.asked);
        let polls = std::mem::take(&mut inner.polls);
        inner.again.clear();
        inner.stats = Stats::default();
        self.settled.notify_all();
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
        for waiter in in_clones {
            waiter.reply.written(waiter.len_bytes);
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

    /// A write to `template_instance`: it returns in each clone, when that is another machine.
    pub(super) fn become_template(&self, tid: u32, len_bytes: u32, reply: ReplyWrite) {
        let Some(host) = self.host() else { return reply.error(Errno::EIO) };
        let mut inner = self.lock();
        if inner.machine.queue.is_of_parent() {
            // This is a clone of the one that was to become a template.
            drop(inner);
            return reply.written(len_bytes);
        }
        // It is no child's end that is waited for.
        inner.in_clones.push(Waiter { child: u32::MAX, tid, len_bytes, reply });
        self.tick.notify_one();
        drop(inner);
        host.template();
    }

    /// Somebody polls `wait` of a child that lives.
    pub(super) fn poll(inner: &mut Inner, child: u32, handle: u64, notifier: PollNotifier) {
        inner.polls.insert(handle, (child, notifier));
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
