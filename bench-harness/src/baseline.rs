//! What forks are compared with, timed on the same machine in the same run.
//!
//! | module | what is timed |
//! | --- | --- |
//! | [`floor`] | the kernel primitives that no fork can avoid, one by one, and their sum |
//! | [`cold`] | the same virtual machine made from nothing, up to its first exit |
//! | [`process`] | fork(2) of a process with as much memory touched; `posix_spawn` of `true` |
//!
//! None of it uses the fork engine: a floor that fell with the engine would be no floor. All times
//! are µs. Samples are raw, in the order in which they were taken, warm-up left out.
//!
//! Processes that are started here end with the call that started them, or with its thread.

mod board;
mod child;
pub mod cold;
pub mod floor;
mod guest;
pub mod process;

use std::time::{Duration, Instant};

use runtime::kvm::KvmError;
use runtime::memory::MemoryError;
use runtime::sys::{SysError, now_ns};
use serde::{Deserialize, Serialize};

use crate::record::Summary;

/// Why a baseline could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// A call to KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The guest left for another reason than its port write.
    #[error("the guest of a baseline stopped with {exit}")]
    Guest {
        /// The exit, as KVM names it.
        exit: String,
    },
    /// A process started for the measurement failed.
    #[error("the {who} process failed: {message}")]
    Child {
        /// Which process.
        who: &'static str,
        /// What it said.
        message: String,
    },
    /// A process started for the measurement did not answer.
    #[error("the {who} process did not answer within {limit_ms} ms")]
    Silent {
        /// Which process.
        who: &'static str,
        /// How long it was waited for.
        limit_ms: u128,
    },
    /// Not enough memory.
    #[error("{needed_mib} MiB of memory are needed, {available_mib} MiB are available")]
    NoMemory {
        /// Memory needed, in MiB.
        needed_mib: u64,
        /// `MemAvailable`, in MiB.
        available_mib: u64,
    },
    /// Preparing the measurement took too long.
    #[error("{what} took longer than {limit_ms} ms")]
    TooLong {
        /// What did.
        what: &'static str,
        /// The limit.
        limit_ms: u128,
    },
    /// Nothing was measured.
    #[error("no sample of {what} was taken")]
    NoSamples {
        /// What was to be measured.
        what: &'static str,
    },
}

/// What is said about one primitive: percentiles by nearest rank, in µs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Number of samples.
    pub n: u64,
    /// Median, in µs.
    pub p50_us: f64,
    /// 99th percentile, in µs.
    pub p99_us: f64,
}

impl Figure {
    /// The figure of samples in µs.
    ///
    /// # Errors
    ///
    /// [`BaselineError::NoSamples`] of `what` if there are none.
    pub fn of(what: &'static str, samples: &[f64]) -> Result<Self, BaselineError> {
        let summary = Summary::of(samples).ok_or(BaselineError::NoSamples { what })?;
        Ok(Self { n: summary.n, p50_us: summary.p50.0, p99_us: summary.p99.0 })
    }
}

/// Nanoseconds between two moments, in µs.
fn us_between(from_ns: u64, to_ns: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "2^53 ns are 104 days")]
    let ns = to_ns.saturating_sub(from_ns) as f64;
    ns / 1e3
}

/// Time since `from_ns`, in µs.
fn us_since(from_ns: u64) -> f64 {
    us_between(from_ns, now_ns())
}

/// Rounds of warm-up and then so many that count: fewer if they take too long, but never less than
/// a few. Each item tells whether the round counts.
#[derive(Debug)]
struct Rounds {
    done: usize,
    warm_up: usize,
    most: usize,
    end: Instant,
}

/// Rounds that count and are made whatever the time.
const LEAST_ROUNDS: usize = 5;

impl Rounds {
    fn new(warm_up: usize, counted: usize, limit: Duration) -> Self {
        Self { done: 0, warm_up, most: warm_up + counted, end: Instant::now() + limit }
    }
}

impl Iterator for Rounds {
    type Item = bool;

    fn next(&mut self) -> Option<bool> {
        let late = self.done >= self.warm_up + LEAST_ROUNDS && Instant::now() >= self.end;
        if late || self.done >= self.most {
            return None;
        }
        self.done += 1;
        Some(self.done > self.warm_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_nearest_rank() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        let figure = Figure::of("numbers", &samples).unwrap();
        assert_eq!(figure, Figure { n: 100, p50_us: 50.0, p99_us: 99.0 });
        let nothing = Figure::of("numbers", &[]);
        assert!(matches!(nothing, Err(BaselineError::NoSamples { what: "numbers" })));
    }

    #[test]
    fn rounds_end_in_time_but_not_before_a_few() {
        let minute = Duration::from_mins(1);
        assert_eq!(Rounds::new(1, 3, minute).collect::<Vec<_>>(), [false, true, true, true]);
        let late = Rounds::new(2, 100, Duration::ZERO);
        assert_eq!(late.filter(|counts| *counts).count(), LEAST_ROUNDS);
    }

    #[test]
    fn times_are_microseconds() {
        assert!((us_between(1_000, 3_500) - 2.5).abs() < 1e-9);
        assert!((us_between(3_500, 1_000)).abs() < 1e-9);
    }
}
