//! What KVM does for a guest of ours.
//!
//! Raw tracepoints everywhere: KVM may be a module, whose types are not those of the kernel.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf_common::{EventKind, Kind, Metric};

use crate::begun;
use crate::record::{count, current, event, ids, is_ours, send, took};

/// Our own number of having no reason.
const INTERRUPTED: u32 = 0xff;
/// Who walked the page tables of a fault.
const BY_PROCESSOR: u64 = 1;

#[raw_tracepoint(tracepoint = "kvm_userspace_exit")]
pub fn kvm_userspace_exit(ctx: RawTracePointContext) -> i32 {
    if let Some(current) = current() {
        let reason: u32 = ctx.arg(0);
        let errno: i32 = ctx.arg(1);
        // Interrupted before it had a reason.
        let reason = if errno < 0 { INTERRUPTED } else { reason & 0xff };
        count(&current, Metric::Exits as u8, reason.into());
        // What the guest waited for until now was no fault.
        begun::end(Kind::Kvm, current.tid);
        send(&current, 0, event(EventKind::Exit, reason.into(), 0));
    }
    0
}

/// Where the guest's page tables are walked in software: it begins.
#[raw_tracepoint(tracepoint = "kvm_mmu_pagetable_walk")]
pub fn kvm_walk(ctx: RawTracePointContext) -> i32 {
    let (pid, tid) = ids();
    if is_ours(pid) {
        begun::begin(Kind::Kvm, (pid, tid), ctx.arg(0), 0);
    }
    0
}

/// It ends: `gfn` is mapped.
#[raw_tracepoint(tracepoint = "kvm_mmu_set_spte")]
pub fn kvm_set_spte(ctx: RawTracePointContext) -> i32 {
    ends(Some(ctx.arg::<u64>(1) << 12))
}

/// Where the processor walks them: it begins.
#[raw_tracepoint(tracepoint = "kvm_page_fault")]
pub fn kvm_page_fault(ctx: RawTracePointContext) -> i32 {
    let (pid, tid) = ids();
    if is_ours(pid) {
        begun::begin(Kind::Kvm, (pid, tid), ctx.arg(1), BY_PROCESSOR);
    }
    0
}

/// It ends.
#[raw_tracepoint(tracepoint = "kvm_entry")]
pub fn kvm_entry(_ctx: RawTracePointContext) -> i32 {
    ends(None)
}

/// At an address of the guest that was mapped; or, without, before the guest goes on. Then a walk in
/// software that has not ended has mapped nothing: it was no fault.
#[inline(always)]
fn ends(mapped: Option<u64>) -> i32 {
    let (pid, tid) = ids();
    if is_ours(pid)
        && let Some((begun, ns)) = begun::end(Kind::Kvm, tid)
        && (mapped.is_some() || begun.code == BY_PROCESSOR)
        && let Some(current) = current()
    {
        let address = mapped.unwrap_or(begun.what);
        took(&current, Metric::KvmFault, ns, event(EventKind::KvmFault, address, 0));
    }
    0
}
