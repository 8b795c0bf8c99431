//! A standby: a child that lacks nothing but the parent's last changes.
//!
//! ```text
//!   fork(2)ed from the zygote
//!      |  its own zygote is forked off first: same memory, kept for the child's children
//!      |  machine made, base state restored
//!      |  rehearsed: run once to its first exit, then memory and state put back
//!      v
//!   PARKED <--> SYNC        asleep; woken now and then to take in what the parent changed
//!      |  announced or GO
//!      v
//!   awake: apply pages, restore what differs, new identity, commit -> KVM_RUN
//! ```
//!
//! A standby is spent by its first fallible step: whatever fails, the process ends.
#![expect(unsafe_code, reason = "fork(2), and giving up inherited descriptors")]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use uuid::Uuid;

use super::apply::{Applied, Applier, PageBits};
use super::engine::Engine;
use super::link::{self, Base, Link, decision, word};
use super::path;
use super::rehearse;
use super::step::{ForkCause, ForkError, Moment, Step};
use super::zygote::{Womb, Zygote};
use crate::device::Answer;
use crate::instance::{Action, Birth, Cradle, Instance};
use crate::kvm::{Host, Machine, MachineConfig, Vcpu};
use crate::memory::{Image, Mapping, PAGE, RamLayout, Sealed};
use crate::proto::InstanceConfig;
use crate::sys::{self, KickTimer, futex_wait, futex_wake, now_ns};

/// How long a standby that is awake spins for the next step of the fork before it sleeps. It bounds
/// the damage when it shares its processor with the parent that it waits for.
const SPIN_NS: u64 = 50_000;
/// How long a fork may take from waking up to the last sibling's consent.
const PATIENCE_NS: u64 = 10_000_000_000;

/// How long the first run of a child may take after the guest, or the host, has asked for it.
const FIRST_RUN_US: i64 = 2_000;
const HOST_FIRST_RUN_US: i64 = 500;

/// What the vCPU threads of a standby share while it is one.
#[derive(Debug)]
struct Shared {
    instance: Arc<Instance>,
    /// The parent's link.
    link: Arc<Link>,
    slot: usize,
    /// What the vCPUs are parked with.
    base: Base,
    /// 1 once the leader is awake, and once the parent's state is there. Futexes of the other threads.
    awake: AtomicU32,
    captured: AtomicU32,
    /// The threads meet here around the rehearsal.
    meeting: std::sync::Barrier,
}

/// Makes a standby and lives its life. Runs in the process that the zygote forked.
pub(super) fn run(womb: Womb, slot: usize, parent: Uuid, line: OwnedFd) -> ! {
    let begin = now_ns();
    sys::die_with_parent(true);
    let keep = womb.descriptors(&line);
    // SAFETY: the zygote's socket is forgotten by the caller; nothing else had descriptors.
    unsafe { sys::close_all_but(&keep) };
    sys::set_process_name("ukp-standby");
    let code = match live(womb, slot, parent, line, begin) {
        Ok(code) => code,
        Err(error) => {
            // The parent has the error in the slot; the process has nobody else to tell.
            drop(error);
            1
        }
    };
    std::process::exit(code)
}

fn live(
    womb: Womb,
    slot: usize,
    parent: Uuid,
    line: OwnedFd,
    begin: u64,
) -> Result<i32, ForkError> {
    // Open until the error is told: its end tells the parent that there is nothing more to come.
    let mut line = Some(line);
    let (standby, vcpu) = match prepare(womb, slot, parent, &mut line) {
        Ok(made) => made,
        Err((link, error)) => {
            tell(&link, slot, &error);
            return Err(error);
        }
    };
    // An instance does without its parent's link: nothing here keeps it.
    let link = Arc::downgrade(&standby.shared.link);
    standby.shared.link.slot(slot).prewarm_ns.store(now_ns() - begin, Ordering::Relaxed);
    let told = |error: &ForkError| link.upgrade().map(|link| tell(&link, slot, error));
    standby.park_and_go(vcpu).inspect_err(|error| told(error).unwrap_or(()))
}

/// Leaves the error where the parent finds it, and fails the fork for all siblings.
fn tell(link: &Link, slot: usize, error: &ForkError) {
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

/// A standby, seen from its leader: the thread of vCPU 0.
struct Standby {
    shared: Arc<Shared>,
    applier: Applier,
}

type Failed = (Arc<Link>, ForkError);

fn prepare(
    womb: Womb,
    slot: usize,
    parent: Uuid,
    line: &mut Option<OwnedFd>,
) -> Result<(Standby, Vcpu), Failed> {
    let Womb { host, config, link, image, mapping, owned } = womb;
    let link = Arc::new(link);
    let inherited = Inherited { host, config, image, mapping, owned };
    prepare_with(inherited, &link, slot, parent, line).map_err(|error| (link, error))
}

/// What a standby takes over from its parent's zygote: all but the link.
struct Inherited {
    host: Host,
    config: InstanceConfig,
    image: Option<Image<Sealed>>,
    mapping: Option<Mapping>,
    owned: Option<PageBits>,
}

fn prepare_with(
    inherited: Inherited,
    link: &Arc<Link>,
    slot: usize,
    parent: Uuid,
    line: &mut Option<OwnedFd>,
) -> Result<(Standby, Vcpu), ForkError> {
    fn failed<E: Into<ForkCause>>(cause: E) -> ForkError {
        ForkError { step: Step::Prewarm, cause: cause.into() }
    }
    link.header().fault.check(Step::Prewarm)?;
    // Before there is a second thread: without a handler the signal ends the process.
    sys::install_kick_handler().map_err(failed)?;
    let (identity, base) = link.read_slot(slot, inherited.config.vcpus as usize);
    let (zygote, womb) = zygote_of_child(inherited)?;
    let Womb { host, config, link: own, image, mapping, owned } = womb;
    let (mapping, owned) = mapping.zip(owned).ok_or_else(|| failed(ForkCause::Died))?;
    let made = MachineConfig {
        layout: RamLayout::new(config.memory_mib),
        vcpus: config.vcpus,
        dirty: config.dirty,
        ring_entries: config.ring_entries,
    };
    let (machine, mut vcpus, log) = Machine::new(&host, made, &mapping, true).map_err(failed)?;
    machine.restore_clocks(&vcpus, &base.vm).map_err(failed)?;
    machine.restore_irqchips(&base.vm).map_err(failed)?;
    link.populate(link.header().journal_used.load(Ordering::Relaxed) as usize);
    let mut applier = Applier::new(&mapping, owned);
    for page in link.active_regions().filter(|page| (*page as usize) < mapping.bytes() / PAGE) {
        mapping.look(page);
    }
    for page in link.hot_pages().filter(|page| (*page as usize) < mapping.bytes() / PAGE) {
        applier.touch(&mapping, page);
    }
    let rehearsing = config.rehearse;
    let instance = Instance::assemble(Birth {
        kicks: vcpus.iter_mut().map(Vcpu::kick).collect(),
        config,
        identity,
        parent: Some(parent),
        link: own,
        machine,
        mapping,
        zygote,
        engine: Engine::new(log, base.clone()),
    })
    .map_err(failed)?;
    if let Some(image) = image {
        instance.keep_sealed(image);
    }
    let shared = Arc::new(Shared {
        instance: instance.clone(),
        link: link.clone(),
        slot,
        base,
        awake: AtomicU32::new(0),
        captured: AtomicU32::new(0),
        meeting: Barrier::new(vcpus.len()),
    });
    let line = line.take().ok_or_else(|| failed(ForkCause::Died))?;
    instance
        .start_control(Some(Cradle { link: link.clone(), slot, line }), None)
        .map_err(failed)?;
    let mut vcpus = vcpus.into_iter();
    let mut leader = vcpus.next().ok_or_else(|| failed(ForkCause::Died))?;
    for vcpu in vcpus {
        let shared = shared.clone();
        instance.spawn_vcpu(vcpu.index(), move || follow(shared, vcpu)).map_err(failed)?;
    }
    rehearse::run(&mut leader, &shared.base.vcpus[0], rehearsing).map_err(failed)?;
    shared.meeting.wait();
    for page in rehearse::roll_back(&instance).map_err(failed)? {
        applier.note(page);
    }
    shared.meeting.wait();
    Ok((Standby { shared, applier }, leader))
}

/// Forks the zygote of this standby before anything in it belongs to KVM.
fn zygote_of_child(inherited: Inherited) -> Result<(Zygote, Womb), ForkError> {
    let at = ForkError::at::<sys::SysError>;
    let Inherited { host, mut config, image, mapping, owned } = inherited;
    config.standbys = config.child_standbys;
    config.ring_entries = config.child_ring_entries;
    let link =
        Link::new(link::capacity(config.ring_entries, config.vcpus)).map_err(at(Step::Prewarm))?;
    let womb = Womb { host, config, link, image, mapping, owned };
    // SAFETY: this process was forked from a zygote and has not started a thread.
    unsafe { Zygote::fork(womb) }.map_err(at(Step::Prewarm))
}

impl Standby {
    /// Sleeps until the fork comes, becomes an instance, and runs until that ends.
    fn park_and_go(mut self, mut vcpu: Vcpu) -> Result<i32, ForkError> {
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
        let (rang, first_run_us) = (shared.rang(0), shared.first_run_us(urgent));
        shared.consent()?;
        instance.gate().enter(0);
        if let Some(us) = first_run_us {
            // It cannot fail for a timer that exists, and the fork is decided.
            alarm.set(us).unwrap_or(());
        }
        instance.renew_priority();
        slot.stamps.stamp(Moment::Entered);
        let first = vcpu.run();
        if rang {
            slot.stamps.stamp(Moment::Exited);
        }
        slot.faults
            .store(u32::try_from(sys::minor_faults() - faults).unwrap_or(0), Ordering::Relaxed);
        slot.applied.store(applied.pages, Ordering::Relaxed);
        slot.applied_private.store(applied.private, Ordering::Relaxed);
        slot.cpu_ns.store(sys::cpu_ns(), Ordering::Relaxed);
        instance.engine().born(self.applier.private_pages().collect());
        if rang {
            shared.announce_life();
        }
        let action = instance.after_exit(0, first);
        drop(alarm);
        instance.settle_thread();
        drop(self);
        drop(shared);
        Ok(instance.run_leader(vcpu, action))
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
                    self.apply_to(head)?;
                    let parked = slot.word.compare_exchange(
                        word::SYNC,
                        word::PARKED,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    );
                    if parked.is_ok() {
                        shared.link.ring();
                    }
                    faults = sys::minor_faults();
                }
                word::ANNOUNCED if now_ns() < slot.spin_until_ns.load(Ordering::Relaxed) => {
                    // Instead of spinning on the word alone: it keeps KVM's entry path in caches
                    // and TLB.
                    vcpu.warm_up().map_err(ForkError::at(Step::Wake))?;
                }
                seen => {
                    if seen == word::ANNOUNCED {
                        // A failed exchange means that GO came; the loop sees it.
                        slot.word
                            .compare_exchange(
                                word::ANNOUNCED,
                                word::PARKED,
                                Ordering::AcqRel,
                                Ordering::Acquire,
                            )
                            .unwrap_or(seen);
                        continue;
                    }
                    futex_wait(&slot.word, seen, None);
                }
            }
        }
    }

    /// Applies the pages of the fork while the parent still captures them.
    fn apply_fork(&mut self) -> Result<Applied, ForkError> {
        let shared = self.shared.clone();
        let block = shared.link.fork();
        shared.begin(Step::ApplyPages)?;
        let mut applied = Applied::default();
        shared.wait_while(&block.pages_ready, || {
            let some = self.apply_to(block.head.load(Ordering::Acquire))?;
            applied += some;
            Ok(some.pages > 0)
        })?;
        applied += self.apply_to(block.head.load(Ordering::Acquire))?;
        Ok(applied)
    }

    fn apply_to(&mut self, head: u32) -> Result<Applied, ForkError> {
        let shared = &self.shared;
        let tail = &shared.link.slot(shared.slot).tail;
        let applied = self
            .applier
            .apply(&shared.link, shared.instance.mapping(), tail.load(Ordering::Relaxed), head)
            .map_err(ForkError::at(Step::ApplyPages))?;
        tail.store(head, Ordering::Release);
        Ok(applied)
    }

    fn restore(&mut self, vcpu: &mut Vcpu) -> Result<(), ForkError> {
        let shared = &self.shared;
        let at = |error: crate::kvm::KvmError| ForkError::at(Step::RestoreState)(error);
        shared.begin(Step::RestoreState)?;
        let state = shared.link.read_fork();
        let base = &shared.base.vcpus[0];
        vcpu.restore_most(&state.vcpus[0], Some(base)).map_err(at)?;
        if !state.vm.same_irqchips(&shared.base.vm) {
            shared.instance.machine().restore_irqchips(&state.vm).map_err(at)?;
        }
        shared.wait(|block| &block.rest_ready)?;
        vcpu.restore_rest(&state.vcpus[0], base).map_err(at)?;
        shared.begin(Step::Identity)?;
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

impl Shared {
    /// Says which step this child is at.
    fn begin(&self, step: Step) -> Result<(), ForkError> {
        self.link.slot(self.slot).step.store(step as u32, Ordering::Release);
        self.link.header().fault.check(step)
    }

    fn signal(&self, word: &AtomicU32) {
        word.store(1, Ordering::Release);
        if self.base.vcpus.len() > 1 {
            futex_wake(word);
        }
    }

    /// Tells the parent that the vCPU that rang the doorbell has left the guest in this child.
    fn announce_life(&self) {
        self.link.slot(self.slot).word.store(word::LIVE, Ordering::Release);
        self.link.ring();
    }

    /// Whether it is the first exit of vCPU `index` that tells that the child lives: that of the one
    /// that rang the doorbell, or of the first.
    fn rang(&self, index: usize) -> bool {
        let rang = self.link.fork().vcpu.load(Ordering::Relaxed);
        rang.saturating_sub(1) as usize == index
    }

    /// How long a first run may take. A guest that does not leave by itself is made to: its thread
    /// has a standby's priority still, and somebody waits for a sign of life. After a doorbell the
    /// guest reads the answer at once, and the kernel interrupts an urgent thread that runs for long;
    /// when the host forks the guest may do anything.
    fn first_run_us(&self, urgent: bool) -> Option<i64> {
        let from_host = self.link.fork().vcpu.load(Ordering::Relaxed) == 0;
        if from_host { Some(HOST_FIRST_RUN_US) } else { (!urgent).then_some(FIRST_RUN_US) }
    }

    /// Whether a field of the fork block has the number of this standby's fork.
    fn is_there(&self, field: impl Fn(&link::ForkBlock) -> &AtomicU32) -> bool {
        let number = self.link.slot(self.slot).fork.load(Ordering::Acquire);
        field(self.link.fork()).load(Ordering::Acquire) == number
    }

    /// Waits until a field of the fork block has the number of this standby's fork.
    fn wait(&self, field: impl Fn(&link::ForkBlock) -> &AtomicU32) -> Result<(), ForkError> {
        self.wait_while(field(self.link.fork()), || Ok(false))
    }

    /// The same, with something to do meanwhile, which tells whether it did anything.
    fn wait_while(
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
    fn consent(&self) -> Result<(), ForkError> {
        self.begin(Step::Commit)?;
        // From here on this process outlives its parent, if the fork succeeds.
        sys::die_with_parent(false);
        let block = self.link.fork();
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
            match block.decision.load(Ordering::Acquire) {
                decision::COMMITTED => {
                    self.instance.come_alive();
                    return Ok(());
                }
                seen => {
                    check(block, begin)?;
                    if now_ns() - begin > SPIN_NS {
                        futex_wait(&block.decision, seen, Some(Duration::from_millis(10)));
                    }
                }
            }
        }
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

/// The life of a standby's vCPU other than the leader's.
fn follow(shared: Arc<Shared>, mut vcpu: Vcpu) {
    let instance = shared.instance.clone();
    match follow_to_life(&shared, &mut vcpu) {
        Ok(action) => {
            drop(shared);
            instance.run_vcpu(vcpu, action);
        }
        Err(error) => {
            tell(&shared.link, shared.slot, &error);
            if !instance.gate().quitting() {
                std::process::exit(1);
            }
        }
    }
}

fn follow_to_life(shared: &Shared, vcpu: &mut Vcpu) -> Result<Action, ForkError> {
    let instance = &shared.instance;
    let index = vcpu.index() as usize;
    let base = &shared.base.vcpus[index];
    let rehearsing = instance.config().rehearse;
    rehearse::run(vcpu, base, rehearsing).map_err(ForkError::at(Step::Prewarm))?;
    // Everybody has stopped; the leader rolls memory back.
    shared.meeting.wait();
    shared.meeting.wait();
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
    if rang {
        first_run_us.map_or(Ok(()), |us| alarm.set(us)).unwrap_or(());
    } else {
        // It may run for long: only the one that is waited for has priority.
        instance.settle_thread();
    }
    let first = vcpu.run();
    if rang {
        shared.link.slot(shared.slot).stamps.stamp(Moment::Exited);
        shared.announce_life();
    }
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
