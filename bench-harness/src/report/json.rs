//! The line that `bench-json` prints.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{ReportError, ScenarioSummary};
use crate::record::{Micros, Summary};

/// Of the baselines these two are always there, as null if they were not measured.
const ALWAYS: [&str; 2] = ["cold_create_us", "process_fork_us"];

#[derive(Serialize)]
struct Line<'a> {
    scenario: &'a str,
    host: &'a str,
    n: u64,
    failed: u64,
    metrics: BTreeMap<&'a str, Percentiles>,
    floor_us: Option<Micros>,
    baselines: BTreeMap<&'a str, Option<Micros>>,
    memory_per_child_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Percentiles {
    p50: Micros,
    p90: Micros,
    p99: Micros,
    max: Micros,
}

impl From<&Summary> for Percentiles {
    fn from(summary: &Summary) -> Self {
        Self { p50: summary.p50, p90: summary.p90, p99: summary.p99, max: summary.max }
    }
}

/// One scenario as one line of JSON, without the line feed.
///
/// `metrics` has every metric that ends in `_us`; baselines are medians; an infinite time is the
/// text `"inf"`; what was not measured is null.
///
/// # Errors
///
/// [`ReportError::Json`].
pub fn json_line(summary: &ScenarioSummary) -> Result<String, ReportError> {
    let times = summary.metrics.iter().filter(|(name, _)| name.ends_with("_us"));
    let mut baselines: BTreeMap<&str, Option<Micros>> = ALWAYS.map(|name| (name, None)).into();
    baselines.extend(summary.baselines.iter().map(|(name, s)| (name.as_str(), Some(s.p50))));
    let line = Line {
        scenario: &summary.scenario.name,
        host: &summary.host,
        n: summary.n,
        failed: summary.failed,
        metrics: times.map(|(name, summary)| (name.as_str(), summary.into())).collect(),
        floor_us: summary.floor_us.map(Micros),
        baselines,
        memory_per_child_bytes: summary.memory_per_child_bytes,
    };
    serde_json::to_string(&line).map_err(ReportError::Json)
}
