//! `.hgrm` files: the percentile distribution as text, in the format that `HdrHistogram`'s own
//! `outputPercentileDistribution` writes and its plotters read. Values are in µs.

use std::io::{self, Write};

use hdrhistogram::Histogram;

/// One hour in ns: the largest value that a histogram holds. Failed forks are recorded as this.
pub const HIGHEST_NS: u64 = 3_600_000_000_000;

/// Lines per halving of the distance to 100 %, as `HdrHistogram` does by default.
const TICKS_PER_HALF_DISTANCE: u32 = 5;

/// Why a histogram could not be made.
#[derive(Debug, thiserror::Error)]
#[error("histogram from 1 ns to {HIGHEST_NS} ns cannot be made")]
pub struct HistogramError(#[from] hdrhistogram::CreationError);

/// Histogram of samples in µs: 1 ns to one hour, three significant digits. Infinite samples count
/// as one hour.
///
/// # Errors
///
/// [`HistogramError`] if the library refuses these bounds, which a test excludes.
pub fn histogram(samples_us: &[f64]) -> Result<Histogram<u64>, HistogramError> {
    let mut histogram = Histogram::new_with_bounds(1, HIGHEST_NS, 3)?;
    for sample_us in samples_us {
        histogram.saturating_record(nanoseconds(*sample_us));
    }
    Ok(histogram)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 0..HIGHEST_NS before"
)]
fn nanoseconds(us: f64) -> u64 {
    #[expect(clippy::cast_precision_loss, reason = "2^42 fits into f64 exactly")]
    let highest = HIGHEST_NS as f64;
    (us * 1e3).round().clamp(0.0, highest) as u64
}

/// Writes a histogram of ns as percentile distribution in µs.
///
/// # Errors
///
/// Those of `out`.
pub fn write(histogram: &Histogram<u64>, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "{:>12} {:>14} {:>10} {:>14}\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    )?;
    let mut total = 0;
    for step in histogram.iter_quantiles(TICKS_PER_HALF_DISTANCE) {
        total += step.count_since_last_iteration();
        let quantile = step.quantile_iterated_to();
        write!(out, "{:12.3} {quantile:2.12} {total:10}", us(step.value_iterated_to()))?;
        if quantile < 1.0 {
            write!(out, " {:14.2}", 1.0 / (1.0 - quantile))?;
        }
        writeln!(out)?;
    }
    let (mean, deviation) = (histogram.mean() / 1e3, histogram.stdev() / 1e3);
    let (max, count) = (us(histogram.max()), histogram.len());
    // 2,048 sub-buckets is what three significant digits make.
    writeln!(out, "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]")?;
    writeln!(out, "#[Max     = {max:12.3}, Total count    = {count:12}]")?;
    writeln!(out, "#[Buckets = {:12}, SubBuckets     = {:12}]", histogram.buckets(), 2048)
}

#[expect(clippy::cast_precision_loss, reason = "at most HIGHEST_NS, below 2^52")]
fn us(ns: u64) -> f64 {
    ns as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(samples: &[f64]) -> String {
        let mut text = Vec::new();
        write(&histogram(samples).unwrap(), &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_format_is_that_of_hdrhistogram() {
        let samples: Vec<f64> = (1..=1000).map(f64::from).collect();
        let text = text(&samples);
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("       Value     Percentile TotalCount 1/(1-Percentile)"));
        assert_eq!(lines.next(), Some(""));
        assert_eq!(lines.next(), Some("       1.000 0.000000000000          1           1.00"));
        assert!(
            text.contains("\n     500.223 0.500000000000        500           2.00\n"),
            "{text}"
        );
        let end: Vec<&str> = text.lines().rev().take(4).collect();
        assert!(end[3].ends_with(" 1.000000000000       1000"), "{text}");
        assert_eq!(end[1], "#[Max     =     1000.447, Total count    =         1000]");
    }

    #[test]
    fn a_failed_fork_is_the_largest_value() {
        let text = text(&[1.0, f64::INFINITY]);
        assert!(text.contains("\n3601"), "{text}");
        assert!(text.contains("Total count    =            2"), "{text}");
    }

    #[test]
    fn no_samples_no_lines() {
        assert!(text(&[]).contains("Total count    =            0"));
    }
}
