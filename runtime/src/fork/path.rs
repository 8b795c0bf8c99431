//! The fork path: what happens between the doorbell and the parent's return to the guest.
//!
//! It does not log, format, allocate by guest size or read the environment. Each step is stamped.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::engine::Engine;
use super::link::{ForkBlock, Link, decision, word};
use super::shared::fail;
use super::step::{ForkCause, ForkError, Moment, Step};
use crate::device::virtio;
use crate::instance::Instance;
use crate::kvm::{KvmError, Vcpu};
use crate::sys::{current_cpu, futex_wait, futex_wake, now_ns, set_affinity_of};

/// How long the other vCPUs may take to leave the guest.
pub(super) const QUIESCE: Duration = Duration::from_secs(1);
/// How long the parent waits for its children's consent.
const OUTCOME_NS: u64 = 12_000_000_000;
/// How long it spins for it first: a quiet fork is over by then.
const OUTCOME_SPIN_NS: u64 = 150_000;

impl Engine {
    /// Forks. The caller has taken enough standbys ([`Engine::take`]) and is the vCPU that rang the
    /// doorbell, or, without `vcpu`, a thread of the host's side.
    ///
    /// When this returns, all vCPUs of the parent may run; the children are on their way. Whether
    /// they made it says [`Engine::outcome`].
    ///
    /// # Errors
    ///
    /// The step that failed. The standbys are gone then, the parent is as before.
    pub fn fork(
        &mut self,
        instance: &Instance,
        mut vcpu: Option<&mut Vcpu>,
        doorbell_ns: u64,
    ) -> Result<(), ForkError> {
        let link = instance.link();
        let block = self.begin(link, vcpu.as_ref().map(|vcpu| vcpu.index()), doorbell_ns);
        let fault = &link.header().fault;

        fault.check(Step::Wake)?;
        self.wake(instance);
        block.stamps.stamp(Moment::Woken);

        fault.check(Step::Quiesce)?;
        let own = vcpu.as_ref().map(|vcpu| vcpu.index() as usize);
        let stopped = instance.gate().stop(own, QUIESCE).ok_or_else(|| {
            let waited_ms = u64::try_from(QUIESCE.as_millis()).unwrap_or(u64::MAX);
            ForkError { step: Step::Quiesce, cause: ForkCause::Timeout { waited_ms } }
        })?;
        let devices = instance.quiet_devices();
        block.stamps.stamp(Moment::Quiesced);

        fault.check(Step::Settle)?;
        if let Some(vcpu) = &mut vcpu {
            vcpu.settle().map_err(ForkError::at(Step::Settle))?;
        }
        block.stamps.stamp(Moment::Settled);

        fault.check(Step::CapturePages)?;
        self.capture_pages(instance).map_err(ForkError::at(Step::CapturePages))?;
        publish(block, &block.pages_ready);
        block.stamps.stamp(Moment::Pages);

        fault.check(Step::CaptureState)?;
        capture_state(instance, &mut vcpu, devices.as_ref())
            .map_err(ForkError::at(Step::CaptureState))?;
        publish(block, &block.state_ready);
        capture_rest(link, vcpu).map_err(ForkError::at(Step::CaptureState))?;
        publish(block, &block.rest_ready);
        block.stamps.stamp(Moment::Released);

        drop(devices);
        drop(stopped);
        Ok(())
    }

    /// Wakes the standbys of this fork, on any processor but this one: the scheduler would like to
    /// put them here, where they would wait for us or, with real-time priority, push us aside.
    fn wake(&self, instance: &Instance) {
        let here = current_cpu();
        instance.link().header().vcpu_cpu.store(here + 1, Ordering::Relaxed);
        let elsewhere = instance.standby_cpus() & !(1_u64 << (here % 64));
        for slot in self.flight_slots() {
            let slot = instance.link().slot(slot);
            if elsewhere != 0 && slot.avoids.swap(here + 1, Ordering::Relaxed) != here + 1 {
                let tid = slot.tid.load(Ordering::Relaxed).cast_signed();
                // A thread that is gone is found dead by `outcome`.
                set_affinity_of(tid, elsewhere).unwrap_or(());
            }
            // A standby that spins sees the word; one that sleeps needs the call.
            if slot.word.swap(word::GO, Ordering::AcqRel) != word::ANNOUNCED {
                futex_wake(&slot.word);
            }
        }
    }

    /// Waits until the children of the fork under way have agreed to run, or one has failed.
    ///
    /// # Errors
    ///
    /// The step that failed, in whichever process.
    pub fn outcome(&mut self, link: &Link) -> Result<(), ForkError> {
        let block = link.fork();
        let begin = now_ns();
        loop {
            let seen = block.decision.load(Ordering::Acquire);
            if seen == decision::COMMITTED {
                return Ok(());
            }
            if let Some(failure) = failure(seen) {
                return Err(failure);
            }
            let waited = now_ns() - begin;
            if waited > OUTCOME_NS {
                fail(link, Step::Commit, libc::ETIMEDOUT);
            } else if waited > OUTCOME_SPIN_NS {
                futex_wait(&block.decision, seen, Some(Duration::from_millis(2)));
                if let Some(step) = self.flight_died(link) {
                    fail(link, step, libc::ECHILD);
                }
            }
        }
    }
}

/// Makes a field of the fork block say that its part is there.
fn publish(block: &ForkBlock, field: &std::sync::atomic::AtomicU32) {
    let number = block.number.load(Ordering::Relaxed);
    field.store(number, Ordering::SeqCst);
    if block.sleepers.load(Ordering::SeqCst) > 0 {
        futex_wake(field);
    }
}

/// Puts the state of all vCPUs and the interrupt controllers into the fork block. The other vCPUs
/// saved theirs when they stopped.
fn capture_state(
    instance: &Instance,
    vcpu: &mut Option<&mut Vcpu>,
    devices: Option<&virtio::Quiet<'_>>,
) -> Result<(), KvmError> {
    instance.link().write_fork(|state| {
        let own = vcpu.as_ref().map(|vcpu| vcpu.index() as usize);
        // Who stops after another one may have sent it an interrupt that what it saved does not show.
        // With two, the one that rang the doorbell was out of the guest before the other stopped.
        let rang_alone = own.is_some() && instance.vcpus() == 2;
        for index in (0..instance.vcpus()).filter(|index| Some(*index) != own) {
            let gate = instance.gate();
            gate.with_saved(index, |saved| state.vcpus[index].copy_from(saved));
            if !rang_alone || gate.is_held(index) {
                instance.machine().save_lapic_again(index, &mut state.vcpus[index])?;
            }
        }
        if let Some(vcpu) = vcpu {
            vcpu.save_most(&mut state.vcpus[vcpu.index() as usize])?;
        }
        state.serial = instance.serial().save();
        if let Some(devices) = devices {
            state.virtio = devices.save();
        }
        instance.machine().save_irqchips(&mut state.vm)
    })
}

/// What hardly ever changes follows while the children take in the rest.
fn capture_rest(link: &Link, vcpu: Option<&mut Vcpu>) -> Result<(), KvmError> {
    let Some(vcpu) = vcpu else { return Ok(()) };
    link.write_fork(|state| vcpu.save_rest(&mut state.vcpus[vcpu.index() as usize]))
}

/// The failure that a decision carries.
pub(super) fn failure(word: u32) -> Option<ForkError> {
    let (step, errno) = decision::failure(word)?;
    let step = Step::from_number(step).unwrap_or(Step::Commit);
    let cause = if errno == libc::ECHILD { ForkCause::Died } else { ForkCause::Child { errno } };
    Some(ForkError { step, cause })
}
