//! Whether a fork becomes slower with what is there already: depth, children alive, earlier forks.

use serde::{Deserialize, Serialize};

use crate::record::{Micros, Recorder, Summary};
use crate::scenario::Scenario;

/// Columns of the recorder that say how much is there already.
const SIZE_COLUMNS: [&str; 2] = ["depth", "alive_children"];
/// The metric that must not follow them.
const METRIC: &str = "branch_us";
/// The same of a machine beside.
const REFERENCE: &str = "reference_branch_us";
/// Fewer forks than this at each end say nothing about a drift.
const LEAST_AT_EACH_END: usize = 5;

/// The forks of one range of sizes: 0, 1, 2, 3–4, 5–8, 9–16 and so on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SizePoint {
    /// Largest size of the range that occurred.
    pub size: f64,
    /// Forks.
    pub n: u64,
    /// Median of `branch_us`.
    pub p50: Micros,
    /// 99th percentile of `branch_us`.
    pub p99: Micros,
}

fn size_column(recorder: &Recorder) -> Option<&'static str> {
    SIZE_COLUMNS.into_iter().find(|column| recorder.metrics().any(|name| name == *column))
}

fn sorted_pairs(recorder: &Recorder) -> Vec<(f64, f64)> {
    let mut pairs = recorder.pairs(size_column(recorder), METRIC);
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    pairs
}

/// Percentiles by range of sizes; empty if the scenario has none.
pub(super) fn sizes(recorder: &Recorder) -> Vec<SizePoint> {
    if size_column(recorder).is_none() {
        return Vec::new();
    }
    let range = |size: f64| if size < 1.0 { -1.0 } else { size.log2().ceil() };
    let pairs = sorted_pairs(recorder);
    let chunks = pairs.chunk_by(|a, b| range(a.0).total_cmp(&range(b.0)).is_eq());
    let point = |chunk: &[(f64, f64)]| {
        let samples: Vec<f64> = chunk.iter().map(|(_, us)| *us).collect();
        let summary = Summary::of(&samples)?;
        let (size, _) = chunk.last()?;
        Some(SizePoint { size: *size, n: summary.n, p50: summary.p50, p99: summary.p99 })
    };
    chunks.filter_map(point).collect()
}

/// p50 of the last forks divided by that of the first ones; `None` if there are too few.
///
/// First and last are an eighth of all, with all forks of the sizes where an eighth ends. Where a young
/// machine was forked beside the last ones, its forks are the first ones: they lived through the same
/// moments.
pub(super) fn drift(recorder: &Recorder, scenario: &Scenario) -> Option<f64> {
    let pairs = sorted_pairs(recorder);
    if scenario.reference_forks > 0 {
        let young = Summary::of(&recorder.samples(REFERENCE))?;
        let last = pairs.get(pairs.len().checked_sub(usize::try_from(young.n).ok()?)?..)?;
        let last: Vec<f64> = last.iter().map(|(_, us)| *us).collect();
        return Some(ratio(Summary::of(&last)?.p50.0, young.p50.0));
    }
    let eighth = pairs.len() / 8;
    if eighth < LEAST_AT_EACH_END {
        return None;
    }
    let (low, high) = (pairs[eighth - 1].0, pairs[pairs.len() - eighth].0);
    let p50 = |is_in: &dyn Fn(f64) -> bool| {
        let part = pairs.iter().filter(|(size, _)| is_in(*size));
        let samples: Vec<f64> = part.map(|(_, us)| *us).collect();
        Some(Summary::of(&samples)?.p50.0)
    };
    Some(ratio(p50(&|size| size >= high)?, p50(&|size| size <= low)?))
}

/// By infinite it is infinite: where most forks fail there is no flatness.
pub(super) fn ratio(last: f64, first: f64) -> f64 {
    if first.is_finite() { last / first } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Sample;
    use crate::scenario::Catalogue;

    fn plain() -> Scenario {
        Catalogue::standard().unwrap().get("quiet").unwrap().clone()
    }

    #[test]
    fn depths_are_grouped_and_compared() {
        let mut recorder = Recorder::new();
        for depth in (1..=64u32).rev() {
            let us = if depth > 56 { 120.0 } else { 100.0 };
            recorder.record(Sample::new().with("depth", depth.into()).with("branch_us", us));
        }
        let sizes = sizes(&recorder);
        let ends: Vec<(String, u64)> = sizes.iter().map(|p| (p.size.to_string(), p.n)).collect();
        let expected = [("1", 1), ("2", 1), ("4", 2), ("8", 4), ("16", 8), ("32", 16), ("64", 32)];
        assert_eq!(ends, expected.map(|(size, n)| (size.to_owned(), n)));
        assert!((drift(&recorder, &plain()).unwrap() - 1.2).abs() < 1e-9);
    }

    #[test]
    fn all_forks_of_the_sizes_at_the_ends_count() {
        let mut recorder = Recorder::new();
        // The machine becomes slower all the time, and children cost nothing.
        for cycle in 0..4u32 {
            for (alive, times) in [(0, 20), (50, 10), (100, 20)] {
                for _ in 0..times {
                    let us = 100.0 + f64::from(cycle) * 50.0;
                    let sample = Sample::new().with("alive_children", f64::from(alive));
                    recorder.record(sample.with("branch_us", us));
                }
            }
        }
        assert_eq!(drift(&recorder, &plain()), Some(1.0));
    }

    #[test]
    fn forks_that_fail_at_depth_are_a_drift() {
        let mut recorder = Recorder::new();
        for fork in 0..80u32 {
            recorder.record(match fork {
                0..60 => Sample::new().with("branch_us", 100.0),
                _ => Sample::failed("wake: died"),
            });
        }
        assert_eq!(drift(&recorder, &plain()), Some(f64::INFINITY));
    }

    #[test]
    fn a_young_machine_beside_the_last_forks_is_what_they_are_compared_with() {
        let mut recorder = Recorder::new();
        // The machine becomes slower by half; age costs a tenth.
        for fork in 0..80 {
            let us = if fork < 60 { 100.0 } else { 165.0 };
            recorder.record(Sample::new().with("branch_us", us));
            if fork >= 70 {
                recorder.record_apart(REFERENCE, 150.0);
            }
        }
        let scenario = Scenario { reference_mib: 512, reference_forks: 10, ..plain() };
        assert!((drift(&recorder, &scenario).unwrap() - 1.1).abs() < 1e-9);
        assert_eq!(drift(&Recorder::new(), &scenario), None);
        (0..20).for_each(|_| recorder.record_apart(REFERENCE, f64::INFINITY));
        assert_eq!(drift(&recorder, &scenario), Some(f64::INFINITY), "the young one failed");
    }

    #[test]
    fn without_a_size_the_order_counts() {
        let mut recorder = Recorder::new();
        for fork in 0..80u32 {
            recorder.record(Sample::new().with("branch_us", 100.0 + f64::from(fork)));
        }
        assert!(sizes(&recorder).is_empty());
        assert!((drift(&recorder, &plain()).unwrap() - 174.0 / 104.0).abs() < 1e-9);
    }
}
