//! Kinds `fork` and `fanout`: children that end before the next fork.

use std::time::{Duration, Instant};

use runtime::memory::BackingKind;

use super::bench::Bench;
use super::error::Trouble;
use super::program::{Rate, rate_only};
use super::{children, process};
use crate::baseline::cold::Maker;
use crate::record::{Recorder, Summary};
use crate::schedule::Schedule;
use crate::session::{LabError, Silent};

/// Machines made from nothing between the forks of a scenario.
const COLD: u32 = 30;

/// Children that are alive at the same time when they are weighed.
const WEIGHED: u32 = 16;
/// How long memory may take to settle before.
const SETTLE: Duration = Duration::from_millis(300);

/// Closed or open loop. With `compare` cold machines are made in between, where that changes nothing, and
/// children are weighed at the end.
pub(super) fn forks(bench: &mut Bench<'_>, compare: bool) -> Result<(), LabError> {
    bench.warm_up()?;
    let scenario = bench.scenario;
    bench.progress.phase("forks", scenario.forks.into());
    let start = Instant::now() + Duration::from_millis(20);
    let schedule = Schedule::new(start, scenario.interval_us);
    // What being forkable costs is told by a machine that is not.
    let unarmed = match scenario.rate_pages_per_second {
        0 => None,
        _ => Some(bench.rig.start(bench.config.clone())?),
    };
    let cold = (compare && scenario.is_plain() && scenario.reference_mib == 0)
        .then(|| Maker::new(scenario.memory_mib, scenario.vcpus, bench.config.backing))
        .transpose()
        .map_err(Trouble::from)?;
    let mut taxes = [Vec::new(), Vec::new()];
    let beside = scenario.reference();
    let mut silent = Silent;
    let mut silent = Some(&mut silent);
    let mut reference = None;
    for index in 0..scenario.forks {
        if let Some(scenario) = beside.as_ref().filter(|_| index == scenario.reference_from())
            && let Some(silent) = silent.take()
        {
            reference.insert(Bench::new(scenario, silent, false)?).warm_up()?;
        }
        if scenario.is_open_loop() {
            schedule.wait(index);
        }
        let plan = bench.plan();
        let mut round = bench.fork(&plan)?;
        let reported = round.reported;
        bench.record_with(&mut round, |sample| {
            // One that failed is infinitely late.
            if scenario.is_open_loop() && !sample.is_failure() {
                sample.with("latency_us", schedule.latency_us(index, reported))
            } else {
                sample
            }
        });
        if let Some(rate) = plan.rate {
            taxes[0].push(behind(bench, round.parent.rate().1, rate));
        }
        if scenario.is_open_loop() {
            bench.rig.end_all(&round.children)?;
        } else {
            bench.next(&round)?;
        }
        if let (Some(rate), Some(unarmed), true) = (plan.rate, &unarmed, index.is_multiple_of(4)) {
            let program = rate_only(unarmed, rate, plan.generation);
            let words = bench.rig.run(unarmed.uuid, &program)?;
            taxes[1].push(behind(bench, words.rate().1, rate));
        }
        if let Some(reference) = &mut reference {
            let plan = reference.plan();
            let mut round = reference.fork(&plan)?;
            reference.record(&mut round);
            reference.next(&round)?;
        }
        if let Some(cold) = &cold
            && index % scenario.forks.div_ceil(COLD) == 0
        {
            cold_machine(bench, cold)?;
        }
        bench.progress.advance(1);
    }
    if let Some(reference) = reference {
        beside_it(bench, &reference.finish()?.recorder);
    }
    tax(bench, &taxes);
    if compare { weigh(bench) } else { Ok(()) }
}

/// What became of the machine beside.
fn beside_it(bench: &mut Bench<'_>, reference: &Recorder) {
    for us in reference.samples("branch_us") {
        bench.run.recorder.record_apart("reference_branch_us", us);
    }
    for (why, times) in reference.failures() {
        bench.run.notes.push(format!("of the machine beside {times} forks failed: {why}"));
    }
    // What all forks leave to the host makes a young machine slow as well.
    let us = bench.run.recorder.samples("branch_us");
    let n = bench.scenario.reference_forks as usize;
    let p50 = |part: Option<&[f64]>| Some(Summary::of(part?)?.p50.0);
    if n > 0
        && let Some(first) = p50(us.get(..n))
        && let Some(last) = p50(us.get(us.len().saturating_sub(n)..))
    {
        bench.run.values.insert("last_by_first_ratio".to_owned(), last / first);
    }
}

/// Some more forks, which are not recorded, whose children stay alive: what one of them takes.
fn weigh(bench: &mut Bench<'_>) -> Result<(), LabError> {
    // Of a pool of huge pages the kernel's figure of what is available tells nothing.
    if bench.config.backing == BackingKind::Hugetlb {
        return Ok(());
    }
    let at_once = bench.scenario.children_per_fork;
    std::thread::sleep(SETTLE);
    let before = process::available_bytes();
    let mut alive = Vec::new();
    for _ in 0..WEIGHED.div_ceil(at_once.max(1)) {
        let plan = bench.plan();
        alive.extend(bench.fork(&plan)?.children);
        bench.rig.ready(bench.guest.uuid, at_once)?;
    }
    std::thread::sleep(SETTLE);
    children::weigh(bench, &alive, before)?;
    bench.rig.end_all(&alive)?;
    Ok(())
}

/// Makes a machine from nothing under the same conditions as the forks around it, and then a fork
/// that does not count: what the end of a machine leaves to the kernel is not for the next one.
fn cold_machine(bench: &mut Bench<'_>, cold: &Maker) -> Result<(), LabError> {
    let [create_us, _teardown_us] = cold.make().map_err(Trouble::from)?;
    bench.run.baselines_us.entry("cold_create_us".to_owned()).or_default().push(create_us);
    let plan = bench.plan();
    let round = bench.fork(&plan)?;
    bench.next(&round)
}

/// Part of its time that the guest was behind its schedule.
fn behind(bench: &Bench<'_>, ticks: u64, rate: Rate) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "some thousand µs")]
    let us = rate.us as f64;
    bench.guest.us(ticks) / us
}

/// The share of its time that a guest loses because it can be forked: its writes are tracked, and
/// what it wrote is synced.
fn tax(bench: &mut Bench<'_>, [on, off]: &[Vec<f64>; 2]) {
    let (Some(with), Some(without)) = (Summary::of(on), Summary::of(off)) else { return };
    for (name, samples) in [("behind_forkable_ratio", on), ("behind_unarmed_ratio", off)] {
        for sample in samples {
            bench.run.recorder.record_apart(name, *sample);
        }
    }
    let tax = with.mean.0 - without.mean.0;
    bench.run.values.insert("forkable_tax_ratio".to_owned(), tax);
}
