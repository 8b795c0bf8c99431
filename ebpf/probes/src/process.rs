//! Which processes are ours: those registered, and what they fork.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf_common::{Role, Tracked, lost};

use crate::begun;
use crate::maps::{PROCESSES, lose, task_pid, task_tgid};
use crate::record::ids;

/// The thread's id of a `task_struct`.
#[inline(always)]
pub fn task_pid_of(task: u64) -> Option<u32> {
    // SAFETY: the helper copes with every address.
    unsafe { bpf_probe_read_kernel((task + u64::from(task_pid())) as *const u32) }.ok()
}

/// The process's id of a `task_struct`.
#[inline(always)]
pub fn task_tgid_of(task: u64) -> Option<u32> {
    // SAFETY: the helper copes with every address.
    unsafe { bpf_probe_read_kernel((task + u64::from(task_tgid())) as *const u32) }.ok()
}

#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn process_fork(ctx: RawTracePointContext) -> i32 {
    forked(ctx.arg(0), ctx.arg(1))
}

/// Memory is copied, and with it what the process says about itself, at the same address.
///
/// The new thread's entry is made here, where nobody waits: an insertion costs a microsecond.
#[inline(always)]
fn forked(parent: u64, child: u64) -> i32 {
    let (Some(parent), Some(pid), Some(tid)) =
        (task_tgid_of(parent), task_tgid_of(child), task_pid_of(child))
    else {
        return 0;
    };
    let Some(tracked) = PROCESSES.get_ptr(&parent) else { return 0 };
    begun::expect(pid, tid);
    if parent != pid {
        // SAFETY: an element of a map that is not freed while this program runs.
        let beacon = unsafe { (*tracked).beacon };
        let tracked = Tracked { beacon, role: Role::Unknown as u64, born_ns: 0 };
        if PROCESSES.insert(&pid, &tracked, 0).is_err() {
            lose(lost::PROCESSES);
        }
    }
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn process_exec(_ctx: RawTracePointContext) -> i32 {
    executed()
}

/// Its memory is another, and where it says what about itself is not known.
#[inline(always)]
fn executed() -> i32 {
    let (pid, _) = ids();
    if let Some(tracked) = PROCESSES.get_ptr_mut(&pid) {
        // SAFETY: an element of a map that is not freed while this program runs.
        let tracked = unsafe { &mut *tracked };
        tracked.beacon = 0;
        tracked.role = Role::Unknown as u64;
        tracked.born_ns = 0;
    }
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(_ctx: RawTracePointContext) -> i32 {
    exited()
}

/// Of a process the first thread counts: when it ends, the others are about to. They may come later,
/// and what they began is forgotten whoever they belong to.
#[inline(always)]
fn exited() -> i32 {
    let (pid, tid) = ids();
    begun::forget(tid);
    if pid == tid {
        // An error: it is none of ours.
        PROCESSES.remove(&pid).unwrap_or(());
    }
    0
}
