//! Open loop: forks start on a fixed schedule, and wait for nobody.
//!
//! In a closed loop a slow fork delays the next one, and the forks that a user would have wanted in
//! the meantime are never measured (*coordinated omission*, G. Tene). In an open loop fork i is due
//! at start + i × interval whatever happened before, and its latency counts from then.

use std::time::{Duration, Instant};

/// A fixed schedule.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    start: Instant,
    interval: Duration,
}

impl Schedule {
    /// Fork 0 is due at `start`, each next one `interval_us` µs later.
    #[must_use]
    pub fn new(start: Instant, interval_us: u32) -> Self {
        Self { start, interval: Duration::from_micros(u64::from(interval_us)) }
    }

    /// When fork `index` is due.
    #[must_use]
    pub fn due(&self, index: u32) -> Instant {
        self.start + self.interval * index
    }

    /// Sleeps until fork `index` is due; returns at once if that is over.
    pub fn wait(&self, index: u32) {
        std::thread::sleep(self.due(index).saturating_duration_since(Instant::now()));
    }

    /// Latency in µs of fork `index` that was done at `end`: from when it was due, so that time
    /// spent behind an earlier fork counts, as does a late wake-up of the harness.
    #[must_use]
    pub fn latency_us(&self, index: u32, end: Instant) -> f64 {
        end.saturating_duration_since(self.due(index)).as_secs_f64() * 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_that_is_late_pays_for_it() {
        let start = Instant::now();
        let schedule = Schedule::new(start, 1_000);
        let end = start + Duration::from_micros(5_100);
        assert!((schedule.latency_us(5, end) - 100.0).abs() < 0.01);
        assert!((schedule.latency_us(2, end) - 3_100.0).abs() < 0.01);
        assert!(schedule.latency_us(9, end).abs() < 0.01);
    }

    #[test]
    fn waiting_ends_when_it_is_due() {
        let schedule = Schedule::new(Instant::now(), 2_000);
        schedule.wait(3);
        assert!(Instant::now() >= schedule.due(3));
    }
}
