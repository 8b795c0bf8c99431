//! How often the gate cries wolf, and how often it sleeps, on simulated machines.
//!
//! The machine of the simulation is worse than the one that we have seen: its speed wanders, jumps
//! by up to a factor of two and stays there, every instance has its own luck, and one sample in
//! thirty waits for a neighbour's time slice.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeMap;
use std::convert::Infallible;

use bench_harness::stats::rng::Rng;
use bench_harness::stats::signed_rank::median;
use bench_harness::stats::{Batch, Plan, Thresholds, Unit, Verdict, interleave, judge};

const SAMPLES_PER_BATCH: usize = 25;

struct Machine {
    rng: Rng,
    wander: f64,
    jump: f64,
}

impl Machine {
    fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed), wander: 0.0, jump: 0.0 }
    }

    /// One batch on the machine as it is now; `factor` is what the change costs.
    fn batch(&mut self, factor: f64) -> Batch {
        // Between batches: a random walk that is pulled back, and a neighbour that comes or goes
        // about every twelve batches.
        self.wander = 0.9 * self.wander + 0.06 * self.rng.normal();
        if self.rng.uniform() < 1.0 / 12.0 {
            self.jump = self.rng.uniform() * 2.0f64.ln();
        }
        let luck = 0.04 * self.rng.normal();
        let level = 70.0 * factor * (self.wander + self.jump + luck).exp();
        let mut sample = || {
            if self.rng.uniform() < 1.0 / 30.0 {
                // Pareto with index 1.1: the mean hardly exists, the maximum is milliseconds.
                return level + 40.0 * self.rng.uniform().powf(-1.0 / 1.1);
            }
            level * (0.12 * self.rng.normal()).exp()
        };
        let samples = (0..SAMPLES_PER_BATCH).map(|_| sample()).collect();
        let metrics = BTreeMap::from([("branch_us".to_owned(), samples)]);
        Batch { metrics, ..Batch::default() }
    }
}

fn session(seed: u64, factor: f64) -> Vec<Unit> {
    let plan = Plan { seed: seed ^ 0xc01, ..Plan::default() };
    let machine = std::cell::RefCell::new(Machine::new(seed));
    let measure = |factor: f64| Ok::<_, Infallible>(machine.borrow_mut().batch(factor));
    interleave(&plan, || measure(1.0), || measure(factor), |_, _| ()).unwrap()
}

fn alarms(runs: u64, factor: f64, comparisons: usize) -> usize {
    let judged = (0..runs).map(|run| {
        let units = session(run * 7919 + 11, factor);
        judge(&units, &["branch_us"], comparisons, &Thresholds::default()).metrics[0].verdict
    });
    judged.filter(|verdict| *verdict == Verdict::Slower).count()
}

#[test]
fn twenty_runs_of_a_against_a_pass_without_an_alarm() {
    // A hundred times twenty runs. Two alarms in 2,000 would mean that one series of twenty in
    // fifty is disturbed; the gate repeats an alarm before it fails, which squares that.
    let alarms = alarms(2_000, 1.0, 1);
    assert!(alarms <= 2, "{alarms} alarms in 2,000 runs of A against A");
}

#[test]
fn a_slow_down_of_15_percent_is_found() {
    // As one of four comparisons, each with a quarter of the p.
    let alarms = alarms(300, 1.15, 4);
    assert!(alarms >= 285, "only {alarms} of 300 found");
}

#[test]
fn p_is_what_it_says() {
    let p = |run: u64| {
        let units = session(run * 104_729 + 5, 1.0);
        judge(&units, &["branch_us"], 1, &Thresholds::default()).metrics[0].p_slower
    };
    let values: Vec<f64> = (0..2_000).map(p).collect();
    for level in [0.01, 0.05, 0.2, 0.5] {
        let below = values.iter().filter(|p| **p <= level).count();
        let expected = 2_000.0 * level;
        let slack = 3.5 * expected.sqrt();
        let below = f64::from(u32::try_from(below).unwrap());
        assert!(below <= expected + slack, "{below} p values up to {level}, expected {expected}");
        assert!(below >= 0.6 * expected - slack, "p is needlessly careful: {below} at {level}");
    }
}

#[test]
fn shuffling_single_samples_would_cry_wolf() {
    // The negative control: the same data, the test that most harnesses use.
    let runs = 60;
    let below = (0..runs).filter(|run| pooled_p(&session(run * 31 + 1, 1.0), *run) <= 0.05).count();
    assert!(below > 6, "only {below} of {runs} below 0.05: is the simulated machine too calm?");
}

/// p of a permutation test on the difference of medians that takes each sample for a fact.
fn pooled_p(units: &[Unit], seed: u64) -> f64 {
    let pool = |batches: &mut dyn Iterator<Item = &Batch>| -> Vec<f64> {
        batches.flat_map(|batch| batch.metrics["branch_us"].iter().copied()).collect()
    };
    let a = pool(&mut units.iter().flat_map(|unit| &unit.a));
    let b = pool(&mut units.iter().flat_map(|unit| &unit.b));
    let difference =
        |a: &[f64], b: &[f64]| median(&mut b.to_vec()).unwrap() - median(&mut a.to_vec()).unwrap();
    let observed = difference(&a, &b).abs();
    let mut all = [a.as_slice(), b.as_slice()].concat();
    let mut rng = Rng::new(seed);
    let shuffles = 100;
    let mut as_far = 0;
    for _ in 0..shuffles {
        for last in (1..all.len()).rev() {
            let other = rng.bits() % (last as u64 + 1);
            all.swap(last, usize::try_from(other).unwrap());
        }
        as_far += u32::from(difference(&all[..a.len()], &all[a.len()..]).abs() >= observed);
    }
    f64::from(as_far) / f64::from(shuffles)
}
