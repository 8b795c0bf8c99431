//! What the threads of a standby share, and how they wait for their parent and their siblings.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use super::crew::Crew;
use super::link::{self, Base, Link, decision, word};
use super::path;
use super::step::{ForkCause, ForkError, Step};
use crate::instance::Instance;
use crate::sys::{self, futex_wait, futex_wake, now_ns};

/// How long a standby that is awake spins for the next step of the fork before it sleeps. It bounds
/// the damage when it shares its processor with the parent that it waits for.
pub(super) const SPIN_NS: u64 = 50_000;
/// How long a fork may take from waking up to the last sibling's consent.
const PATIENCE_NS: u64 = 10_000_000_000;

/// How long the first run of a child may take after the guest, or the host, has asked for it.
const FIRST_RUN_US: i64 = 2_000;
const HOST_FIRST_RUN_US: i64 = 500;

/// What the threads of a standby share while it is one.
#[derive(Debug)]
pub struct Shared {
    pub(super) instance: Arc<Instance>,
    /// The parent's link.
    pub(super) link: Arc<Link>,
    pub(super) slot: usize,
    /// What the vCPUs are parked with.
    pub(super) base: Base,
    /// Who applies the pages of the fork.
    pub(super) crew: Crew,
    /// 1 once the leader is awake, and once the parent's state is there. Futexes of the other vCPUs'
    /// threads.
    pub(super) awake: AtomicU32,
    pub(super) captured: AtomicU32,
    /// The vCPUs' threads meet here around the rehearsal.
    pub(super) meeting: Barrier,
}

impl Shared {
    pub(super) fn new(
        instance: Arc<Instance>,
        link: Arc<Link>,
        slot: usize,
        base: Base,
        crew: Crew,
    ) -> Self {
        let meeting = Barrier::new(base.vcpus.len());
        let (awake, captured) = (AtomicU32::new(0), AtomicU32::new(0));
        Self { instance, link, slot, base, crew, awake, captured, meeting }
    }

    /// The parent's link.
    #[must_use]
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Whether this standby is taking part in a fork, or has.
    #[must_use]
    pub fn is_going(&self) -> bool {
        self.link.is_going(self.slot)
    }

    /// Helps the leader to apply pages, if it has called. For the control thread.
    pub fn help(&self) {
        if let Err(cause) = self.crew.help(&self.link, self.instance.mapping()) {
            tell(&self.link, self.slot, &ForkError { step: Step::ApplyPages, cause });
            std::process::exit(1);
        }
    }

    /// Calls the control thread, if there is much to apply and a processor for it.
    pub(super) fn call_for_help(&self) {
        let children = self.link.fork().children.load(Ordering::Relaxed) as usize;
        if self.instance.spare_cpus(0) > children && self.crew.wants_help(&self.link) {
            self.instance.link().ring();
        }
    }

    /// Says which step this child is at.
    pub(super) fn begin(&self, step: Step) -> Result<(), ForkError> {
        self.link.slot(self.slot).step.store(step as u32, Ordering::Release);
        self.link.header().fault.check(step)
    }

    pub(super) fn signal(&self, word: &AtomicU32) {
        word.store(1, Ordering::Release);
        if self.base.vcpus.len() > 1 {
            futex_wake(word);
        }
    }

    /// Tells the parent that the vCPU that rang the doorbell has left the guest in this child.
    pub(super) fn announce_life(&self) {
        self.link.slot(self.slot).word.store(word::LIVE, Ordering::Release);
        self.link.ring();
    }

    /// Whether it is the first exit of vCPU `index` that tells that the child lives: that of the one
    /// that rang the doorbell, or of the first.
    pub(super) fn rang(&self, index: usize) -> bool {
        let rang = self.link.fork().vcpu.load(Ordering::Relaxed);
        rang.saturating_sub(1) as usize == index
    }

    /// How long a first run may take. A guest that does not leave by itself is made to: its thread
    /// has a standby's priority still, and somebody waits for a sign of life. After a doorbell the
    /// guest reads the answer at once, and the kernel interrupts an urgent thread that runs for long;
    /// when the host forks the guest may do anything.
    pub(super) fn first_run_us(&self, urgent: bool) -> Option<i64> {
        let from_host = self.link.fork().vcpu.load(Ordering::Relaxed) == 0;
        if from_host { Some(HOST_FIRST_RUN_US) } else { (!urgent).then_some(FIRST_RUN_US) }
    }

    /// Whether a field of the fork block has the number of this standby's fork.
    pub(super) fn is_there(&self, field: impl Fn(&link::ForkBlock) -> &AtomicU32) -> bool {
        let number = self.link.slot(self.slot).fork.load(Ordering::Acquire);
        field(self.link.fork()).load(Ordering::Acquire) == number
    }

    /// Waits until a field of the fork block has the number of this standby's fork.
    pub(super) fn wait(
        &self,
        field: impl Fn(&link::ForkBlock) -> &AtomicU32,
    ) -> Result<(), ForkError> {
        self.wait_while(field(self.link.fork()), || Ok(false))
    }

    /// The same, with something to do meanwhile, which tells whether it did anything.
    pub(super) fn wait_while(
        &self,
        field: &AtomicU32,
        mut meanwhile: impl FnMut() -> Result<bool, ForkError>,
    ) -> Result<(), ForkError> {
        let block = self.link.fork();
        let number = self.link.slot(self.slot).fork.load(Ordering::Acquire);
        let begin = now_ns();
        let mut idle = begin;
        loop {
            let seen = field.load(Ordering::Acquire);
            if seen == number {
                return Ok(());
            }
            check(block, begin)?;
            if meanwhile()? {
                idle = now_ns();
            } else if now_ns() - idle > SPIN_NS {
                block.sleepers.fetch_add(1, Ordering::SeqCst);
                futex_wait(field, seen, Some(Duration::from_millis(10)));
                block.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Says that one vCPU is ready, and returns when all vCPUs of all siblings are.
    pub(super) fn consent(&self) -> Result<(), ForkError> {
        self.begin(Step::Commit)?;
        // From here on this process outlives its parent, if the fork succeeds.
        sys::die_with_parent(false);
        let block = self.link.fork();
        // Before anybody can count on this vCPU: the slot may be another standby's soon after.
        let own = self.link.slot(self.slot).fork.load(Ordering::Acquire);
        let vcpus = u32::try_from(self.base.vcpus.len()).unwrap_or(1);
        let all = block.children.load(Ordering::Relaxed) * vcpus;
        if block.ready.fetch_add(1, Ordering::AcqRel) + 1 == all {
            let decided = block.decision.compare_exchange(
                decision::OPEN,
                decision::COMMITTED,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if decided.is_ok() {
                self.instance.come_alive();
                futex_wake(&block.decision);
                return Ok(());
            }
        }
        let begin = now_ns();
        loop {
            let seen = block.decision.load(Ordering::Acquire);
            // The parent may fork again before this thread looks. It does not while children of a
            // fork that failed are there, so this one did not.
            let over = block.number.load(Ordering::Acquire) != own;
            if seen == decision::COMMITTED || over {
                self.instance.come_alive();
                return Ok(());
            }
            if let Err(error) = check(block, begin) {
                // The last of the siblings may agree at this moment: who is first is obeyed.
                fail(&self.link, error.step, error.cause.errno());
                if path::failure(block.decision.load(Ordering::Acquire)).is_some() {
                    return Err(error);
                }
                continue;
            }
            if now_ns() - begin > SPIN_NS {
                futex_wait(&block.decision, seen, Some(Duration::from_millis(10)));
            }
        }
    }
}

/// In a standby that has no memory for a page of its guest, from a signal handler: leaves that where
/// the parent finds it. Nothing here allocates or locks.
pub fn no_memory(link: &Link, slot: usize) {
    let shared = link.slot(slot);
    let going = shared.word.load(Ordering::Acquire) == word::GO;
    let step = Step::from_number(shared.step.load(Ordering::Acquire));
    let step = if going { step.unwrap_or(Step::Wake) } else { Step::Prewarm };
    tell(link, slot, &ForkError { step, cause: ForkCause::Child { errno: libc::ENOMEM } });
}

/// Leaves the error where the parent finds it, and fails the fork for all siblings.
pub(super) fn tell(link: &Link, slot: usize, error: &ForkError) {
    let errno = error.cause.errno();
    let slot = link.slot(slot);
    slot.failure.store(decision::failed(error.step as u32, errno), Ordering::Release);
    if slot.word.swap(word::FAILED, Ordering::AcqRel) == word::GO {
        fail(link, error.step, errno);
    }
    link.ring();
}

/// Decides that no child of the fork under way runs, unless all have agreed that they do.
pub(super) fn fail(link: &Link, step: Step, errno: i32) {
    let block = link.fork();
    let decision = &block.decision;
    let failed = decision::failed(step as u32, errno);
    // If it was decided already, that stands.
    decision
        .compare_exchange(decision::OPEN, failed, Ordering::AcqRel, Ordering::Acquire)
        .unwrap_or(failed);
    // Whatever a child waits for.
    for word in [decision, &block.pages_ready, &block.state_ready, &block.rest_ready] {
        futex_wake(word);
    }
}

/// Whether it still makes sense to wait.
fn check(block: &link::ForkBlock, begin: u64) -> Result<(), ForkError> {
    if let Some(failure) = path::failure(block.decision.load(Ordering::Acquire)) {
        return Err(failure);
    }
    let waited = now_ns() - begin;
    if waited > PATIENCE_NS {
        let cause = ForkCause::Timeout { waited_ms: waited / 1_000_000 };
        return Err(ForkError { step: Step::Commit, cause });
    }
    Ok(())
}
