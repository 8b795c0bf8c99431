//! What KVM does for a guest of ours.
//!
//! Raw tracepoints everywhere: KVM may be a module, whose types are not those of the kernel.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf_common::{EventKind, Kind, Metric};

use crate::begun;
use crate::record::{current, current_now, event, send, this, took, traced};

/// Bit of a fault's code: by a user.
const USER: u64 = 4;
/// Our own number of having no reason.
const INTERRUPTED: u32 = 0xff;
/// Who walked the page tables of a fault.
const BY_PROCESSOR: u64 = 1;

/// What the guest waited for until now was no fault. Instances count their exits themselves; they are
/// sent if that is asked for.
#[raw_tracepoint(tracepoint = "kvm_userspace_exit")]
pub fn kvm_userspace_exit(ctx: RawTracePointContext) -> i32 {
    if let Some(thread) = this() {
        begun::forget(thread, Kind::Kvm);
        if traced() {
            let current = current_now(thread);
            let errno: i32 = ctx.arg(1);
            // Interrupted before it had a reason.
            let reason = if errno < 0 { INTERRUPTED } else { ctx.arg::<u32>(0) & 0xff };
            send(thread, &current, 0, event(EventKind::Exit, reason.into(), 0));
        }
    }
    0
}

/// Where the guest's page tables are walked in software: it begins.
///
/// KVM walks them for itself, too, when it emulates an instruction: the fetch looks like a fault, and maps
/// nothing. What it reads as the processor would, of a TSS at each access to a port, has no bit of a user;
/// a fault of a guest that runs where user programs do has it always.
#[raw_tracepoint(tracepoint = "kvm_mmu_pagetable_walk")]
pub fn kvm_walk(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<u64>(1) & USER != 0
        && let Some(thread) = this()
    {
        begun::begin(thread, Kind::Kvm, ctx.arg(0), 0);
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
    if let Some(thread) = this() {
        begun::begin(thread, Kind::Kvm, ctx.arg(1), BY_PROCESSOR);
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
    if let Some(thread) = this()
        && let Some(fault) = begun::end(thread, Kind::Kvm)
        && (mapped.is_some() || fault.code == BY_PROCESSOR)
    {
        let current = current(thread, fault.now);
        let event = event(EventKind::KvmFault, mapped.unwrap_or(fault.what), 0);
        took(thread, &current, Metric::KvmFault, fault.ns, event);
    }
    0
}
