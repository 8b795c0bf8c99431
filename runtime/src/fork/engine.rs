//! What an instance needs to fork: its dirty pages, its standbys, and the forks under way.
//!
//! The engine is shared by the vCPU threads, which fork, and the control thread, which keeps
//! standbys ready ([`super::keeper`]); the latter holds it only for short steps.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::process::{PidfdFlags, Signal};
use uuid::Uuid;

use super::capture::Capture;
use super::link::{Base, ForkBlock, Identity, Link, decision, word};
use super::path;
use super::report::{ChildReport, ForkReport};
use super::shared::fail;
use super::step::{ForkCause, ForkError, Moment, Step};
use crate::instance::Instance;
use crate::kvm::DirtyLog;
use crate::sys::{self, now_ns};

/// How long a standby may take to end when its fork has failed.
const FAREWELL_NS: u64 = 500_000_000;
/// Longest time that a guest can have standbys spin without a fork.
const MAX_ANNOUNCED_US: u32 = 100_000;

/// A standby, as its parent knows it.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) slot: usize,
    /// Closed when the child is live; its end of file tells either side that the other is gone.
    pub(super) line: OwnedFd,
    pub(super) identity: Identity,
}

/// A fork whose children are not all accounted for.
#[derive(Debug)]
struct Flight {
    handles: Vec<Handle>,
    doorbell_ns: u64,
    /// The vCPU that asked for it, if any did.
    vcpu: Option<usize>,
    /// Children that are live already.
    live: Vec<ChildReport>,
    report: ForkReport,
    /// Whether all children agreed.
    decided: bool,
    /// When its processes were told first that it failed.
    dismissed_ns: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    /// The dirty log until capturing begins.
    log: Option<DirtyLog>,
    /// In a child: pages that its zygote does not have.
    seed: Option<Vec<u32>>,
    pub(super) capture: Option<Capture>,
    pub(super) ready: Vec<Handle>,
    flights: Vec<Flight>,
    /// State that the next standby is made with.
    pub(super) base: Base,
    /// Standbys that a waiting fork needs.
    pub(super) wanted: usize,
    /// No standbys are to be kept or being made.
    pub(super) unattended: bool,
    /// More is dirty than fits into the journal: a fork waits for a sync round.
    pub(super) wants_round: bool,
    /// Standbys that could not be made so far, and why the last could not.
    prewarm_failures: (u32, Option<(Step, i32)>),
    /// Why the last fork failed, if it did.
    last_failure: Option<(Step, i32)>,
    pub(super) forks: u32,
    pub(super) failed: u64,
    /// Time for which standbys were asked to spin since the last fork.
    announced_us: u32,
}

impl Engine {
    /// An engine for an instance whose writes are logged in `log`.
    #[must_use]
    pub fn new(log: DirtyLog, base: Base) -> Self {
        Self {
            log: Some(log),
            seed: None,
            capture: None,
            ready: Vec::new(),
            flights: Vec::new(),
            base,
            wanted: 0,
            unattended: false,
            wants_round: false,
            prewarm_failures: (0, None),
            last_failure: None,
            forks: 0,
            failed: 0,
            announced_us: 0,
        }
    }

    /// Pages that rehearsals wrote.
    pub(super) fn rehearsed(&mut self, instance: &Instance) -> Result<Vec<u32>, ForkCause> {
        let mut pages = Vec::new();
        if let Some(log) = &mut self.log {
            log.harvest(instance.machine().vm(), |page| pages.push(page))?;
        }
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
    }

    /// In a child that has come to life: `pages` may differ from what its zygote has.
    pub(super) fn born(&mut self, pages: Vec<u32>) {
        self.seed = Some(pages);
    }

    /// In the root, with all vCPUs stopped, the image sealed and pages logged: capturing starts, and
    /// `pages` may differ from what the image has.
    ///
    /// # Errors
    ///
    /// What `KVM_GET_IRQCHIP` says.
    pub fn arm(&mut self, instance: &Instance, pages: Vec<u32>) -> Result<(), ForkCause> {
        for (index, to) in self.base.vcpus.iter_mut().enumerate() {
            instance.gate().with_saved(index, |saved| to.copy_from(saved));
        }
        instance.machine().save_irqchips(&mut self.base.vm)?;
        self.seed = Some(pages);
        self.start_capture(instance);
        Ok(())
    }

    /// Starts capturing: in the root when it is armed, in a child when it is born.
    pub(super) fn start_capture(&mut self, instance: &Instance) -> bool {
        if self.capture.is_none()
            && let Some(seed) = self.seed.take()
            && let Some(log) = self.log.take()
        {
            let pages = instance.mapping().bytes() / crate::memory::PAGE;
            instance.link().populate_fork(instance.vcpus());
            self.capture = Some(Capture::new(log, pages, instance.link(), &seed));
        }
        self.capture.is_some()
    }

    /// Takes standbys for a fork of `children`; `false` if there are too few.
    ///
    /// # Errors
    ///
    /// If the fork before this one failed to come to an end.
    pub fn take(
        &mut self,
        instance: &Instance,
        children: usize,
        vcpu: Option<usize>,
        doorbell_ns: u64,
    ) -> Result<bool, ForkError> {
        let link = instance.link();
        self.conclude(instance);
        link.header().fault.check(Step::Take)?;
        let fits = match &mut self.capture {
            Some(capture) => {
                capture
                    .harvest(instance.machine(), instance.ram())
                    .map_err(ForkError::at(Step::Take))?;
                !capture.is_loose() && capture.fits(link, vcpu)
            }
            None => false,
        };
        self.wants_round = self.capture.is_some() && !fits;
        self.drop_dead(link, children);
        // Children of a fork that failed look at the same words as those of the next: they have to
        // be gone before.
        let haunted = self.flights.iter().any(Flight::is_haunted);
        if !fits || haunted || self.ready.len() < children || self.is_failing(link, children) {
            self.wanted = children;
            return Ok(false);
        }
        self.wanted = 0;
        let handles = self.ready.split_off(self.ready.len() - children);
        let report = ForkReport {
            number: self.forks + 1,
            from_guest: vcpu.is_some(),
            requested: u32::try_from(children).unwrap_or(u32::MAX),
            ..ForkReport::default()
        };
        // The next stamps take the place of its.
        self.note_resumed(instance);
        let live = Vec::with_capacity(children);
        self.flights.push(Flight {
            handles,
            doorbell_ns,
            vcpu,
            live,
            report,
            decided: false,
            dismissed_ns: None,
        });
        Ok(true)
    }

    /// Notes when the last vCPU of the last fork's parent was back in the guest; one that is not yet
    /// has been away at least until now.
    fn note_resumed(&mut self, instance: &Instance) {
        let block = instance.link().fork();
        if let Some(flight) = self.flights.last_mut()
            && flight.decided
            && flight.report.number == block.number.load(Ordering::Relaxed)
        {
            if !instance.gate().all_back() {
                block.stamps.raise(Moment::Resumed, now_ns());
            }
            flight.report.parent = ForkReport::parent_moments(block);
        }
    }

    /// Drops standbys that died while they were parked, among those that the next fork would take.
    fn drop_dead(&mut self, link: &Link, children: usize) {
        let first = self.ready.len().saturating_sub(children);
        for index in (first..self.ready.len()).rev() {
            if hung_up(&self.ready[index].line) {
                let dead = self.ready.swap_remove(index);
                link.slot(dead.slot).word.store(word::EMPTY, Ordering::Release);
            }
        }
    }

    /// Whether one of the standbys that the next fork would take is about to end: it could not take in
    /// what its parent had changed.
    fn is_failing(&self, link: &Link, children: usize) -> bool {
        let next = self.ready.iter().rev().take(children);
        next.map(|handle| link.slot(handle.slot))
            .any(|slot| slot.word.load(Ordering::Acquire) == word::FAILED)
    }

    /// Sets up the fork block for the standbys that were taken.
    pub(super) fn begin<'a>(
        &mut self,
        link: &'a Link,
        vcpu: Option<u32>,
        doorbell_ns: u64,
    ) -> &'a ForkBlock {
        self.forks += 1;
        self.announced_us = 0;
        self.last_failure = None;
        let block = link.fork();
        let children = self.flights.last().map_or(&[][..], |flight| &flight.handles);
        block.children.store(u32::try_from(children.len()).unwrap_or(0), Ordering::Relaxed);
        block.vcpu.store(vcpu.map_or(0, |vcpu| vcpu + 1), Ordering::Relaxed);
        block.ready.store(0, Ordering::Relaxed);
        // Nobody sleeps any more: those that do not were killed while they did.
        block.sleepers.store(0, Ordering::Relaxed);
        // In this order: who has not yet seen that the last fork was decided sees the number.
        block.number.store(self.forks, Ordering::Relaxed);
        block.decision.store(decision::OPEN, Ordering::Release);
        block.stamps.clear();
        block.stamps.put(Moment::Doorbell, doorbell_ns);
        if let Some(capture) = &self.capture {
            block.first.store(capture.head(), Ordering::Relaxed);
            capture.publish(link);
        }
        for (index, handle) in (1_u32..).zip(children) {
            let slot = link.slot(handle.slot);
            slot.fork.store(self.forks, Ordering::Relaxed);
            slot.index.store(index, Ordering::Relaxed);
            slot.step.store(Step::Wake as u32, Ordering::Relaxed);
            slot.stamps.clear();
        }
        block
    }

    pub(super) fn flight_slots(&self) -> impl Iterator<Item = usize> + '_ {
        self.flights.last().into_iter().flat_map(|flight| flight.handles.iter().map(|it| it.slot))
    }

    /// Has the next sync round find all that is written from now on, if the log was left loose: stops
    /// all vCPUs for it.
    ///
    /// # Errors
    ///
    /// If they do not stop, and what `KVM_SET_USER_MEMORY_REGION` says.
    pub(super) fn tighten(&mut self, instance: &Instance) -> Result<(), ForkCause> {
        match &mut self.capture {
            Some(capture) if capture.is_loose() => {
                let stopped = instance.gate().stop(None, path::QUIESCE);
                let waited_ms = u64::try_from(path::QUIESCE.as_millis()).unwrap_or(u64::MAX);
                let stopped = stopped.ok_or(ForkCause::Timeout { waited_ms })?;
                let tight = capture.tighten(instance.machine(), instance.ram(), instance.mapping());
                drop(stopped);
                tight
            }
            _ => Ok(()),
        }
    }

    /// Captures every dirty page and publishes the journal's end.
    pub(super) fn capture_pages(&mut self, instance: &Instance) -> Result<(), ForkCause> {
        let link = instance.link();
        let capture = self.capture.as_mut().ok_or(ForkCause::Died)?;
        let pages = capture.all(instance.machine(), instance.ram(), instance.mapping(), link)?;
        if let Some(flight) = self.flights.last_mut() {
            flight.report.captured_pages = pages;
        }
        Ok(())
    }

    /// Identities of the children of the last fork.
    #[must_use]
    pub fn children(&self) -> Vec<Identity> {
        self.flights
            .last()
            .map(|flight| flight.handles.iter().map(|handle| handle.identity).collect())
            .unwrap_or_default()
    }

    /// If a process of the fork under way is gone: the step that it did not finish.
    pub(super) fn flight_died(&self, link: &Link) -> Option<Step> {
        let flight = self.flights.last()?;
        let dead = flight.handles.iter().find(|handle| hung_up(&handle.line))?;
        let step = link.slot(dead.slot).step.load(Ordering::Acquire);
        Some(Step::from_number(step).unwrap_or(Step::Wake))
    }

    /// Gives the fork under way up because of `error`.
    pub fn abort(&mut self, instance: &Instance, error: &ForkError) {
        fail(instance.link(), error.step, error.cause.errno());
        self.conclude(instance);
    }

    /// If a fork is under way, waits for its outcome and keeps what the next one overwrites.
    pub fn conclude(&mut self, instance: &Instance) {
        let link = instance.link();
        if self.flights.last().is_none_or(|flight| flight.decided) {
            return;
        }
        let outcome = self.outcome(link);
        let block = link.fork();
        if outcome.is_ok() {
            let state = link.read_fork();
            self.base.vm.irqchips = state.vm.irqchips;
            for (to, from) in self.base.vcpus.iter_mut().zip(&state.vcpus) {
                to.copy_from(from);
            }
        }
        if let Some(flight) = self.flights.last_mut() {
            flight.decided = true;
            flight.report.parent = ForkReport::parent_moments(block);
            flight.report.failed = outcome.err().map(|error| (error.step, error.cause.errno()));
            self.last_failure = flight.report.failed;
            if let Some(vcpu) = flight.vcpu {
                instance.conclude_answer(vcpu, flight.report.failed);
            }
        }
    }

    /// Why the last fork failed, if it did.
    #[must_use]
    pub fn last_failure(&self) -> Option<(Step, i32)> {
        self.last_failure
    }

    /// How often a standby could not be made.
    #[must_use]
    pub fn prewarm_failures(&self) -> u32 {
        self.prewarm_failures.0
    }

    /// Why the last could not, if that was after the count was `before`.
    #[must_use]
    pub fn prewarm_failure_after(&self, instance: &Instance, before: u32) -> Option<ForkError> {
        let (count, last) = self.prewarm_failures;
        let (step, errno) = last?;
        let cause = ForkCause::of_child(errno, instance.mapping().kind());
        (count != before).then_some(ForkError { step, cause })
    }

    /// Tells a waiting fork that a standby could not be made.
    pub fn note_prewarm_failure(&mut self, error: &ForkError) {
        let (count, last) = &mut self.prewarm_failures;
        *count = count.wrapping_add(1);
        *last = Some((error.step, error.cause.errno()));
    }

    /// Takes the log's contents when its ring is full, so that the guest can go on; tells whether it
    /// can. While a fork waits for room in the journal it cannot: guests that write all the time
    /// would fill it faster than it is emptied, if their rings are small.
    ///
    /// # Errors
    ///
    /// What the log says.
    pub fn drain(&mut self, instance: &Instance) -> Result<bool, ForkCause> {
        self.start_capture(instance);
        if self.wants_round {
            return Ok(false);
        }
        // A fork that is not decided has a vCPU that nobody can stop, which the next round would have to.
        let loosely =
            self.unattended && self.ready.is_empty() && self.wanted == 0 && !self.undecided();
        match (&mut self.capture, &mut self.log) {
            (Some(capture), _) if loosely || capture.is_loose() => {
                capture.loosen(instance.machine(), instance.ram())?;
            }
            (Some(capture), _) => {
                capture.begin_round(instance.machine(), instance.ram())?;
            }
            (None, Some(log)) if !instance.is_armed() => {
                // Left over by an arming that failed. Nobody needs it: the next one looks at the
                // memory itself.
                let vm = instance.machine().vm();
                log.harvest(vm, |_| ())?;
                log.reset(vm)?;
            }
            // A child whose first vCPU has yet to say what it begins with: a moment later.
            (None, _) => {}
        }
        Ok(true)
    }

    /// Wakes the standby that the next fork will take first, to spin for `window_us`. A guest that
    /// announces and does not fork is not listened to for ever.
    pub fn announce(&mut self, link: &Link, window_us: u32) {
        if self.announced_us >= MAX_ANNOUNCED_US {
            return;
        }
        if let Some(handle) = self.ready.last() {
            self.announced_us += window_us;
            let until_ns = now_ns() + u64::from(window_us) * 1000;
            let slot = link.slot(handle.slot);
            slot.spin_until_ns.store(until_ns, Ordering::Relaxed);
            if slot.turn(word::PARKED, word::ANNOUNCED) {
                sys::futex_wake(&slot.word);
            }
        }
    }

    /// A fork found more dirty pages than fit into the journal: the next one waits for a sync round.
    pub fn want_round(&mut self) {
        self.wants_round = true;
    }

    /// Whether a fork waits for standbys.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.wanted > 0 || self.wants_round
    }

    /// The fork that waited has given up.
    pub fn forget_waiting(&mut self) {
        self.wanted = 0;
        self.wants_round = false;
    }

    /// Standbys that are ready.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Forks made and forks failed.
    #[must_use]
    pub fn counts(&self) -> (u32, u64) {
        (self.forks, self.failed)
    }

    /// Pages that a fork at this moment would copy, as far as is known.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.capture.as_ref().map_or(0, Capture::pending)
    }

    /// Whether a child of the fork under way may still read the journal.
    pub(super) fn undecided(&self) -> bool {
        self.flights.iter().any(|flight| !flight.decided)
    }

    /// Takes note of children that have come to life or died, and returns the forks that are over.
    pub(super) fn collect(&mut self, instance: &Instance) -> Vec<ForkReport> {
        if self.flights.is_empty() {
            return Vec::new();
        }
        let link = instance.link();
        if link.fork().decision.load(Ordering::Acquire) != decision::OPEN {
            self.conclude(instance);
        } else if let Some(step) = self.flight_died(link) {
            fail(link, step, libc::ECHILD);
            self.conclude(instance);
        }
        for flight in &mut self.flights {
            flight.collect(link);
        }
        let last = link.fork().number.load(Ordering::Relaxed);
        let back = instance.gate().all_back();
        if back {
            self.note_resumed(instance);
        }
        // A fork is not over before all vCPUs of the parent are back; of those before the last it was
        // noted when the next began.
        let over = |flight: &mut Flight| {
            flight.decided && flight.handles.is_empty() && (back || flight.report.number != last)
        };
        let reports: Vec<_> = self
            .flights
            .extract_if(.., over)
            .map(|mut flight| {
                flight.live.sort_unstable_by_key(|child| child.index);
                flight.report.children = flight.live;
                flight.report
            })
            .collect();
        self.failed += reports.iter().filter(|report| report.failed.is_some()).count() as u64;
        reports
    }

    /// Whether forks are under way.
    pub(super) fn in_flight(&self) -> bool {
        !self.flights.is_empty()
    }

    /// Whether all children of a fork live, and vCPUs of the parent have yet to come back.
    pub(super) fn waits_for_vcpus(&self) -> bool {
        self.flights.iter().any(|flight| flight.decided && flight.handles.is_empty())
    }
}

impl Flight {
    /// Whether it failed, and a process of it may be left.
    fn is_haunted(&self) -> bool {
        self.report.failed.is_some() && !self.handles.is_empty()
    }

    fn collect(&mut self, link: &Link) {
        if !self.decided {
            return;
        }
        let failed = self.report.failed.is_some();
        let dismissed_ns = *self.dismissed_ns.get_or_insert_with(now_ns);
        let late = failed && now_ns() - dismissed_ns > FAREWELL_NS;
        let doorbell_ns = self.doorbell_ns;
        let live = &mut self.live;
        self.handles.retain(|handle| {
            let slot = link.slot(handle.slot);
            if !failed && slot.word.load(Ordering::Acquire) == word::LIVE {
                let uuid = Uuid::from_bytes(handle.identity.uuid);
                let child = ChildReport::new(slot, uuid, doorbell_ns);
                link.header().note_filled(child.applied_pages.saturating_sub(child.private_pages));
                live.push(child);
            } else {
                if failed {
                    dismiss(&handle.line);
                }
                if late {
                    // Stopped, or frozen: it does not hear, and no fork can be made while it is there.
                    kill_leader(slot.tid.load(Ordering::Relaxed), &handle.line);
                }
                // The slot is its process's until that is gone.
                if !hung_up(&handle.line) {
                    return true;
                }
            }
            slot.word.store(word::EMPTY, Ordering::Release);
            false
        });
    }
}

/// Whether the process at the other end is gone.
pub(super) fn hung_up(line: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(line, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Kills the standby whose first thread is `tid`, if the process at the other end of `line` is still
/// there. It is not our child, so its number is of use only as long as it is.
pub(super) fn kill_leader(tid: u32, line: &OwnedFd) {
    let pid = rustix::process::Pid::from_raw(tid.cast_signed());
    let process = pid.map(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
    if let Some(Ok(process)) = process
        && !hung_up(line)
    {
        // It has ended since.
        rustix::process::pidfd_send_signal(process, Signal::KILL).unwrap_or(());
    }
}

/// Tells a standby to end: its control thread reads the end of file.
pub(super) fn dismiss(line: &OwnedFd) {
    rustix::net::shutdown(line, rustix::net::Shutdown::Write).unwrap_or(());
}

/// The error of a standby that could not be made.
pub(super) fn slot_failure(slot: &super::link::Slot) -> ForkError {
    path::failure(slot.failure.load(Ordering::Acquire))
        .unwrap_or(ForkError { step: Step::Prewarm, cause: ForkCause::Died })
}
