//! What a thread waits for the end of.

use ebpf_common::{Begun, Kind, Thread};

use crate::maps::settings;
use crate::record::now;

/// Something that has ended.
pub struct Ended {
    pub what: u64,
    pub code: u64,
    /// How long it took.
    pub ns: u64,
    /// When.
    pub now: u64,
}

/// Something begins.
#[inline(always)]
pub fn begin(thread: &mut Thread, kind: Kind, what: u64, code: u64) {
    thread.begun[kind as usize] = Begun { ns: now(), what, code };
}

/// It ends, if it had begun.
#[inline(always)]
pub fn end(thread: &mut Thread, kind: Kind) -> Option<Ended> {
    let begun = thread.begun[kind as usize];
    // What began before these programs were attached may have ended meanwhile, unseen.
    if begun.ns == 0 || settings().is_none_or(|settings| begun.ns < settings.since[kind as usize]) {
        return None;
    }
    forget(thread, kind);
    let now = now();
    Some(Ended { what: begun.what, code: begun.code, ns: now.saturating_sub(begun.ns), now })
}

/// Nothing has begun.
#[inline(always)]
pub fn forget(thread: &mut Thread, kind: Kind) {
    thread.begun[kind as usize].ns = 0;
}
