//! What a thread waits for the end of.

use ebpf_common::{Begun, Kind, Thread, lost};

use crate::maps::{BLANK, SINCE, THREADS, lose};
use crate::record::now;

/// Something begins.
#[inline(always)]
pub fn begin(kind: Kind, (pid, tid): (u32, u32), what: u64, code: u64) {
    let begun = Begun { ns: now(), what, code };
    let Some(thread) = THREADS.get_ptr_mut(&tid).or_else(|| {
        expect(pid, tid);
        THREADS.get_ptr_mut(&tid)
    }) else {
        return;
    };
    // SAFETY: an element of the map, which is not freed while this program runs, and which only
    // this thread's programs write.
    unsafe { (*thread).begun[kind as usize] = begun };
}

/// It ends: what had begun, and how long it took.
#[inline(always)]
pub fn end(kind: Kind, tid: u32) -> Option<(Begun, u64)> {
    let thread = THREADS.get_ptr_mut(&tid)?;
    // SAFETY: as in `begin`.
    let begun = unsafe { (*thread).begun[kind as usize] };
    // What began before these programs were attached may have ended meanwhile, unseen.
    if begun.ns == 0 || begun.ns < SINCE.get(kind as u32).copied().unwrap_or(0) {
        return None;
    }
    // SAFETY: as in `begin`.
    unsafe { (*thread).begun[kind as usize].ns = 0 };
    Some((begun, now().saturating_sub(begun.ns)))
}

/// There is a new thread of ours.
#[inline(always)]
pub fn expect(pid: u32, tid: u32) {
    let Some(blank): Option<*mut Thread> = BLANK.get_ptr_mut(0) else { return };
    // SAFETY: this processor's own slot, of which nothing else is ever written.
    let blank = unsafe { &mut *blank };
    blank.pid = pid.into();
    // It takes the place of one that has ended and had the same number.
    if THREADS.insert(&tid, &*blank, 0).is_err() {
        lose(lost::THREADS);
    } else if let Some(thread) = THREADS.get_ptr_mut(&tid) {
        // Once more: an interrupt may have expected another thread in between.
        // SAFETY: as in `begin`.
        unsafe { (*thread).pid = pid.into() };
    }
}

/// A thread has ended. What was counted of it stays until the loader has read it.
#[inline(always)]
pub fn forget(tid: u32) {
    if let Some(thread) = THREADS.get_ptr_mut(&tid) {
        // SAFETY: as in `begin`.
        let thread: &mut Thread = unsafe { &mut *thread };
        if thread.used == 0 {
            // An error: the loader was faster.
            THREADS.remove(&tid).unwrap_or(());
        }
    }
}
