//! What a thread waits for the end of.

use ebpf_common::{Begun, lost};

use crate::maps::{BEGUN, lose};
use crate::record::now;

/// What can be under way in one thread at the same time.
#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Kind {
    Fault = 0,
    Kvm = 1,
    Wake = 2,
    Call = 3,
}

#[inline(always)]
fn key(kind: Kind, tid: u32) -> u64 {
    (kind as u64) << 32 | u64::from(tid)
}

/// Something begins.
#[inline(always)]
pub fn begin(kind: Kind, tid: u32, what: u64, code: u64) {
    let begun = Begun { ns: now(), what, code };
    let key = key(kind, tid);
    if let Some(place) = BEGUN.get_ptr_mut(&key) {
        // SAFETY: an element of the map that only this thread's programs write.
        unsafe { *place = begun };
    } else if BEGUN.insert(&key, &begun, 0).is_err() {
        lose(lost::BEGUN);
    }
}

/// It ends: what had begun, and how long it took.
#[inline(always)]
pub fn end(kind: Kind, tid: u32) -> Option<(Begun, u64)> {
    let place = BEGUN.get_ptr_mut(&key(kind, tid))?;
    // SAFETY: as in `begin`.
    let begun = unsafe { *place };
    if begun.ns == 0 {
        return None;
    }
    // SAFETY: as in `begin`.
    unsafe { (*place).ns = 0 };
    Some((begun, now().saturating_sub(begun.ns)))
}

/// There is a new thread of ours.
#[inline(always)]
pub fn expect(tid: u32) {
    let nothing = Begun { ns: 0, what: 0, code: 0 };
    for kind in [Kind::Fault, Kind::Kvm, Kind::Wake] {
        // Without room it is tried again when something begins, and lost then.
        BEGUN.insert(&key(kind, tid), &nothing, 0).unwrap_or(());
    }
}

/// A thread has ended.
#[inline(always)]
pub fn forget(tid: u32) {
    for kind in [Kind::Fault, Kind::Kvm, Kind::Wake, Kind::Call] {
        // An error: nothing had ever begun.
        BEGUN.remove(&key(kind, tid)).unwrap_or(());
    }
}
