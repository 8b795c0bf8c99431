//! The decision: did the change make forks slower, or make them do more?

use std::fmt;

use serde::{Deserialize, Serialize};

use super::interleave::{Batch, Unit};
use super::signed_rank::{hodges_lehmann, test};

/// What a difference must pass, all three at once, to be an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Largest one-sided p, over all comparisons of one run together (it is divided by their
    /// number, after Bonferroni).
    pub p: f64,
    /// Smallest difference in µs.
    pub absolute_us: f64,
    /// Smallest difference as a fraction of A.
    pub relative: f64,
}

impl Default for Thresholds {
    /// 0.5 %, 3 µs and 7 %. A real 15 % is twice the last one and stays visible; the few per cent
    /// that the layout of a binary alone is worth stay below it. `tests/calibration.rs` shows what
    /// these and [`Plan`](super::Plan)'s default find and what they let pass.
    fn default() -> Self {
        Self { p: 0.005, absolute_us: 3.0, relative: 0.07 }
    }
}

/// What the three thresholds say about one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// B is slower, beyond all three thresholds: an alarm.
    Slower,
    /// B is faster, beyond all three.
    Faster,
    /// Neither.
    Same,
    /// One side has no samples of this metric in some unit: an alarm, because a gate that passes
    /// by absence is none.
    Missing,
}

/// One metric compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricVerdict {
    /// Name of the metric.
    pub metric: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Median over the units of A's medians, in µs.
    pub a_us: f64,
    /// Difference B − A in µs (Hodges–Lehmann).
    pub difference_us: f64,
    /// Difference as a fraction of A, from the logarithms (Hodges–Lehmann).
    pub relative: f64,
    /// One-sided p for "slower", before the correction for several comparisons.
    pub p_slower: f64,
    /// One-sided p for "faster".
    pub p_faster: f64,
    /// Units compared.
    pub units: usize,
}

impl fmt::Display for MetricVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { metric, a_us, difference_us, p_slower, p_faster, units, .. } = self;
        let (percent, verdict) = (self.relative * 100.0, format!("{:?}", self.verdict));
        write!(
            f,
            "{metric}: {} (A {a_us:.1} µs, B {difference_us:+.1} µs = {percent:+.1} %, \
             p slower {p_slower:.5}, p faster {p_faster:.5}, {units} units)",
            verdict.to_lowercase()
        )
    }
}

/// Everything about one scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The metrics compared, in the order asked for.
    pub metrics: Vec<MetricVerdict>,
    /// Failed forks of A and of B.
    pub failed: (u64, u64),
}

impl Judgement {
    /// Whether a timing alarms. Such an alarm is worth a second run with another seed: noise does
    /// not come twice.
    #[must_use]
    pub fn timing_alarm(&self) -> bool {
        self.metrics.iter().any(|m| matches!(m.verdict, Verdict::Slower | Verdict::Missing))
    }

    /// Whether more forks failed in B. This needs no second run.
    #[must_use]
    pub fn failure_alarm(&self) -> bool {
        self.failed.1 > self.failed.0
    }
}

/// Compares B with A.
///
/// `metrics` are the ones to decide on (few: each makes the others' p stricter), `comparisons` the
/// number of metrics over all scenarios of the run.
#[must_use]
pub fn judge(
    units: &[Unit],
    metrics: &[&str],
    comparisons: usize,
    thresholds: &Thresholds,
) -> Judgement {
    let p = thresholds.p / f64::from(u32::try_from(comparisons.max(1)).unwrap_or(u32::MAX));
    let thresholds = Thresholds { p, ..*thresholds };
    let failed =
        |side: fn(&Unit) -> &Vec<Batch>| units.iter().flat_map(side).map(|b| b.failed).sum();
    Judgement {
        metrics: metrics.iter().map(|metric| compare(units, metric, &thresholds)).collect(),
        failed: (failed(|unit| &unit.a), failed(|unit| &unit.b)),
    }
}

/// Medians of the two batches of a side: (mean, mean of the logarithms).
fn level(batches: &[Batch], metric: &str) -> Option<(f64, f64)> {
    let medians: Option<Vec<f64>> = batches.iter().map(|batch| batch.median(metric)).collect();
    let medians = medians.filter(|medians| !medians.is_empty())?;
    let n = f64::from(u32::try_from(medians.len()).ok()?);
    // A median of 0 would be −∞ as logarithm: below the clock's nanosecond nothing is told apart.
    let log = |median: &f64| median.max(0.001).ln();
    Some((medians.iter().sum::<f64>() / n, medians.iter().map(log).sum::<f64>() / n))
}

fn compare(units: &[Unit], metric: &str, thresholds: &Thresholds) -> MetricVerdict {
    let levels: Option<Vec<_>> =
        units.iter().map(|u| Some((level(&u.a, metric)?, level(&u.b, metric)?))).collect();
    let levels = levels.unwrap_or_default();
    // ∞ − ∞: both sides fail alike, which is no difference.
    let minus = |b: f64, a: f64| if a.is_infinite() && b.is_infinite() { 0.0 } else { b - a };
    let logs: Vec<f64> = levels.iter().map(|(a, b)| minus(b.1, a.1)).collect();
    let plain: Vec<f64> = levels.iter().map(|(a, b)| minus(b.0, a.0)).collect();
    let mut base: Vec<f64> = levels.iter().map(|(a, _)| a.0).collect();
    let ranks = test(&logs);
    let difference_us = hodges_lehmann(&plain).unwrap_or(f64::NAN);
    let relative = hodges_lehmann(&logs).map_or(f64::NAN, f64::exp_m1);
    let beyond = |p: f64, sign: f64| {
        p <= thresholds.p
            && sign * difference_us >= thresholds.absolute_us
            && sign * relative >= thresholds.relative
    };
    let verdict = if logs.is_empty() {
        Verdict::Missing
    } else if beyond(ranks.p_greater, 1.0) {
        Verdict::Slower
    } else if beyond(ranks.p_less, -1.0) {
        Verdict::Faster
    } else {
        Verdict::Same
    };
    MetricVerdict {
        metric: metric.to_owned(),
        verdict,
        a_us: super::signed_rank::median(&mut base).unwrap_or(f64::NAN),
        difference_us,
        relative,
        p_slower: ranks.p_greater,
        p_faster: ranks.p_less,
        units: logs.len(),
    }
}

#[cfg(test)]
mod tests;
