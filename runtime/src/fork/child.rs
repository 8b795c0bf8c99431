//! The fork path, child's side: from the parked standby to the first run of the child.
//!
//! ```text
//!   PARKED <--> SYNC        asleep; woken now and then to take in what the parent changed
//!      |  announced or GO
//!      v
//!   awake: apply pages, restore what differs, new identity, consent -> KVM_RUN
//! ```
//!
//! A standby is spent by its first fallible step: whatever fails, the process ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::apply::{Applied, Hand};
use super::link::{Slot, word};
use super::rehearse;
use super::shared::{SPIN_NS, Shared, tell};
use super::step::{ForkError, Moment, Step};
use crate::beacon;
use crate::device::Answer;
use crate::instance::{Action, last_words};
use crate::kvm::Vcpu;
use crate::sys::{self, KickTimer, futex_wait, now_ns};

/// A standby, seen from its leader: the thread of vCPU 0.
pub(super) struct Standby {
    pub(super) shared: Arc<Shared>,
    hand: Hand,
}

impl Standby {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, hand: Hand::new() }
    }

    /// Sleeps until the fork comes, becomes an instance, and runs until that ends.
    pub(super) fn park_and_go(mut self, mut vcpu: Vcpu) -> Result<i32, ForkError> {
        let shared = self.shared.clone();
        let instance = shared.instance.clone();
        let slot = shared.link.slot(shared.slot);
        let avoid = shared.link.header().vcpu_cpu.load(Ordering::Relaxed);
        let urgent = instance.prepare_thread(avoid);
        let alarm = KickTimer::new().map_err(ForkError::at(Step::Prewarm))?;
        slot.tid.store(sys::thread_id().cast_unsigned(), Ordering::Relaxed);
        slot.avoids.store(avoid, Ordering::Relaxed);
        slot.word.store(word::PARKED, Ordering::Release);
        shared.link.ring();
        let faults = self.park(&mut vcpu)?;
        beacon::role(beacon::Role::Child);
        slot.stamps.stamp(Moment::Awake);
        shared.signal(&shared.awake);
        let applied = self.apply_fork()?;
        slot.stamps.stamp(Moment::Applied);
        if !shared.is_there(|block| &block.state_ready) {
            // The time would be spent waiting; so KVM's entry path is warm when it counts.
            vcpu.warm_up().map_err(ForkError::at(Step::RestoreState))?;
        }
        shared.wait(|block| &block.state_ready)?;
        shared.signal(&shared.captured);
        self.restore(&mut vcpu)?;
        slot.stamps.stamp(Moment::Restored);
        let rang = shared.rang(0);
        // Only one that rang is about to read the answer. What it begins with is known when it is back.
        let first_run_us = shared.first_run_us(urgent && rang);
        slot.applied.store(applied.pages, Ordering::Relaxed);
        slot.applied_private.store(applied.private, Ordering::Relaxed);
        slot.applied_helped.store(applied.helped, Ordering::Relaxed);
        if !rang {
            // The slot is the parent's again as soon as the vCPU that rang has left the guest.
            Self::account(slot, faults);
        }
        shared.consent()?;
        last_words::forget_parent();
        instance.gate().enter(0);
        if let Some(us) = first_run_us {
            // It cannot fail for a timer that exists, and the fork is decided.
            alarm.set(us).unwrap_or(());
        }
        instance.renew_priority();
        if rang {
            slot.stamps.stamp(Moment::Entered);
        }
        let first = vcpu.run();
        if rang {
            slot.stamps.stamp(Moment::Exited);
            beacon::born(slot.stamps.get(Moment::Exited));
            Self::account(slot, faults);
        }
        instance.engine().born(shared.crew.applier().private_pages().collect());
        if rang {
            shared.announce_life();
        }
        instance.tell_of_generation();
        let action = instance.after_exit(0, first);
        drop(alarm);
        instance.settle_thread();
        drop(self);
        drop(shared);
        instance.run_leader(vcpu, action)
    }

    /// Notes what it cost until now, page faults since there were `faults`.
    fn account(slot: &Slot, faults: u64) {
        let faults = u32::try_from(sys::minor_faults() - faults).unwrap_or(0);
        slot.faults.store(faults, Ordering::Relaxed);
        slot.cpu_ns.store(sys::cpu_ns(), Ordering::Relaxed);
    }

    /// Returns when the word is `GO`, with the page faults of this process until then.
    fn park(&mut self, vcpu: &mut Vcpu) -> Result<u64, ForkError> {
        let shared = self.shared.clone();
        let slot = shared.link.slot(shared.slot);
        let mut faults = sys::minor_faults();
        loop {
            match slot.word.load(Ordering::Acquire) {
                word::GO => return Ok(faults),
                word::SYNC => {
                    let head = shared.link.header().head.load(Ordering::Acquire);
                    self.catch_up(head)?;
                    if slot.turn(word::SYNC, word::PARKED) {
                        shared.link.ring();
                    }
                    faults = sys::minor_faults();
                }
                word::ANNOUNCED if now_ns() < slot.spin_until_ns.load(Ordering::Relaxed) => {
                    // Instead of spinning on the word alone: it keeps KVM's entry path in caches
                    // and TLB.
                    vcpu.warm_up().map_err(ForkError::at(Step::Wake))?;
                }
                word::ANNOUNCED => {
                    // Unless GO comes in between: the loop sees it.
                    slot.turn(word::ANNOUNCED, word::PARKED);
                }
                seen => futex_wait(&slot.word, seen, None),
            }
        }
    }

    /// Applies the pages of the fork while the parent still captures them.
    fn apply_fork(&mut self) -> Result<Applied, ForkError> {
        let shared = self.shared.clone();
        let (link, block, crew) = (&shared.link, shared.link.fork(), &shared.crew);
        let mapping = shared.instance.mapping();
        let at = ForkError::at(Step::ApplyPages);
        shared.begin(Step::ApplyPages)?;
        let first = block.first.load(Ordering::Acquire);
        self.catch_up(first)?;
        crew.open(first);
        shared.wait_while(&block.pages_ready, || {
            shared.call_for_help();
            let some = crew.work(&mut self.hand, link, mapping);
            some.map(|pages| pages > 0).map_err(ForkError::at(Step::ApplyPages))
        })?;
        let applied = crew.close(&mut self.hand, link, mapping).map_err(at)?;
        let head = block.head.load(Ordering::Acquire);
        link.slot(shared.slot).tail.store(head, Ordering::Release);
        Ok(applied)
    }

    /// Applies what sync rounds have put into the journal before entry `head`.
    fn catch_up(&mut self, head: u32) -> Result<(), ForkError> {
        let Shared { link, slot, crew, instance, .. } = &*self.shared;
        let (applier, mapping) = (crew.applier(), instance.mapping());
        let tail = &link.slot(*slot).tail;
        let entries = tail.load(Ordering::Relaxed)..head;
        applier
            .apply(&mut self.hand, link, mapping, entries)
            .and_then(|_| applier.finish(&mut self.hand, link, mapping))
            .map_err(ForkError::at(Step::ApplyPages))?;
        tail.store(head, Ordering::Release);
        Ok(())
    }

    fn restore(&mut self, vcpu: &mut Vcpu) -> Result<(), ForkError> {
        let shared = &self.shared;
        let at = |error: crate::kvm::KvmError| ForkError::at(Step::RestoreState)(error);
        shared.begin(Step::RestoreState)?;
        let state = shared.link.read_fork();
        let base = &shared.base.vcpus[0];
        vcpu.restore_most(&state.vcpus[0], Some(base)).map_err(at)?;
        shared.instance.serial().restore(&state.serial);
        if let Some(devices) = shared.instance.devices() {
            devices.restore(&state.virtio, shared.instance.ram());
        }
        if !state.vm.same_irqchips(&shared.base.vm) {
            shared.instance.machine().restore_irqchips(&state.vm).map_err(at)?;
        }
        shared.wait(|block| &block.rest_ready)?;
        vcpu.restore_rest(&state.vcpus[0], base).map_err(at)?;
        shared.begin(Step::Identity)?;
        shared.instance.write_generation().map_err(ForkError::at(Step::Identity))?;
        let slot = shared.link.slot(shared.slot);
        let index = slot.index.load(Ordering::Relaxed);
        let children = shared.link.fork().children.load(Ordering::Relaxed);
        for vcpu in 0..shared.instance.vcpus() {
            let answer = Answer::child(shared.instance.identity(), index, children);
            shared.instance.set_answer(vcpu, answer);
        }
        Ok(())
    }
}

/// The life of a standby's vCPU other than the leader's.
pub(super) fn follow(shared: Arc<Shared>, mut vcpu: Vcpu) {
    let instance = shared.instance.clone();
    // An instance does without its parent's link: nothing here keeps it.
    let (link, slot) = (Arc::downgrade(&shared.link), shared.slot);
    match follow_to_life(shared, &mut vcpu) {
        Ok(action) => instance.run_vcpu(vcpu, action),
        Err(error) => {
            if let Some(link) = link.upgrade() {
                tell(&link, slot, &error);
            }
            if !instance.gate().quitting() {
                std::process::exit(1);
            }
        }
    }
}

fn follow_to_life(shared: Arc<Shared>, vcpu: &mut Vcpu) -> Result<Action, ForkError> {
    let instance = shared.instance.clone();
    let index = vcpu.index() as usize;
    let base = &shared.base.vcpus[index];
    rehearse::run(vcpu, base, instance.config().rehearse).map_err(ForkError::at(Step::Prewarm))?;
    // Everybody has stopped; the leader rolls back.
    shared.meeting.wait();
    shared.meeting.wait();
    rehearse::put_back(vcpu, base).map_err(ForkError::at(Step::Prewarm))?;
    let avoid = shared.link.header().vcpu_cpu.load(Ordering::Relaxed);
    let urgent = instance.prepare_thread(avoid);
    let alarm = KickTimer::new().map_err(ForkError::at(Step::Prewarm))?;
    // Where there is a processor for it, it is awake when the state comes. Elsewhere it would take
    // the leader's or the parent's.
    if instance.spare_cpus(avoid) > index {
        sleep_until_set(&shared.awake);
        let begin = now_ns();
        while shared.captured.load(Ordering::Acquire) == 0 && now_ns() - begin < SPIN_NS {
            std::hint::spin_loop();
        }
    }
    sleep_until_set(&shared.captured);
    shared.begin(Step::RestoreState)?;
    shared.wait(|block| &block.rest_ready)?;
    vcpu.restore(&shared.link.read_fork().vcpus[index], Some(base))
        .map_err(ForkError::at(Step::RestoreState))?;
    let (rang, first_run_us) = (shared.rang(index), shared.first_run_us(urgent));
    shared.consent()?;
    instance.gate().enter(index);
    let first = if rang {
        first_run_us.map_or(Ok(()), |us| alarm.set(us)).unwrap_or(());
        let stamps = &shared.link.slot(shared.slot).stamps;
        stamps.stamp(Moment::Entered);
        let first = vcpu.run();
        stamps.stamp(Moment::Exited);
        beacon::born(stamps.get(Moment::Exited));
        shared.announce_life();
        drop(shared);
        first
    } else {
        // It may run for long: only the one that is waited for has priority, and keeps the link.
        drop(shared);
        instance.settle_thread();
        vcpu.run()
    };
    let action = instance.after_exit(index, first);
    drop(alarm);
    instance.settle_thread();
    Ok(action)
}

fn sleep_until_set(word: &AtomicU32) {
    while word.load(Ordering::Acquire) == 0 {
        futex_wait(word, 0, None);
    }
}
