//! Time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How long anything may take: in the nested host a boot takes 10 to 40 s.
pub(super) const LONG: Duration = Duration::from_mins(3);

/// The clock of the engine's reports, in nanoseconds.
pub(super) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

/// A time in µs.
pub(super) fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// From one moment of the engine's clock to another, in µs.
#[expect(clippy::cast_precision_loss, reason = "2^53 ns are 104 days")]
pub(super) fn us_between(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e3
}
