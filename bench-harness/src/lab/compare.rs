//! What forks are compared with, measured in the same run: the floor with every scenario, what
//! costs more time once for each kind of machine.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
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

/// Remembers what was measured in this run: machines of one kind are compared with the same samples.
#[derive(Debug, Default)]
pub(super) struct Comparisons {
    known: HashMap<Key, Vec<f64>>,
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
        self.keep(run, "cold_create_us", ("cold", memory_mib, vcpus, name), || {
            let config = ColdConfig { memory_mib, vcpus, backing, samples: SAMPLES, limit: LIMIT };
            cold::measure(&config).map(|cold| cold.create_us)
        })?;
        progress.advance(1);
        let thp = backing == BackingKind::Thp;
        let key = ("fork", memory_mib, 0, if thp { "thp" } else { "4k" });
        self.keep(run, "process_fork_us", key, || {
            let config = ForkConfig {
                memory_mib,
                thp,
                samples: SAMPLES,
                limit: LIMIT,
                ..ForkConfig::default()
            };
            process::fork(&config).map(|forks| forks.fork_us)
        })?;
        progress.advance(1);
        self.keep(run, "posix_spawn_us", ("spawn", 0, 0, ""), || {
            process::spawn_true(SAMPLES, LIMIT)
        })?;
        progress.advance(1);
        host::go_on()
    }

    /// Adds the samples of a baseline to a scenario. A comparison that cannot be had is a remark: the
    /// forks were measured all the same.
    fn keep(
        &mut self,
        run: &mut ScenarioRun,
        name: &str,
        key: Key,
        measure: impl FnOnce() -> Result<Vec<f64>, BaselineError>,
    ) -> Result<(), Trouble> {
        host::go_on()?;
        // Measured between the forks already.
        if let Some(samples) = run.baselines_us.get(name) {
            self.known.entry(key).or_insert_with(|| samples.clone());
            return Ok(());
        }
        let samples = match self.known.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => match measure() {
                Ok(samples) => place.insert(samples),
                Err(error) => {
                    run.notes.push(format!("no {name}: {error}"));
                    return Ok(());
                }
            },
        };
        run.baselines_us.insert(name.to_owned(), samples.clone());
        Ok(())
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
        let again = Floor::measure(&config)?;
        if again.sum_us(pages, standby) < floor.sum_us(pages, standby) {
            floor = again;
        }
    }
    if floor.sum_us(pages, standby) > branch_us {
        run.notes.push(
            "the floor is above branch: a fork does side by side what the floor adds up (capture \
             and apply, and apply with two threads), and the lowest of three measurements is taken"
                .to_owned(),
        );
    }
    run.floor_us = Some(floor.sum_us(pages, standby));
    run.floor_parts_us = floor.terms_us(pages, standby);
    run.notes.extend(floor.notes.iter().map(|note| format!("floor: {note}")));
    Ok(())
}
