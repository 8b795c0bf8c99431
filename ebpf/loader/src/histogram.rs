//! What was counted of one metric.

use std::collections::BTreeMap;

use ebpf_common::{BUCKETS, Cell, bucket, highest, lowest};
use serde::{Deserialize, Serialize};

/// A histogram in the kernel's buckets, each at most a sixteenth of its value wide.
///
/// As text it is a list of `[bucket, count, sum in ns]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u16, u64, u64)>", into = "Vec<(u16, u64, u64)>")]
pub struct Histogram {
    cells: BTreeMap<u16, Cell>,
}

impl From<Vec<(u16, u64, u64)>> for Histogram {
    fn from(list: Vec<(u16, u64, u64)>) -> Self {
        let mut histogram = Self::default();
        for (bucket, count, sum) in list.into_iter().filter(|(bucket, ..)| *bucket < BUCKETS) {
            histogram.add(bucket, Cell { count, sum });
        }
        histogram
    }
}

impl From<Histogram> for Vec<(u16, u64, u64)> {
    fn from(histogram: Histogram) -> Self {
        histogram.cells.into_iter().map(|(bucket, cell)| (bucket, cell.count, cell.sum)).collect()
    }
}

impl Histogram {
    /// Adds what fell into a bucket.
    pub fn add(&mut self, bucket: u16, cell: Cell) {
        let sum = self.cells.entry(bucket).or_default();
        sum.count += cell.count;
        sum.sum += cell.sum;
    }

    /// Adds a value.
    pub fn record(&mut self, value: u64) {
        self.add(bucket(value), Cell { count: 1, sum: value });
    }

    /// Adds another one.
    pub fn merge(&mut self, other: &Self) {
        for (bucket, cell) in &other.cells {
            self.add(*bucket, *cell);
        }
    }

    /// How often it happened.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.cells.values().map(|cell| cell.count).sum()
    }

    /// How long all of it took, in ns.
    #[must_use]
    pub fn sum_ns(&self) -> u64 {
        self.cells.values().map(|cell| cell.sum).sum()
    }

    /// The buckets in order: number, lowest and highest value in ns, and what fell into it.
    pub fn cells(&self) -> impl Iterator<Item = (u16, u64, u64, Cell)> {
        self.cells.iter().map(|(bucket, cell)| (*bucket, lowest(*bucket), highest(*bucket), *cell))
    }

    /// The same values for tools that know HDR histograms: each at the middle of its bucket.
    #[must_use]
    pub fn to_hdr(&self) -> hdrhistogram::Histogram<u64> {
        // Two digits are finer than the buckets.
        let mut hdr = hdrhistogram::Histogram::new_with_bounds(1, 1 << 37, 2)
            .unwrap_or_else(|_| unreachable!("the bounds are constants"));
        for (_, low, high, cell) in self.cells() {
            hdr.saturating_record_n(low.midpoint(high).max(1), cell.count);
        }
        hdr
    }

    /// The value in ns that so many of a thousand do not exceed, by nearest rank: the middle of its
    /// bucket. `None` if nothing was counted.
    #[must_use]
    pub fn per_mille_ns(&self, per_mille: u64) -> Option<u64> {
        let rank = (self.count() * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (_, low, high, cell) in self.cells() {
            seen += cell.count;
            if seen >= rank {
                return Some(low.midpoint(high));
            }
        }
        None
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may")]
mod tests {
    use super::*;

    fn histogram(values: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for value in values {
            histogram.record(*value);
        }
        histogram
    }

    #[test]
    fn percentiles_are_within_a_bucket_of_the_truth() {
        let values: Vec<u64> = (1..=1000).map(|value| value * 37).collect();
        let histogram = histogram(&values);
        assert_eq!((histogram.count(), histogram.sum_ns()), (1000, 37 * 500_500));
        let hdr = histogram.to_hdr();
        for (per_mille, exact) in [(500, 500 * 37), (990, 990 * 37), (1000, 1000 * 37)] {
            for got in [
                histogram.per_mille_ns(per_mille).unwrap(),
                hdr.value_at_quantile(f64::from(u32::try_from(per_mille).unwrap()) / 1000.0),
            ] {
                assert!(got.abs_diff(exact) * 16 <= exact, "{per_mille}: {got}, {exact}");
            }
        }
        assert_eq!(Histogram::default().per_mille_ns(500), None);
    }

    #[test]
    fn merging_adds() {
        let (mut one, two) = (histogram(&[5, 5000]), histogram(&[5, 7]));
        one.merge(&two);
        assert_eq!((one.count(), one.sum_ns()), (4, 5017));
        assert_eq!(one.cells().next().map(|(_, low, _, cell)| (low, cell.count)), Some((5, 2)));
    }
}
