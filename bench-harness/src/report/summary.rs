//! A run in figures, as `summary.json` has it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::figures::{FigureVerdict, verdicts};
use super::sizes::{SizePoint, drift, sizes};
use super::tail::tail_stage;
use super::{HostFacts, ReportError, Revision};
use crate::record::Summary;
use crate::scenario::Scenario;
use crate::session::{Outcome, ScenarioRun, Session};

/// Version of the format of `summary.json`.
pub(super) const FORMAT: u32 = 1;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Version of this format.
    pub format: u32,
    /// The command as typed.
    pub command: String,
    /// The source.
    pub revision: Revision,
    /// The machine.
    pub host: HostFacts,
    /// Load averages (1, 5, 15 min) before and after.
    pub load: [[f64; 3]; 2],
    /// When it began, in s since 1970.
    pub started_unix_s: u64,
    /// How long it took, in s.
    pub seconds: f64,
    /// Why all of it is void.
    pub void: Option<String>,
    /// Why it ended before its last scenario.
    #[serde(default)]
    pub ended: Option<String>,
    /// What was measured.
    pub scenarios: Vec<ScenarioSummary>,
    /// What this host could not run: name, reason.
    pub unavailable: BTreeMap<String, String>,
    /// The figures of the specification.
    pub figures: Vec<FigureVerdict>,
}

/// One scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScenarioSummary {
    /// Its definition.
    pub scenario: Scenario,
    /// Kind of host.
    pub host: String,
    /// Forks, failed ones included.
    pub n: u64,
    /// Failed forks.
    pub failed: u64,
    /// Reasons of the failures and how often each occurred.
    pub failures: BTreeMap<String, u64>,
    /// Summary of each metric.
    pub metrics: BTreeMap<String, Summary>,
    /// Names of the stage metrics in the order of the fork path.
    pub stages: Vec<String>,
    /// Those of them that happen in the child, while the others happen in the parent.
    #[serde(default)]
    pub child_stages: Vec<String>,
    /// The stage that makes the slowest 2 % of the forks slow, or `outside the stages`; the same for
    /// the longest pauses, in which the child's stages have no part.
    pub tail_stage: Option<String>,
    #[serde(default)]
    /// See `tail_stage`.
    pub pause_tail_stage: Option<String>,
    /// `branch_us` by depth or by number of live children, where the scenario has them.
    pub sizes: Vec<SizePoint>,
    /// p50 of `branch_us` in the last eighth of the forks (of the depths, of the children alive)
    /// divided by that in the first eighth, or of a young machine's forks beside the last ones.
    pub drift_ratio: Option<f64>,
    /// Sum of the primitives that no fork can avoid, in µs.
    pub floor_us: Option<f64>,
    /// Its terms in µs.
    pub floor_parts_us: BTreeMap<String, f64>,
    /// What is compared with.
    pub baselines: BTreeMap<String, Summary>,
    /// Other figures, by name with unit.
    pub values: BTreeMap<String, f64>,
    /// Memory of one more child in bytes.
    pub memory_per_child_bytes: Option<u64>,
    /// Size of the image's pages in bytes.
    pub page_bytes: Option<u64>,
    /// Remarks.
    pub notes: Vec<String>,
}

impl ScenarioSummary {
    /// Sums up one scenario.
    #[must_use]
    pub fn new(scenario: &Scenario, host_kind: &str, run: &ScenarioRun) -> Self {
        let recorder = &run.recorder;
        let summary = |name: &str| Some((name.to_owned(), recorder.summary(name)?));
        let seen = || recorder.metrics().filter(|name| name.starts_with("stage_"));
        let stages: Vec<String> = if run.stages.is_empty() {
            seen().map(str::to_owned).collect()
        } else {
            run.stages.clone()
        };
        let baselines = run.baselines_us.iter();
        let failures = recorder.failures().into_iter();
        Self {
            scenario: scenario.clone(),
            host: run.host.clone().unwrap_or_else(|| host_kind.to_owned()),
            n: recorder.forks() as u64,
            failed: recorder.failed() as u64,
            failures: failures.map(|(why, times)| (why.to_owned(), times)).collect(),
            metrics: recorder.metrics().filter_map(summary).collect(),
            tail_stage: tail_stage(recorder, "branch_us", stages.iter()),
            pause_tail_stage: tail_stage(
                recorder,
                "pause_us",
                stages.iter().filter(|stage| !run.child_stages.contains(stage)),
            ),
            stages,
            child_stages: run.child_stages.clone(),
            sizes: sizes(recorder),
            drift_ratio: drift(recorder, scenario),
            floor_us: run.floor_us,
            floor_parts_us: run.floor_parts_us.clone(),
            baselines: baselines
                .filter_map(|(name, samples)| Some((name.clone(), Summary::of(samples)?)))
                .collect(),
            values: run.values.clone(),
            memory_per_child_bytes: run.memory_per_child_bytes,
            page_bytes: run.page_bytes,
            notes: run.notes.clone(),
        }
    }

    /// `branch_us`, the headline, if it was measured.
    #[must_use]
    pub fn branch(&self) -> Option<&Summary> {
        self.metrics.get("branch_us")
    }

    /// p50 of `branch_us` divided by the floor.
    #[must_use]
    pub fn branch_per_floor(&self) -> Option<f64> {
        let floor = self.floor_us.filter(|floor| *floor > 0.0)?;
        Some(self.branch()?.p50.0 / floor)
    }

    /// p50 in µs of each stage, in the order of the path; names without `stage_` and `_us`. Stages
    /// of the parent, then those of the child, if they are told apart.
    #[must_use]
    pub fn stage_p50s(&self) -> Vec<Vec<(String, f64)>> {
        let stage = |name: &String| Some((stage_word(name), self.metrics.get(name)?.p50.0));
        let of = |in_child: bool| -> Vec<_> {
            let stages = self.stages.iter();
            stages
                .filter(|it| self.child_stages.contains(it) == in_child)
                .filter_map(stage)
                .collect()
        };
        [of(false), of(true)].into_iter().filter(|bar| !bar.is_empty()).collect()
    }
}

/// `capture` of `stage_capture_us`.
pub(super) fn stage_word(metric: &str) -> String {
    metric.trim_start_matches("stage_").trim_end_matches("_us").to_owned()
}

/// Sums up a session, and holds it against the figures of the specification.
#[must_use]
pub fn summarize(session: &Session, revision: Revision) -> RunSummary {
    let mut scenarios = Vec::new();
    let mut unavailable = BTreeMap::new();
    for (scenario, outcome) in &session.outcomes {
        match outcome {
            Outcome::Done(run) => {
                scenarios.push(ScenarioSummary::new(scenario, &session.host_kind, run));
            }
            Outcome::Unavailable(reason) => {
                unavailable.insert(scenario.name.clone(), reason.clone());
            }
        }
    }
    let since_1970 = session.started.duration_since(UNIX_EPOCH).unwrap_or_default();
    RunSummary {
        format: FORMAT,
        command: session.command.clone(),
        revision,
        host: HostFacts::read(&session.host_kind),
        load: session.load,
        started_unix_s: since_1970.as_secs(),
        seconds: session.seconds,
        void: session.void.clone(),
        ended: session.ended.clone(),
        // A void run proves nothing, met figures least of all.
        figures: if session.void.is_some() { Vec::new() } else { verdicts(&scenarios) },
        scenarios,
        unavailable,
    }
}

impl RunSummary {
    /// The scenario of that name.
    #[must_use]
    pub fn scenario(&self, name: &str) -> Option<&ScenarioSummary> {
        self.scenarios.iter().find(|summary| summary.scenario.name == name)
    }

    /// Reads a recorded run: its folder or its `summary.json`.
    ///
    /// # Errors
    ///
    /// [`ReportError`] if it cannot be read or is of another format.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let path = if path.is_dir() { path.join("summary.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&path).map_err(|source| ReportError::File {
            action: "read",
            path: path.clone(),
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| ReportError::Format { path, source })
    }
}
