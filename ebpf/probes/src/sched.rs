//! How long a thread of ours that was woken waits for a processor.
//!
//! It begins with `sched_waking`, in whoever wakes it. `sched_wakeup` comes later for a processor that
//! is idle: there, after the interrupt that ends its sleep, which is most of the wait (`ttwu_queue` in
//! kernel/sched/core.c).
//!
//! When a thread is about to run, memory is still that of the one before it. What its process says
//! about itself is read when one of its threads leaves its processor: it may have become another since
//! anything of it was counted.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf_common::{EventKind, Kind, Metric};

use crate::begun;
use crate::process::ids_of;
use crate::record::{Current, SILENT, event, known, look, this, took};

#[raw_tracepoint(tracepoint = "sched_waking")]
pub fn sched_waking(ctx: RawTracePointContext) -> i32 {
    woken(ctx.arg(0))
}

#[raw_tracepoint(tracepoint = "sched_switch")]
pub fn sched_switch(ctx: RawTracePointContext) -> i32 {
    // This moment is still the one's that leaves.
    if let Some(leaving) = this() {
        look(leaving);
        // Woken while it ran or could run: it did not wait for that.
        begun::forget(leaving, Kind::Wake);
    }
    runs(ctx.arg(2))
}

#[inline(always)]
fn woken(task: u64) -> i32 {
    if let Some((pid, tid)) = ids_of(task)
        && let Some(thread) = known(pid, tid)
    {
        begun::begin(thread, Kind::Wake, 0, 0);
    }
    0
}

#[inline(always)]
fn runs(task: u64) -> i32 {
    if let Some((pid, tid)) = ids_of(task)
        // Of the idle ones there is none.
        && tid != 0
        && let Some(thread) = known(pid, tid)
        && let Some(wait) = begun::end(thread, Kind::Wake)
    {
        let current = Current { beacon: SILENT, role: thread.role_at(wait.now) };
        took(thread, &current, Metric::OffCpu, wait.ns, event(EventKind::OffCpu, 0, 0));
    }
    0
}
