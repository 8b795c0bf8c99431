//! What is known of an instance, for Prometheus.

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use runtime::proto::Stats;
use uuid::Uuid;

use ebpf_loader::Metric;

use super::error::CliError;
use super::stats::exit_name;
use super::wire::Probed;

/// The text that a scrape gets.
///
/// # Errors
///
/// If it cannot be written.
pub fn text(uuid: Uuid, stats: &Stats, probed: &Probed) -> Result<String, CliError> {
    let mut registry = prometheus_client::registry::Registry::with_prefix("ukp");
    registry.register_collector(Box::new(Instance {
        uuid: uuid.to_string(),
        stats: *stats,
        probed: probed.clone(),
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
    probed: Probed,
}

impl prometheus_client::collector::Collector for Instance {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use prometheus_client::metrics::counter::ConstCounter;
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
        let help = "Exits to user space by reason";
        let mut exits = encoder.encode_descriptor("exits", help, None, MetricType::Counter)?;
        for row in self.probed.rows.iter().filter(|row| row.metric == Metric::Exits) {
            for (reason, _, _, cell) in row.histogram.cells() {
                let reason = exit_name(reason);
                let labels = [
                    ("instance", self.uuid.as_str()),
                    ("role", row.role.name()),
                    ("reason", reason.as_str()),
                ];
                ConstCounter::new(cell.count).encode(exits.encode_family(&labels)?)?;
            }
        }
        let help = "What the probes measured";
        let mut times = encoder.encode_descriptor(
            "probe",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for row in self.probed.rows.iter().filter(|row| row.metric != Metric::Exits) {
            let labels = [
                ("instance", self.uuid.as_str()),
                ("role", row.role.name()),
                ("what", row.metric.name()),
            ];
            let buckets: Vec<(f64, u64)> = row
                .histogram
                .cells()
                .map(|(_, _, high, cell)| (seconds(high), cell.count))
                .chain([(f64::MAX, 0)])
                .collect();
            let (sum, count) = (seconds(row.histogram.sum_ns()), row.histogram.count());
            let mut family = times.encode_family(&labels)?;
            family.encode_histogram::<prometheus_client::encoding::NoLabelSet>(
                sum, count, &buckets, None,
            )?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "2^53 ns are 104 days")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}
