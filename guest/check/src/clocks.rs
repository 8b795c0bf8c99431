//! The clocks, read again and again, and set wrong.

use std::io::stdin;

use anyhow::Result;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::say;

const SECOND: i64 = 1_000_000_000;

fn ns(id: ClockId) -> i64 {
    let time = clock_gettime(id);
    time.tv_sec * SECOND + time.tv_nsec
}

/// Says the wall clock and the monotonic clock, in nanoseconds, for each line that is read.
pub fn stream() -> Result<()> {
    for line in stdin().lines() {
        line?;
        let (real, monotonic) = (ns(ClockId::Realtime), ns(ClockId::Monotonic));
        say::here(&[("clock", format!("{real} {monotonic}"))])?;
    }
    Ok(())
}

/// Puts the wall clock forward.
pub fn shift(milliseconds: i64) -> Result<()> {
    let time = ns(ClockId::Realtime) + milliseconds * 1_000_000;
    let (tv_sec, tv_nsec) = (time.div_euclid(SECOND), time.rem_euclid(SECOND));
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?)
}
