//! What is known of an instance, for Prometheus.

use std::collections::BTreeMap;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use runtime::proto::Stats;

use ebpf_loader::{Histogram, Lost, Metric, Row};

use super::error::CliError;
use super::stats::{Seen, exit_name};
use super::wire::Probed;

/// The text that a scrape gets.
///
/// # Errors
///
/// If it cannot be written.
pub fn text(seen: &Seen) -> Result<String, CliError> {
    let mut registry = prometheus_client::registry::Registry::with_prefix("ukp");
    registry.register_collector(Box::new(Instance {
        uuid: seen.uuid.to_string(),
        stats: seen.stats,
        kvm: seen.kvm.clone(),
        probed: seen.probed.clone(),
        ended: seen.ended.clone(),
    }));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)
        .map_err(|error| CliError::internal(format!("the metrics cannot be written: {error}")))?;
    Ok(text)
}

#[derive(Debug)]
struct Instance {
    uuid: String,
    stats: Stats,
    kvm: BTreeMap<String, u64>,
    probed: Probed,
    ended: Vec<Row>,
}

/// Whose values they are: of the instance, or of all of its owner's that have ended.
const OWN: &str = "own";
const ENDED: &str = "ended";

impl prometheus_client::collector::Collector for Instance {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use prometheus_client::metrics::counter::ConstCounter;
        use prometheus_client::metrics::gauge::ConstGauge;
        let labels = [("instance", self.uuid.as_str())];
        for (name, help, value) in [
            ("forks", "Forks made", self.stats.forks),
            ("forks_failed", "Forks that failed", self.stats.failed),
            ("sync_rounds", "Sync rounds", self.stats.rounds),
            ("synced_pages", "Pages shipped by sync rounds", self.stats.synced_pages),
        ] {
            let counter = ConstCounter::new(value);
            let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            counter.encode(encoder.encode_family(&labels)?)?;
        }
        let up = ConstGauge::new(i64::from(self.probed.off.is_none()));
        let help = "Whether there are probes";
        let mut gauge = encoder.encode_descriptor("probes_up", help, None, MetricType::Gauge)?;
        up.encode(gauge.encode_family(&labels)?)?;
        let help = "What the probes of all instances of this owner had no room for";
        let mut losses =
            encoder.encode_descriptor("probe_lost", help, None, MetricType::Counter)?;
        let Lost { values, events, processes, threads } = self.probed.lost;
        for (what, lost) in
            [("values", values), ("events", events), ("processes", processes), ("threads", threads)]
        {
            let labels = [("instance", self.uuid.as_str()), ("what", what)];
            ConstCounter::new(lost).encode(losses.encode_family(&labels)?)?;
        }
        let help = "KVM's own statistics, over all vCPUs";
        let mut kvm = encoder.encode_descriptor("kvm", help, None, MetricType::Gauge)?;
        for (name, value) in &self.kvm {
            let labels = [("instance", self.uuid.as_str()), ("what", name.as_str())];
            ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX))
                .encode(kvm.encode_family(&labels)?)?;
        }
        let own = self.probed.rows.iter().map(|row| (OWN, row));
        let rows: Vec<_> = own.chain(self.ended.iter().map(|row| (ENDED, row))).collect();
        let help = "Exits to user space by reason";
        let mut exits = encoder.encode_descriptor("exits", help, None, MetricType::Counter)?;
        for (scope, row) in rows.iter().filter(|(_, row)| row.metric == Metric::Exits) {
            for (reason, _, _, cell) in row.histogram.cells() {
                let reason = exit_name(reason);
                let labels = [
                    ("instance", self.uuid.as_str()),
                    ("scope", *scope),
                    ("role", row.role.name()),
                    ("reason", reason.as_str()),
                ];
                ConstCounter::new(cell.count).encode(exits.encode_family(&labels)?)?;
            }
        }
        let help = "What the probes and the instance measured";
        let mut times = encoder.encode_descriptor(
            "probe",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (scope, row) in rows.iter().filter(|(_, row)| row.metric != Metric::Exits) {
            let backing = if *scope == ENDED { "" } else { self.stats.backing.backing().name() };
            let labels = [
                ("instance", self.uuid.as_str()),
                ("scope", *scope),
                ("backing", backing),
                ("role", row.role.name()),
                ("what", row.metric.name()),
            ];
            let buckets = by_octave(&row.histogram);
            let (sum, count) = (seconds(row.histogram.sum_ns()), row.histogram.count());
            let mut family = times.encode_family(&labels)?;
            family.encode_histogram::<prometheus_client::encoding::NoLabelSet>(
                sum, count, &buckets, None,
            )?;
        }
        Ok(())
    }
}

/// The bounds of all histograms are the same, so that those of several instances add up: powers of
/// two from 256 ns to 17 s. What is longer is in the last bucket alone, which has no bound.
fn by_octave(histogram: &Histogram) -> Vec<(f64, u64)> {
    const OCTAVES: std::ops::RangeInclusive<u32> = 8..=34;
    let bounds = OCTAVES.map(|octave| 1_u64 << octave);
    let lowers = std::iter::once(0).chain(bounds.clone());
    let mut buckets: Vec<(f64, u64)> = lowers
        .zip(bounds)
        .map(|(lower, bound)| {
            let within = histogram.cells().filter(|(_, low, ..)| (lower..bound).contains(low));
            (seconds(bound), within.map(|(_, _, _, cell)| cell.count).sum())
        })
        .collect();
    let counted: u64 = buckets.iter().map(|(_, count)| count).sum();
    buckets.push((f64::MAX, histogram.count() - counted));
    buckets
}

#[expect(clippy::cast_precision_loss, reason = "2^53 ns are 104 days")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_the_same_and_nothing_falls_out() {
        let one = Histogram::from(vec![(5, 2, 10), (100, 3, 3000), (527, 1, 70_000_000_000)]);
        let buckets = by_octave(&one);
        let bounds = |buckets: &[(f64, u64)]| buckets.iter().map(|(le, _)| *le).collect::<Vec<_>>();
        assert_eq!(bounds(&buckets), bounds(&by_octave(&Histogram::default())));
        assert_eq!((buckets[0].1, buckets.last().map(|last| last.1)), (2, Some(1)));
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), one.count());
    }
}
