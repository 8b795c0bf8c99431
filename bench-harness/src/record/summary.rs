//! Percentiles of raw samples.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A time in µs that may be infinite (a failed fork). JSON has no infinity: it is the text `"inf"`
/// there, and numbers are rounded to the nanosecond.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Micros(pub f64);

impl Micros {
    /// Whether it is a time at all.
    #[must_use]
    pub fn is_finite(self) -> bool {
        self.0.is_finite()
    }
}

impl Serialize for Micros {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() {
            serializer.serialize_f64((self.0 * 1e3).round() / 1e3)
        } else {
            serializer.serialize_str("inf")
        }
    }
}

impl<'de> Deserialize<'de> for Micros {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(value) => Ok(Self(value)),
            Either::Text(text) if text == "inf" => Ok(Self(f64::INFINITY)),
            Either::Text(text) => {
                Err(D::Error::custom(format!("neither a number nor inf: {text}")))
            }
        }
    }
}

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            value if !value.is_finite() => "inf".to_owned(),
            value if value.abs() < 10.0 => format!("{value:.2}"),
            value if value.abs() < 1000.0 => format!("{value:.1}"),
            value => grouped(value),
        };
        f.pad(&text)
    }
}

/// `12,345` for 12345.4.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What is said about one metric.
///
/// Percentiles are nearest-rank: p is the smallest sample such that at least the fraction p of all
/// samples is not above it. So each is a sample that occurred, and with n = 100 p99 is the second
/// largest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of samples, failed ones included.
    pub n: u64,
    /// How many of them are infinite.
    pub failed: u64,
    /// Median.
    pub p50: Micros,
    /// 90th percentile.
    pub p90: Micros,
    /// 99th percentile.
    pub p99: Micros,
    /// 99.9th percentile, if at least ten samples lie beyond it (n ≥ 10,000).
    #[serde(rename = "p99.9", default, skip_serializing_if = "Option::is_none")]
    pub p99_9: Option<Micros>,
    /// Largest.
    pub max: Micros,
    /// Arithmetic mean.
    pub mean: Micros,
}

/// Samples that must lie beyond a percentile before it is worth printing.
const BEYOND_P99_9: usize = 10;

impl Summary {
    /// Summary of samples in any order; `None` if there are none. NaN must not occur.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let max = *sorted.last()?;
        let n = sorted.len();
        let p = |per_mille| Micros(nearest_rank(&sorted, per_mille));
        let beyond = n - (n * 999).div_ceil(1000);
        Some(Self {
            n: n as u64,
            failed: sorted.iter().filter(|value| !value.is_finite()).count() as u64,
            p50: p(500),
            p90: p(900),
            p99: p(990),
            p99_9: (beyond >= BEYOND_P99_9).then(|| p(999)),
            max: Micros(max),
            mean: Micros(mean(&sorted)),
        })
    }
}

/// Nearest-rank percentile of samples that are sorted and not empty, in integer arithmetic: 0.07 ×
/// 100 is more than 7 in floating point, and the rank would be one too high.
fn nearest_rank(sorted: &[f64], per_mille: usize) -> f64 {
    let rank = (sorted.len() * per_mille).div_ceil(1000).max(1);
    sorted[rank - 1]
}

#[expect(clippy::cast_precision_loss, reason = "sample counts are far below 2^52")]
fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one_to(n: u32) -> Vec<f64> {
        (1..=n).rev().map(f64::from).collect()
    }

    #[test]
    fn percentiles_are_samples() {
        let summary = Summary::of(&one_to(100)).unwrap();
        let p = [summary.p50, summary.p90, summary.p99, summary.max, summary.mean].map(|p| p.0);
        assert_eq!(p.map(f64::to_bits), [50.0, 90.0, 99.0, 100.0, 50.5].map(f64::to_bits));
        assert_eq!(Summary::of(&[7.0]).unwrap().p99, Micros(7.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn p99_9_needs_ten_samples_beyond() {
        assert_eq!(Summary::of(&one_to(9_999)).unwrap().p99_9, None);
        assert_eq!(Summary::of(&one_to(10_000)).unwrap().p99_9, Some(Micros(9_990.0)));
    }

    #[test]
    fn infinity_survives_json() {
        let summary = Summary::of(&[1.0, f64::INFINITY]).unwrap();
        let text = serde_json::to_string(&summary).unwrap();
        assert!(text.contains(r#""p50":1.0,"p90":"inf""#), "{text}");
        assert_eq!(serde_json::from_str::<Summary>(&text).unwrap(), summary);
    }

    #[test]
    fn people_read_thousands() {
        let text = |value| Micros(value).to_string();
        assert_eq!(text(1_234_567.8), "1,234,568");
        assert_eq!(text(-4321.0), "-4,321");
        assert_eq!(
            (text(3.456), text(345.67), text(f64::INFINITY)),
            ("3.46".into(), "345.7".into(), "inf".into())
        );
    }

    proptest! {
        #[test]
        fn enough_samples_are_not_above_a_percentile(
            samples in prop::collection::vec(0.0f64..1e6, 1..300)
        ) {
            let summary = Summary::of(&samples).unwrap();
            for (p, per_mille) in [(summary.p50, 500), (summary.p90, 900), (summary.p99, 990)] {
                let not_above = samples.iter().filter(|s| **s <= p.0).count();
                let below = samples.iter().filter(|s| **s < p.0).count();
                prop_assert!(not_above * 1000 >= samples.len() * per_mille);
                prop_assert!(below * 1000 < samples.len() * per_mille);
            }
        }
    }
}
