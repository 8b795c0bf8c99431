//! What forks are compared with, measured in the same run: the floor with every scenario, what
//! costs more time once for each kind of machine.

use std::collections::HashSet;
use std::time::Duration;

use runtime::memory::BackingKind;

use super::error::Trouble;
use super::host;
use crate::baseline::BaselineError;
use crate::baseline::cold::{self, ColdConfig};
use crate::baseline::floor::{DirtyPages, Floor, FloorConfig, Standby};
use crate::baseline::process::{self, ForkConfig};
use crate::scenario::{DirtyMode, Scenario};
use crate::session::{Progress, ScenarioRun};

/// Samples of each comparison, and the most time for them.
const SAMPLES: usize = 30;
const LIMIT: Duration = Duration::from_millis(800);

/// How often a floor is measured again that lies above what it is the floor of.
const AGAIN: u32 = 2;

/// A kind of machine.
type Key = (&'static str, u32, u32, &'static str);

/// Remembers what was measured in this run.
#[derive(Debug, Default)]
pub(super) struct Comparisons {
    done: HashSet<Key>,
}

impl Comparisons {
    /// Measures what belongs to a scenario.
    pub(super) fn measure(
        &mut self,
        scenario: &Scenario,
        backing: BackingKind,
        run: &mut ScenarioRun,
        progress: &mut dyn Progress,
    ) -> Result<(), Trouble> {
        progress.phase("floor", 4);
        floor(scenario, backing, run)?;
        progress.advance(1);
        let name = backing.backing().name();
        let Scenario { memory_mib, vcpus, .. } = *scenario;
        if self.done.insert(("cold", memory_mib, vcpus, name)) {
            host::go_on()?;
            let config = ColdConfig { memory_mib, vcpus, backing, samples: SAMPLES, limit: LIMIT };
            let cold = cold::measure(&config).map(|cold| cold.create_us);
            keep(run, "cold_create_us", cold);
        }
        progress.advance(1);
        let thp = backing == BackingKind::Thp;
        if self.done.insert(("fork", memory_mib, 0, if thp { "thp" } else { "4k" })) {
            host::go_on()?;
            let config = ForkConfig {
                memory_mib,
                thp,
                samples: SAMPLES,
                limit: LIMIT,
                ..ForkConfig::default()
            };
            keep(run, "process_fork_us", process::fork(&config).map(|forks| forks.fork_us));
        }
        progress.advance(1);
        if self.done.insert(("spawn", 0, 0, "")) {
            keep(run, "posix_spawn_us", process::spawn_true(SAMPLES, LIMIT));
        }
        progress.advance(1);
        host::go_on()
    }
}

fn floor(scenario: &Scenario, backing: BackingKind, run: &mut ScenarioRun) -> Result<(), Trouble> {
    let Scenario { memory_mib, vcpus, .. } = *scenario;
    let config = FloorConfig { memory_mib, vcpus, backing };
    let dirty = u64::from(scenario.dirty_pages());
    let same = scenario.dirty.is_some_and(|dirty| dirty.mode == DirtyMode::Same);
    // What the scenario asks for, not what the engine made of it: a floor that rises with the
    // engine's work would be no floor.
    let pages = DirtyPages { dirty, hot: if same { dirty } else { 0 } };
    let standby = if scenario.announce_us > 0 { Standby::Spinning } else { Standby::Parked };
    let branch_us = run.recorder.summary("branch_us").map_or(f64::INFINITY, |it| it.p50.0);
    let mut floor = Floor::measure(&config)?;
    for _ in 0..AGAIN {
        if floor.sum_us(pages, standby) <= branch_us {
            break;
        }
        run.notes.push("the floor was disturbed (above branch) and measured again".to_owned());
        floor = Floor::measure(&config)?;
    }
    run.floor_us = Some(floor.sum_us(pages, standby));
    run.floor_parts_us = floor.terms_us(pages, standby);
    run.notes.extend(floor.notes.iter().map(|note| format!("floor: {note}")));
    Ok(())
}

/// A comparison that cannot be had is a remark: the forks were measured all the same.
fn keep(run: &mut ScenarioRun, name: &str, samples: Result<Vec<f64>, BaselineError>) {
    match samples {
        Ok(samples) => {
            run.baselines_us.insert(name.to_owned(), samples);
        }
        Err(error) => run.notes.push(format!("no {name}: {error}")),
    }
}
