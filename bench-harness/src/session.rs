//! One bench run: scenarios go to a laboratory, results come back.
//!
//! The harness knows scenarios, samples and reports; it does not know how a machine is forked. That
//! is behind [`Lab`]. A benchmark is a test here: a child that does not return its own id and the
//! right checksum of its memory voids the run ([`LabError::Void`]), because the speed of a wrong
//! fork is no figure.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use crate::record::Recorder;
use crate::scenario::Scenario;

/// What a scenario gave.
#[derive(Clone, Debug, Default)]
pub struct ScenarioRun {
    /// Kind of host that it ran on, if that is another than the laboratory's.
    pub host: Option<String>,
    /// The samples.
    pub recorder: Recorder,
    /// Names of the stage metrics (`stage_…_us`) in the order of the fork path. The order in which
    /// the recorder saw them, if empty.
    pub stages: Vec<String>,
    /// Those of `stages` that happen in the child, at the same time as the others in the parent.
    pub child_stages: Vec<String>,
    /// Sum of the primitives that no fork of this scenario can avoid, in µs.
    pub floor_us: Option<f64>,
    /// Its terms in µs, by name.
    pub floor_parts_us: BTreeMap<String, f64>,
    /// Samples in µs of what is compared with, by name: `cold_create_us`, `process_fork_us`,
    /// `posix_spawn_us`.
    pub baselines_us: BTreeMap<String, Vec<f64>>,
    /// Other figures, by name with unit: `started_s`, `idle_cpu_ratio`.
    pub values: BTreeMap<String, f64>,
    /// Memory of one more child in bytes, that of kernel and KVM included.
    pub memory_per_child_bytes: Option<u64>,
    /// Size of the image's pages in bytes, as it really was.
    pub page_bytes: Option<u64>,
    /// Remarks for the report, such as a backing that fell back.
    pub notes: Vec<String>,
}

/// Why a scenario gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A fork had the wrong outcome. Everything measured in this run is void.
    #[error("void: {reason}")]
    Void {
        /// What was wrong, with the numbers.
        reason: String,
    },
    /// This host cannot run the scenario (not enough memory, no pool of huge pages). The report
    /// says so; the run goes on.
    #[error("not on this host: {reason}")]
    Unavailable {
        /// What is missing and what to do.
        reason: String,
    },
    /// The scenario could not be carried out; the run ends.
    #[error("scenario failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Carries out scenarios.
pub trait Lab {
    /// Kind of host: `direct`, `nested`, `hardware`.
    fn host_kind(&self) -> String;

    /// Carries out one scenario: warm-up, `forks` forks, floor and baselines of the same time.
    ///
    /// Closed or open loop, checks of every child, and the end of everything started are its
    /// affair. A single fork that fails is a [`Sample::failed`](crate::record::Sample::failed) and
    /// not an error.
    ///
    /// # Errors
    ///
    /// [`LabError`]; see its variants for what the harness does then.
    fn run(
        &mut self,
        scenario: &Scenario,
        progress: &mut dyn Progress,
    ) -> Result<ScenarioRun, LabError>;
}

/// Told how far a scenario is. To be called between forks, never inside one: it may draw.
pub trait Progress {
    /// A new part begins: `warm-up`, `forks`, `floor`; `total` steps long.
    fn phase(&mut self, what: &str, total: u64);
    /// So many steps more are done.
    fn advance(&mut self, steps: u64);
}

/// Progress that nobody looks at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&mut self, _what: &str, _total: u64) {}
    fn advance(&mut self, _steps: u64) {}
}

/// How one scenario of a session ended.
#[derive(Debug)]
pub enum Outcome {
    /// With results.
    Done(Box<ScenarioRun>),
    /// Not on this host, and why.
    Unavailable(String),
}

/// A run of several scenarios.
#[derive(Debug)]
pub struct Session {
    /// The command as typed.
    pub command: String,
    /// Kind of host, from the laboratory.
    pub host_kind: String,
    /// When it began.
    pub started: SystemTime,
    /// How long it took, in s.
    pub seconds: f64,
    /// Load averages (1, 5, 15 min) before and after.
    pub load: [[f64; 3]; 2],
    /// Scenarios in the order of the run.
    pub outcomes: Vec<(Scenario, Outcome)>,
    /// Why all of it is void, with the scenario's name.
    pub void: Option<String>,
    /// Why it ended before its last scenario, with the scenario's name. What was measured before
    /// stands.
    pub ended: Option<String>,
}

/// Told about the scenarios of a session.
pub trait Watcher: Progress {
    /// A scenario begins; `index` from 0.
    fn begin(&mut self, scenario: &Scenario, index: usize, of: usize);
    /// It ended.
    fn end(&mut self, scenario: &Scenario, outcome: &Outcome);
}

/// Runs scenarios one after the other.
///
/// A void scenario ends the session, which has no figures then, and a scenario that cannot be carried
/// out ends it with those that were measured before; either way the report can say what happened.
///
/// # Errors
///
/// [`LabError::Failed`] of the first scenario, if it could not be carried out.
pub fn run(
    lab: &mut dyn Lab,
    scenarios: &[Scenario],
    command: &str,
    watcher: &mut dyn Watcher,
) -> Result<Session, LabError> {
    let clock = Instant::now();
    let load = crate::report::load_average();
    let mut session = Session {
        command: command.to_owned(),
        host_kind: lab.host_kind(),
        started: SystemTime::now(),
        seconds: 0.0,
        load: [load, load],
        outcomes: Vec::new(),
        void: None,
        ended: None,
    };
    for (index, scenario) in scenarios.iter().enumerate() {
        watcher.begin(scenario, index, scenarios.len());
        let outcome = match lab.run(scenario, watcher) {
            Ok(run) => Outcome::Done(Box::new(run)),
            Err(LabError::Unavailable { reason }) => Outcome::Unavailable(reason),
            Err(LabError::Void { reason }) => {
                session.void = Some(format!("{}: {reason}", scenario.name));
                session.outcomes.clear();
                break;
            }
            Err(failed @ LabError::Failed(_)) if session.outcomes.is_empty() => return Err(failed),
            Err(failed) => {
                let reason = runtime::sys::chain(&failed);
                session.ended = Some(format!("{}: {reason}", scenario.name));
                break;
            }
        };
        watcher.end(scenario, &outcome);
        session.outcomes.push((scenario.clone(), outcome));
    }
    session.load[1] = crate::report::load_average();
    session.seconds = clock.elapsed().as_secs_f64();
    Ok(session)
}
