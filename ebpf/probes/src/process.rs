//! Which processes are ours: those registered, and what they fork.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf_common::{Role, Thread, lost};

use crate::maps::{BLANK, PROCESSES, THREADS, lose, task_pid, task_tgid};
use crate::record::{ids, known, this};

/// Process and thread of a `task_struct`.
#[inline(always)]
pub fn ids_of(task: u64) -> Option<(u32, u32)> {
    let word = size_of::<u32>() as u32;
    if task_tgid() == task_pid() + word {
        let [tid, pid] = read::<[u32; 2]>(task, task_pid())?;
        return Some((pid, tid));
    }
    Some((read(task, task_tgid())?, read(task, task_pid())?))
}

#[inline(always)]
fn read<T>(task: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper copes with every address.
    unsafe { bpf_probe_read_kernel((task + u64::from(offset)) as *const T) }.ok()
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
    let (Some((parent, by)), Some((pid, tid))) = (ids_of(parent), ids_of(child)) else { return 0 };
    let Some(beacon) = PROCESSES.get_ptr(&parent) else { return 0 };
    // SAFETY: an element of a map that is not freed while this program runs.
    let beacon = unsafe { *beacon };
    let (mut role, mut born_ns) = (Role::Unknown as u64, 0);
    if parent == pid
        && let Some(by) = known(parent, by)
    {
        (role, born_ns) = (by.role, by.born_ns);
    }
    let Some(blank): Option<*mut Thread> = BLANK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this processor's own slot, which no interrupt uses.
    let blank = unsafe { &mut *blank };
    (blank.pid, blank.tid) = (pid, tid);
    (blank.beacon, blank.role, blank.born_ns) = (beacon, role, born_ns);
    // It takes the place of one that has ended and had the same number. A process without a thread would
    // never be seen to end.
    if THREADS.insert(&tid, &*blank, 0).is_err() {
        lose(lost::THREADS);
    } else if parent != pid && PROCESSES.insert(&pid, &beacon, 0).is_err() {
        lose(lost::PROCESSES);
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
    if let Some(thread) = this() {
        if let Some(beacon) = PROCESSES.get_ptr_mut(&thread.pid) {
            // SAFETY: an element of a map that is not freed while this program runs.
            unsafe { *beacon = 0 };
        }
        (thread.beacon, thread.role, thread.born_ns) = (0, Role::Unknown as u64, 0);
    }
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(_ctx: RawTracePointContext) -> i32 {
    exited()
}

/// Of a process the first thread counts: when it ends, the others are about to. What was counted of a
/// thread stays until the loader has read it.
#[inline(always)]
fn exited() -> i32 {
    let (pid, tid) = ids();
    if let Some(thread) = known(pid, tid) {
        thread.tid = 0;
        if thread.used == 0 {
            // An error: the loader was faster.
            THREADS.remove(&tid).unwrap_or(());
        }
    }
    if pid == tid {
        // An error: it is none of ours.
        PROCESSES.remove(&pid).unwrap_or(());
    }
    0
}
