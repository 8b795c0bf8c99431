//! What all kinds of scenario have in common: an armed root, plans, forks that are checked.

use std::collections::HashSet;
use std::time::Instant;

use ebpf_loader::Level;
use guest_abi::param::who;
use runtime::memory::BackingKind;
use runtime::proto::InstanceConfig;
use uuid::Uuid;

use super::error::void;
use super::model::Model;
use super::process;
use super::program::{Guest, Pick, Plan, Rate, Words, restless};
use super::rig::{Outcome, Rig, SEED};
use super::sample::{failed, sample, us};
use super::verify::verify;
use crate::record::Sample;
use crate::scenario::{DirtyMode, Kind, Scenario};
use crate::session::{LabError, Progress, ScenarioRun};

/// How long pages are dirtied at a rate before each fork: long enough for sync rounds to have found
/// their pace, which slows down while a guest does nothing.
const RATE_US: u64 = 100_000;
/// Seeds lie this far apart: each is the beginning of a search.
const SEEDS: u64 = 1 << 20;
/// Most children of a fork of whom each reads all of its memory, at half a second a GiB.
const MOST_WHO_CHECK_ALL: u32 = 3;

/// A scenario under way.
pub(super) struct Bench<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) rig: Rig,
    pub(super) guest: Guest,
    pub(super) model: Model,
    pub(super) run: ScenarioRun,
    pub(super) progress: &'a mut dyn Progress,
    pub(super) config: InstanceConfig,
    generation: u64,
    seen: HashSet<u64>,
}

/// One fork, checked.
pub(super) struct Round {
    /// Taken out when it is recorded.
    pub(super) sample: Sample,
    pub(super) children: Vec<Uuid>,
    pub(super) parent: Words,
    /// Of the first child.
    pub(super) child: Option<Words>,
    pub(super) prewarm_us: Vec<f64>,
    pub(super) reported: Instant,
}

/// The engine's name of a backing.
pub(super) fn backing_kind(scenario: &Scenario) -> BackingKind {
    use crate::scenario::Backing;
    match scenario.backing {
        Backing::Default => InstanceConfig::default().backing,
        Backing::Small => BackingKind::Small,
        Backing::Thp => BackingKind::Thp,
        Backing::Hugetlb => BackingKind::Hugetlb,
    }
}

fn page_bytes(backing: BackingKind) -> u64 {
    match backing {
        BackingKind::Small => 4096,
        BackingKind::Thp | BackingKind::Hugetlb => 2 << 20,
    }
}

impl<'a> Bench<'a> {
    /// Starts the root of a scenario, fills and arms it, and waits for its standbys. With `spoil`
    /// the model has another seed than the guest.
    pub(super) fn new(
        scenario: &'a Scenario,
        progress: &'a mut dyn Progress,
        spoil: bool,
    ) -> Result<Self, LabError> {
        progress.phase("start", 1);
        let backing = backing_kind(scenario);
        let config = InstanceConfig {
            memory_mib: scenario.memory_mib,
            vcpus: scenario.vcpus,
            backing,
            sync: scenario.sync,
            standbys: scenario.children_per_fork,
            ..InstanceConfig::default()
        };
        let mut rig = Rig::new()?;
        if scenario.kind == Kind::Probes {
            rig.probe(Level::Trace)?;
        }
        let guest = rig.start(config.clone())?;
        // The first line that an instance says is that it fell back to another backing.
        if let Some(note) = rig.notes(guest.uuid).into_iter().next()
            && backing != BackingKind::Small
        {
            return Err(LabError::Unavailable { reason: note });
        }
        let mut page_bytes = page_bytes(backing);
        let mut notes = Vec::new();
        if backing == BackingKind::Thp {
            let huge = process::huge_mapped_bytes(rig.pid(guest.uuid)?);
            notes.push(format!(
                "{} of {} MiB of the root's memory were mapped by huge pages before it was armed",
                huge.map_or("an unknown number".to_owned(), |bytes| (bytes >> 20).to_string()),
                scenario.memory_mib
            ));
            if huge == Some(0) {
                page_bytes = 4096;
            }
        }
        let unknown = u64::from(scenario.vcpus - 1);
        for vcpu in 1..scenario.vcpus {
            rig.leave(guest.uuid, vcpu, &restless(&guest, u64::from(vcpu - 1)))?;
        }
        rig.arm(guest.uuid)?;
        if scenario.delay_us > 0 {
            rig.delay(guest.uuid, scenario.delay_us)?;
        }
        rig.ready(guest.uuid, scenario.children_per_fork)?;
        let mut run = ScenarioRun { page_bytes: Some(page_bytes), notes, ..ScenarioRun::default() };
        [run.stages, run.child_stages] = super::sample::stages();
        run.notes.extend(rig.notes(guest.uuid));
        let seed = if spoil { SEED + 1 } else { SEED };
        let model = Model::new(seed, guest.work_pages, unknown);
        let (generation, seen) = (0, HashSet::new());
        Ok(Self { scenario, rig, guest, model, run, progress, config, generation, seen })
    }

    /// The next fork as the scenario wants it.
    pub(super) fn plan(&mut self) -> Plan {
        self.generation += 1;
        let Scenario { check_pages, rate_pages_per_second, .. } = *self.scenario;
        let pick = |count: u64, seed: u64| Pick { count, seed: self.model.known_seed(seed, count) };
        let seed = self.generation * SEEDS;
        let dirty = self.scenario.dirty.map(|dirty| match dirty.mode {
            DirtyMode::Random => pick(dirty.pages.into(), seed),
            DirtyMode::Same => pick(dirty.pages.into(), 0),
        });
        let rate = (rate_pages_per_second > 0).then(|| {
            let per_second = u64::from(rate_pages_per_second);
            // Of the pages that are due those that can be counted on being written.
            let written = pick(per_second * RATE_US / 1_000_000 / 2, seed);
            (Rate { us: RATE_US, per_second, seed: written.seed }, written)
        });
        Plan {
            at_once: self.scenario.is_open_loop(),
            rate: rate.map(|(rate, _)| rate),
            dirty,
            generation: self.generation,
            announce_us: self.scenario.announce_us.into(),
            children: self.scenario.children_per_fork,
            work: None,
            check_dirty: dirty.or(rate.map(|(_, written)| written)),
            check_others: (check_pages > 0).then(|| pick(check_pages.into(), seed + SEEDS / 2)),
        }
    }

    /// Forks as planned and checks parent and children.
    pub(super) fn fork(&mut self, plan: &Plan) -> Result<Round, LabError> {
        let guest = self.guest;
        let made = self.rig.fork(&guest, plan)?;
        let (report, parent, children, reported) = match made {
            Outcome::Made { report, parent, children, reported } => {
                (report, parent, children, reported)
            }
            Outcome::Failed { step, errno, parent } => {
                // The pages were dirtied all the same.
                self.remember(plan, &parent);
                if let Some(work) = plan.work.filter(|work| work.who != who::CHILD) {
                    self.model.work(0..work.pages, work.passes);
                }
                return Ok(Round {
                    sample: failed(&step, errno),
                    children: Vec::new(),
                    parent,
                    child: None,
                    prewarm_us: Vec::new(),
                    reported: Instant::now(),
                });
            }
        };
        self.remember(plan, &parent);
        let works = |role| plan.work.filter(|work| work.who == role || work.who == who::ALL);
        let with_work = works(who::CHILD).map(|work| {
            let mut child = self.model.clone();
            child.work(0..work.pages, work.passes);
            child
        });
        let child = with_work.as_ref().unwrap_or(&self.model);
        let outcome = (&*report, &parent, children.as_slice());
        verify(&guest, plan, child, outcome, &mut self.seen).map_err(void)?;
        if let Some(work) = works(who::PARENT) {
            self.model.work(0..work.pages, work.passes);
        }
        Ok(Round {
            sample: sample(&report),
            children: report.children.iter().map(|child| child.uuid).collect(),
            parent,
            child: children.into_iter().next(),
            prewarm_us: report.children.iter().map(|child| us(child.prewarm_ns)).collect(),
            reported,
        })
    }

    fn remember(&mut self, plan: &Plan, parent: &Words) {
        if let Some(rate) = plan.rate {
            self.model.dirty(parent.rate().0, plan.generation, rate.seed);
        }
        if let Some(dirty) = plan.dirty {
            self.model.dirty(dirty.count, plan.generation, dirty.seed);
        }
    }

    /// Records a fork.
    pub(super) fn record(&mut self, round: &mut Round) {
        self.record_with(round, |sample| sample);
    }

    /// Records a fork with something added to its sample.
    pub(super) fn record_with(&mut self, round: &mut Round, add: impl FnOnce(Sample) -> Sample) {
        self.run.recorder.record(add(std::mem::take(&mut round.sample)));
        for us in &round.prewarm_us {
            self.run.recorder.record_apart("prewarm_us", *us);
        }
    }

    /// Ends the children of a fork, and waits until the parent has its standbys again.
    pub(super) fn next(&mut self, round: &Round) -> Result<(), LabError> {
        self.rig.end_all(&round.children)?;
        self.rig.ready(self.guest.uuid, self.scenario.children_per_fork)?;
        Ok(())
    }

    /// Forks that are not recorded.
    pub(super) fn warm_up(&mut self) -> Result<(), LabError> {
        let rounds = self.scenario.warmup;
        self.progress.phase("warm-up", rounds.into());
        for _ in 0..rounds {
            let plan = self.plan();
            let round = self.fork(&plan)?;
            self.next(&round)?;
            self.progress.advance(1);
        }
        self.check_all()
    }

    /// One fork, not recorded either, whose children read all of their memory. The others check what
    /// was written before the fork, and some pages more.
    fn check_all(&mut self) -> Result<(), LabError> {
        if !self.model.is_known() || self.scenario.children_per_fork > MOST_WHO_CHECK_ALL {
            return Ok(());
        }
        self.progress.phase("check", 1);
        let mut plan = self.plan();
        plan.check_others = Some(Pick { count: 0, seed: 0 });
        let round = self.fork(&plan)?;
        self.next(&round)?;
        self.progress.advance(1);
        Ok(())
    }

    /// Ends everything and gives the results.
    pub(super) fn finish(self) -> Result<ScenarioRun, LabError> {
        self.rig.end()?;
        Ok(self.run)
    }
}
