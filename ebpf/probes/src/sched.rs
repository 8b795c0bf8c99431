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
use crate::maps::PROCESSES;
use crate::process::{task_pid_of, task_tgid_of};
use crate::record::{Current, SILENT, current, event, is_ours, now, took};

#[raw_tracepoint(tracepoint = "sched_waking")]
pub fn sched_waking(ctx: RawTracePointContext) -> i32 {
    woken(ctx.arg(0))
}

#[raw_tracepoint(tracepoint = "sched_switch")]
pub fn sched_switch(ctx: RawTracePointContext) -> i32 {
    // This moment is still the one's that leaves.
    if let Some(leaving) = current() {
        // Woken while it ran or could run: it did not wait for that.
        begun::end(Kind::Wake, leaving.tid);
    }
    runs(ctx.arg(2))
}

#[inline(always)]
fn woken(task: u64) -> i32 {
    if let Some(pid) = task_tgid_of(task)
        && is_ours(pid)
        && let Some(tid) = task_pid_of(task)
    {
        begun::begin(Kind::Wake, (pid, tid), 0, 0);
    }
    0
}

#[inline(always)]
fn runs(task: u64) -> i32 {
    if let Some(pid) = task_tgid_of(task)
        && let Some(tracked) = PROCESSES.get_ptr(&pid)
        && let Some(tid) = task_pid_of(task)
        && let Some((_, ns)) = begun::end(Kind::Wake, tid)
    {
        // SAFETY: an element of a map that is not freed while this program runs.
        let role = unsafe { &*tracked }.role_at(now());
        let current = Current { pid, tid, beacon: SILENT, role };
        took(&current, Metric::OffCpu, ns, event(EventKind::OffCpu, 0, 0));
    }
    0
}
