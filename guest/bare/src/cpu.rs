//! The time-stamp counter.
#![expect(unsafe_code, reason = "the time-stamp counter is read by an intrinsic")]

use core::arch::x86_64::{_mm_lfence, _mm_pause, _rdtsc};

/// The time-stamp counter, not read ahead of earlier instructions: without the fence a reading may
/// be taken before the one that precedes it in the program, and a step back in time is what some
/// operations look for.
pub(crate) fn tsc() -> u64 {
    // SAFETY: SSE2 is part of the baseline.
    unsafe { _mm_lfence() };
    // SAFETY: CR4.TSD is clear in the entry state, so CPL 3 may read the counter.
    unsafe { _rdtsc() }
}

/// Lets `ticks` pass.
pub(crate) fn wait(ticks: u64) {
    let start = tsc();
    while tsc().wrapping_sub(start) < ticks {
        relax();
    }
}

/// Tells the core that this is a waiting loop.
pub(crate) fn relax() {
    _mm_pause();
}
