//! What was counted, as it is passed on.

use std::collections::BTreeMap;

use ebpf_common::{Metric, Role};
use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;

/// What there was no room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Values, as there was no room for another bucket.
    pub values: u64,
    /// Events of a trace.
    pub events: u64,
    /// Processes.
    pub processes: u64,
    /// Threads: what they began, and what was counted of them while they were new.
    pub threads: u64,
}

impl Lost {
    /// What was lost after `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            values: self.values.saturating_sub(before.values),
            events: self.events.saturating_sub(before.events),
            processes: self.processes.saturating_sub(before.processes),
            threads: self.threads.saturating_sub(before.threads),
        }
    }

    /// Whether anything was.
    #[must_use]
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// Histograms of one process.
pub type Counted = BTreeMap<(Role, Metric), Histogram>;

/// One of them, as it is passed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Who the process was.
    #[serde(with = "crate::names::role")]
    pub role: Role,
    /// What was counted.
    #[serde(with = "crate::names::metric")]
    pub metric: Metric,
    /// The values.
    pub histogram: Histogram,
}

/// Histograms as a list.
#[must_use]
pub fn rows(counted: &Counted) -> Vec<Row> {
    let row = |((role, metric), histogram): (&(Role, Metric), &Histogram)| Row {
        role: *role,
        metric: *metric,
        histogram: histogram.clone(),
    };
    counted.iter().map(row).collect()
}

/// A list as histograms.
#[must_use]
pub fn counted(rows: &[Row]) -> Counted {
    let mut counted = Counted::new();
    for row in rows {
        counted.entry((row.role, row.metric)).or_default().merge(&row.histogram);
    }
    counted
}

/// Adds what was counted elsewhere.
pub fn merge(counted: &mut Counted, other: &Counted) {
    for (key, histogram) in other {
        counted.entry(*key).or_default().merge(histogram);
    }
}
