//! Running ahead: a standby runs once from its base state until it first leaves the guest, with
//! every side effect suppressed, and is then put back.
//!
//! What stays is what the child will need: page tables, private copies of the pages it writes, and
//! KVM's translations of both. The dirty log names the pages that changed; their old contents come
//! from the standby's own zygote, whose memory is the same and which never runs.
#![expect(unsafe_code, reason = "copies guest memory from the zygote")]

use super::step::ForkCause;
use crate::instance::Instance;
use crate::kvm::{Vcpu, VcpuState, VmState};
use crate::memory::BackingKind;
use crate::sys::{self, KickTimer};

/// How long a rehearsal may run. A guest that computes without leaving is stopped here.
const LIMIT_US: i64 = 300;

/// Gives `vcpu` the state `base` and, if `rehearsing`, runs it to its first exit, twice: the first
/// run takes the faults, the second finds everything in place and warms what the first's faults
/// threw out. Whatever the exit asks for is not done: a port write goes nowhere, a port read gives
/// what the page held before.
///
/// Afterwards only what differs is set back: setting segment and control registers again would make
/// KVM drop the page tables that this was all about.
pub(super) fn run(vcpu: &mut Vcpu, base: &VcpuState, rehearsing: bool) -> Result<(), ForkCause> {
    vcpu.restore(base, None)?;
    if rehearsing {
        for _ in 0..2 {
            let timer = KickTimer::new()?;
            timer.set(LIMIT_US)?;
            vcpu.run()?;
            drop(timer);
            put_back(vcpu, base)?;
        }
    }
    Ok(())
}

/// Gives `vcpu` the state `base` again.
pub(super) fn put_back(vcpu: &mut Vcpu, base: &VcpuState) -> Result<(), ForkCause> {
    let mut after = Box::new(VcpuState::default());
    vcpu.settle()?;
    vcpu.save(&mut after)?;
    vcpu.restore(base, Some(&after))?;
    Ok(())
}

/// Undoes what rehearsals did to memory and interrupt controllers, and returns the pages. All vCPUs of
/// the standby are stopped.
///
/// The pages are not write-protected again: they stay writable, so that the child takes no fault on
/// them, and are counted as dirty from the start.
pub(super) fn roll_back(instance: &Instance, base: &VmState) -> Result<Vec<u32>, ForkCause> {
    // The guest reaches them without an exit.
    let mut after = VmState::default();
    instance.machine().save_irqchips(&mut after)?;
    if !after.same_irqchips(base) {
        instance.machine().restore_irqchips(base)?;
    }
    let mut engine = instance.engine();
    let pages = engine.rehearsed(instance)?;
    let ranges: Vec<_> = pages.iter().map(|page| instance.mapping().iovec(*page)).collect();
    let zygote = instance.zygote_pid().ok_or(ForkCause::ZygoteGone)?;
    // SAFETY: pages of our own mapping; no vCPU runs and no device is alive yet.
    match unsafe { sys::copy_from_twin(zygote, &ranges) } {
        // The kernel found no page of ours to copy to.
        Err(error)
            if instance.mapping().kind() == BackingKind::Hugetlb
                && error.source.kind() == std::io::ErrorKind::UnexpectedEof =>
        {
            Err(ForkCause::PoolEmpty)
        }
        copied => Ok(copied.map(|()| pages)?),
    }
}
