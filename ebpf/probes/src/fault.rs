//! Page faults of our processes.

use aya_ebpf::macros::{fexit, perf_event, raw_tracepoint};
use aya_ebpf::programs::{FExitContext, PerfEventContext, RawTracePointContext};
use ebpf_common::{EventKind, Kind, Metric, Thread};

use crate::begun;
use crate::maps::faults_end;
use crate::record::{current, event, now, this, took};

/// Bits of the error code: the page was there, it was a write.
const PRESENT: u64 = 1;
const WRITE: u64 = 2;

#[raw_tracepoint(tracepoint = "page_fault_user")]
pub fn fault_user(ctx: RawTracePointContext) -> i32 {
    begins(ctx.arg(0), ctx.arg(2))
}

#[raw_tracepoint(tracepoint = "page_fault_kernel")]
pub fn fault_kernel(ctx: RawTracePointContext) -> i32 {
    begins(ctx.arg(0), ctx.arg(2))
}

/// Where the kernel allows it: cheaper than the events of its own counters.
#[fexit(function = "handle_mm_fault")]
pub fn fault_handled(ctx: FExitContext) -> i32 {
    const REGISTERS: usize = 3;
    const RESULT: usize = 4;
    const MAJOR: u64 = 4;
    // As in mm_account_fault of mm/memory.c: those that failed, and those that are tried again.
    const ERROR: u64 = 0x1 | 0x2 | 0x10 | 0x20 | 0x40 | 0x800;
    const RETRY: u64 = 0x400;
    const FLAGS: usize = 2;
    const TRIED: u64 = 0x20;
    let (registers, result): (u64, u64) = (ctx.arg(REGISTERS), ctx.arg(RESULT));
    // Without registers it is not a fault of the thread's own.
    if registers != 0 && result & (ERROR | RETRY) == 0 {
        // As the kernel counts: who tries again has waited for a disk.
        let flags: u64 = ctx.arg(FLAGS);
        ends(result & MAJOR != 0 || flags & TRIED != 0);
    }
    0
}

#[perf_event]
pub fn fault_minor(_ctx: PerfEventContext) -> u32 {
    ends(false)
}

#[perf_event]
pub fn fault_major(_ctx: PerfEventContext) -> u32 {
    ends(true)
}

#[inline(always)]
fn begins(address: u64, code: u64) -> i32 {
    let Some(thread) = this() else { return 0 };
    if faults_end() == 0 {
        counted(thread, address, code, false, 0, now());
    } else {
        begun::begin(thread, Kind::Fault, address, code);
    }
    0
}

#[inline(always)]
fn ends(major: bool) -> u32 {
    if let Some(thread) = this()
        && let Some(fault) = begun::end(thread, Kind::Fault)
    {
        counted(thread, fault.what, fault.code, major, fault.ns, fault.now);
    }
    0
}

#[inline(always)]
fn counted(thread: &mut Thread, address: u64, code: u64, major: bool, ns: u64, now: u64) {
    let current = current(thread, now);
    let offset = address.wrapping_sub(current.beacon.guest_start);
    let guest = offset < current.beacon.guest_len;
    let copied = code & (PRESENT | WRITE) == PRESENT | WRITE;
    let metric = match (guest, major, copied) {
        (true, true, _) => Metric::GuestMajor,
        (true, false, true) => Metric::GuestCow,
        (true, false, false) => Metric::GuestMinor,
        (false, true, _) => Metric::OwnMajor,
        (false, false, true) => Metric::OwnCow,
        (false, false, false) => Metric::OwnMinor,
    };
    let what = if guest { offset } else { address };
    let detail = code & 0xffff_ffff | (metric as u64) << 32;
    took(thread, &current, metric, ns, event(EventKind::Fault, what, detail));
}
