//! What was measured, fork by fork, and what is said about it.
//!
//! Raw samples are the truth and are kept; percentiles in tables are computed from them by nearest
//! rank ([`Summary`]). HDR histograms are written as well ([`hgrm`]), for the tools that read them,
//! and never read back. All times are microseconds as `f64`; the clock resolves nanoseconds.
//!
//! A fork that failed is infinitely slow, in every metric of the fork that it has no value for. It
//! is not left out: more than one failure in a hundred makes p99 infinite.

pub mod hgrm;
mod summary;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};

pub use summary::{Micros, Summary};

/// Name of a metric, unit included: `branch_us`, `stage_capture_us`.
pub type MetricName = Cow<'static, str>;

/// What one fork measured.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    values: Vec<(MetricName, f64)>,
    failure: Option<String>,
    aside: bool,
}

impl Sample {
    /// A fork that worked, without values yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A fork that failed, with the step and the reason on one line.
    #[must_use]
    pub fn failed(why: impl Into<String>) -> Self {
        Self { failure: Some(why.into()), ..Self::default() }
    }

    /// The value of a metric.
    #[must_use]
    pub fn value(&self, metric: &str) -> Option<f64> {
        self.values.iter().find(|(name, _)| name == metric).map(|(_, value)| *value)
    }

    /// All values, in the order in which they were added.
    pub fn values(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values.iter().map(|(name, value)| (name.as_ref(), *value))
    }

    /// Why it failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Whether it failed.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        self.failure.is_some()
    }

    /// A fork on the way to what is measured: it has its place among the sizes and the failures,
    /// and none in the figures of the scenario.
    #[must_use]
    pub fn aside(mut self) -> Self {
        self.aside = true;
        self
    }

    /// Adds a value, in µs if the name ends in `_us`.
    #[must_use]
    pub fn with(mut self, metric: impl Into<MetricName>, value: f64) -> Self {
        self.values.push((metric.into(), value));
        self
    }
}

#[derive(Clone, Debug)]
struct Row {
    /// By column; NaN where there is no value.
    values: Vec<f64>,
    failure: Option<String>,
    aside: bool,
}

/// All samples of one scenario.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    /// In the order in which they were seen first, which is the order of the fork path.
    columns: Vec<MetricName>,
    rows: Vec<Row>,
    series: BTreeMap<MetricName, Vec<f64>>,
}

impl Recorder {
    /// An empty recorder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one fork. Call it between forks, never inside one: it allocates.
    pub fn record(&mut self, sample: Sample) {
        let mut values = vec![f64::NAN; self.columns.len()];
        for (metric, value) in sample.values {
            let column = self.columns.iter().position(|known| *known == metric);
            let column = column.unwrap_or_else(|| {
                self.columns.push(metric);
                values.push(f64::NAN);
                self.columns.len() - 1
            });
            values[column] = value;
        }
        self.rows.push(Row { values, failure: sample.failure, aside: sample.aside });
    }

    /// Adds one value of something that is not part of a fork: `prewarm_us`, `arm_us`,
    /// `teardown_us`, `tax_child_ratio`. Failed forks do not touch these.
    pub fn record_apart(&mut self, metric: impl Into<MetricName>, value: f64) {
        self.series.entry(metric.into()).or_default().push(value);
    }

    /// Number of forks that the figures are about, failed ones included.
    #[must_use]
    pub fn forks(&self) -> usize {
        self.rows.iter().filter(|row| !row.aside).count()
    }

    /// Number of forks that failed, those aside included.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.rows.iter().filter(|row| row.failure.is_some()).count()
    }

    /// Reasons of the failures, with how often each occurred.
    #[must_use]
    pub fn failures(&self) -> BTreeMap<&str, u64> {
        let mut reasons = BTreeMap::new();
        for reason in self.rows.iter().filter_map(|row| row.failure.as_deref()) {
            *reasons.entry(reason).or_default() += 1;
        }
        reasons
    }

    /// Names of all metrics: those of the fork in the order of its path, then those apart.
    pub fn metrics(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().chain(self.series.keys()).map(AsRef::as_ref)
    }

    /// Values of one metric in the order of measurement, infinity for failed forks, without forks
    /// aside. Empty if the metric is not known.
    #[must_use]
    pub fn samples(&self, metric: &str) -> Vec<f64> {
        if let Some(apart) = self.series.get(metric) {
            return apart.clone();
        }
        let Some(column) = self.columns.iter().position(|known| known == metric) else {
            return Vec::new();
        };
        let value = |row: &Row| {
            let value = row.values.get(column).copied().unwrap_or(f64::NAN);
            match (value.is_nan(), &row.failure) {
                (false, _) => Some(value),
                (true, Some(_)) => Some(f64::INFINITY),
                (true, None) => None,
            }
        };
        self.rows.iter().filter(|row| !row.aside).filter_map(value).collect()
    }

    /// Pairs of a size and a metric (`depth`, `branch_us`) of the forks that have the size; without
    /// `size`, of all forks with their index. Infinite for failed forks.
    #[must_use]
    pub fn pairs(&self, size: Option<&str>, metric: &str) -> Vec<(f64, f64)> {
        let column = |name: &str| self.columns.iter().position(|known| known == name);
        let value = |row: &Row, name: &str| {
            let value = column(name).and_then(|column| row.values.get(column).copied());
            value.filter(|value| !value.is_nan())
        };
        let pair = |(index, row): (usize, &Row)| {
            let x = match size {
                Some(size) => value(row, size)?,
                None => f64::from(u32::try_from(index).ok()?),
            };
            let failed = row.failure.as_ref().map(|_| f64::INFINITY);
            Some((x, value(row, metric).or(failed)?))
        };
        self.rows.iter().enumerate().filter_map(pair).collect()
    }

    /// Summary of one metric; `None` if it is not known.
    #[must_use]
    pub fn summary(&self, metric: &str) -> Option<Summary> {
        Summary::of(&self.samples(metric))
    }

    /// Writes the forks as CSV: `fork`, one column per metric, `failure`. A value that was not
    /// measured is empty.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn write_csv(&self, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "fork")?;
        for column in &self.columns {
            write!(out, ",{column}")?;
        }
        writeln!(out, ",failure")?;
        for (index, row) in self.rows.iter().enumerate() {
            write!(out, "{index}")?;
            for column in 0..self.columns.len() {
                match row.values.get(column) {
                    Some(value) if !value.is_nan() => write!(out, ",{value:.3}")?,
                    _ => write!(out, ",")?,
                }
            }
            writeln!(out, ",{}", csv_field(row.failure.as_deref().unwrap_or("")))?;
        }
        Ok(())
    }

    /// Writes what was recorded apart as CSV: `metric,index,value`. Nothing if there is nothing.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn write_apart_csv(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "metric,index,value")?;
        for (metric, values) in &self.series {
            for (index, value) in values.iter().enumerate() {
                writeln!(out, "{metric},{index},{value:.6}")?;
            }
        }
        Ok(())
    }

    /// Whether anything was recorded apart.
    #[must_use]
    pub fn has_apart(&self) -> bool {
        !self.series.is_empty()
    }
}

/// Quotes a text that a CSV reader would otherwise split (RFC 4180, section 2).
fn csv_field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder(good: usize, bad: usize) -> Recorder {
        let mut recorder = Recorder::new();
        for index in 0..good {
            let value = 100.0 + f64::from(u32::try_from(index).unwrap());
            recorder.record(Sample::new().with("branch_us", value));
        }
        for _ in 0..bad {
            recorder.record(Sample::failed("apply: ENOMEM, twice"));
        }
        recorder
    }

    #[test]
    fn a_failed_fork_is_infinitely_slow() {
        let one_percent = recorder(99, 1).summary("branch_us").unwrap();
        assert!(one_percent.p99.is_finite());
        assert!(!one_percent.max.is_finite());
        let two_percent = recorder(98, 2).summary("branch_us").unwrap();
        assert_eq!((two_percent.n, two_percent.failed), (100, 2));
        assert!(!two_percent.p99.is_finite());
        assert!(two_percent.p90.is_finite());
    }

    #[test]
    fn a_fork_aside_counts_by_its_size_alone() {
        let mut recorder = recorder(1, 0);
        let aside = |us| Sample::new().with("branch_us", us).with("depth", 3.0).aside();
        recorder.record(aside(900.0));
        recorder.record(Sample::failed("wake: died").aside());
        assert_eq!(recorder.samples("branch_us"), [100.0]);
        assert_eq!((recorder.forks(), recorder.failed()), (1, 1));
        assert_eq!(recorder.pairs(Some("depth"), "branch_us"), [(3.0, 900.0)]);
    }

    #[test]
    fn a_metric_that_comes_late_keeps_rows_apart() {
        let mut recorder = recorder(1, 0);
        recorder.record(Sample::new().with("pause_us", 3.0).with("branch_us", 5.0));
        recorder.record_apart("prewarm_us", 9.0);
        assert_eq!(recorder.samples("pause_us"), [3.0]);
        assert_eq!(recorder.samples("branch_us"), [100.0, 5.0]);
        assert_eq!(recorder.metrics().collect::<Vec<_>>(), ["branch_us", "pause_us", "prewarm_us"]);
    }

    #[test]
    fn failures_leave_what_is_apart_alone() {
        let mut recorder = recorder(0, 3);
        recorder.record_apart("prewarm_us", 9.0);
        assert_eq!(recorder.samples("prewarm_us"), [9.0]);
        assert_eq!(recorder.failures()["apply: ENOMEM, twice"], 3);
    }

    #[test]
    fn csv_has_one_row_per_fork() {
        let mut text = Vec::new();
        let mut recorder = recorder(1, 1);
        recorder.record(Sample::new().with("pause_us", 1.5));
        recorder.write_csv(&mut text).unwrap();
        let expected = "fork,branch_us,pause_us,failure\n0,100.000,,\n\
            1,,,\"apply: ENOMEM, twice\"\n2,,1.500,\n";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
