//! The laboratory that carries scenarios out on the engine.
//!
//! ```text
//!   Scenario ──> bench: root started, filled, armed, standbys ready
//!                  │
//!                  ├── forks, depth, children, tax, upkeep: what a kind does round by round
//!                  │       plan ──> program in the guest ──> fork ──> report ──> sample
//!                  │                       └── answers of parent and children ──> verify
//!                  ├── compare: floor and baselines, when all instances are gone
//!                  └── rig: ends everything, and looks whether anything is left
//! ```
//!
//! The instances are this same program: [`runtime::owner::instance_if_asked`] must be the first
//! line of `main`.

mod bench;
mod children;
mod compare;
mod depth;
mod error;
mod forks;
mod host;
mod model;
mod probes;
mod process;
mod program;
mod rig;
mod sample;
mod tax;
mod upkeep;
mod verify;

use bench::{Bench, backing_kind};
use compare::Comparisons;
use error::Trouble;
pub(crate) use sample::{sample, stages};

use crate::scenario::{Kind, Scenario};
use crate::session::{Lab, LabError, Progress, ScenarioRun};

/// What a laboratory does besides forking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Measures floor and baselines, too.
    pub compare: bool,
    /// Touches free memory before each scenario.
    pub warm_memory: bool,
    /// For a test: what children are expected to have in memory is wrong.
    pub spoil_model: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { compare: true, warm_memory: true, spoil_model: false }
    }
}

/// A laboratory on this host's KVM.
#[derive(Debug)]
pub struct EngineLab {
    options: Options,
    comparisons: Comparisons,
}

impl EngineLab {
    /// Opens the laboratory. From here on the first SIGINT, SIGTERM or SIGHUP ends a run in good
    /// order, and the second at once.
    #[must_use]
    pub fn new(options: Options) -> Self {
        host::catch_signals();
        Self { options, comparisons: Comparisons::default() }
    }
}

impl Lab for EngineLab {
    fn host_kind(&self) -> String {
        // A host that cannot run guest code says why when the first instance starts.
        runtime::doctor::host_kind().map_or("unknown", runtime::doctor::HostKind::name).to_owned()
    }

    fn run(
        &mut self,
        scenario: &Scenario,
        progress: &mut dyn Progress,
    ) -> Result<ScenarioRun, LabError> {
        host::go_on()?;
        if scenario.kind.is_linux() {
            return crate::linux::run(scenario, progress);
        }
        let backing = backing_kind(scenario);
        host::require_memory(memory_needed(scenario))?;
        if self.options.warm_memory {
            progress.phase("memory", 1);
            host::warm_memory(memory_needed(scenario)).map_err(Trouble::from)?;
        }
        let mut notes = Vec::new();
        // Put back when it is dropped: after everything that needs it.
        let _setting = host::provide(backing, scenario.memory_bytes(), &mut notes)?;
        let mut run = measure(scenario, progress, self.options)?;
        run.notes.splice(0..0, notes);
        if self.options.compare {
            self.comparisons.measure(scenario, backing, &mut run, progress)?;
        }
        Ok(run)
    }
}

fn measure(
    scenario: &Scenario,
    progress: &mut dyn Progress,
    options: Options,
) -> Result<ScenarioRun, LabError> {
    let mut bench = Bench::new(scenario, progress, options.spoil_model)?;
    match scenario.kind {
        Kind::Fork | Kind::Fanout => forks::forks(&mut bench, options.compare)?,
        Kind::Depth => depth::depth(&mut bench)?,
        Kind::Children => children::children(&mut bench)?,
        Kind::Tax => tax::tax(&mut bench)?,
        Kind::Upkeep => upkeep::upkeep(&mut bench)?,
        Kind::Probes => probes::probes(&mut bench)?,
        // They have a laboratory of their own.
        Kind::LinuxFork | Kind::LinuxBoot | Kind::LinuxVsock => {}
    }
    bench.finish()
}

/// Memory that a scenario takes, in bytes: the image, what becomes private of it, and children.
fn memory_needed(scenario: &Scenario) -> u64 {
    /// Of one live child, kernel memory included.
    const CHILD: u64 = 4 << 20;
    let images = if scenario.kind == Kind::Tax { 2 } else { 1 };
    let children = u64::from(scenario.keep_children.max(scenario.depth));
    let private = u64::from(scenario.work_mib) << 22;
    let reference = u64::from(scenario.reference_mib) << 20;
    scenario.memory_bytes() * images
        + reference
        + scenario.memory_bytes() / 4
        + private
        + children * CHILD
}
