//! Kind `tax`: what work costs after a fork, against the same work in an instance never forked.

use guest_abi::entry::PAGE;
use guest_abi::param::who;

use super::bench::Bench;
use super::program::{Guest, Plan, Words, Work, work_only};
use crate::session::LabError;

/// Passes over the memory: the first pays for the fork, the others show whether it was paid for.
const PASSES: u64 = 16;

/// Rounds of three: the instance never forked, a fork whose parent works, a fork whose child works.
/// Parent and child do not work at the same time: what they cost each other on two processors is
/// not the fork's doing.
pub(super) fn tax(bench: &mut Bench<'_>) -> Result<(), LabError> {
    let never_forked = bench.rig.start(bench.config.clone())?;
    bench.warm_up()?;
    let pages = (u64::from(bench.scenario.work_mib) << 20) / PAGE;
    let work = |who| Work { who, pages, passes: PASSES };
    // Pages that were never touched are not the work either.
    bench.rig.run(never_forked.uuid, &work_only(&never_forked, work(who::ALL)))?;
    bench.progress.phase("forks", bench.scenario.forks.into());
    for _ in 0..bench.scenario.forks {
        let reference =
            bench.rig.run(never_forked.uuid, &work_only(&never_forked, work(who::ALL)))?;
        for (role, name) in [(who::PARENT, "parent"), (who::CHILD, "child")] {
            let plan = Plan { work: Some(work(role)), ..bench.plan() };
            let mut round = bench.fork(&plan)?;
            bench.record(&mut round);
            let worker =
                if role == who::PARENT { Some(&round.parent) } else { round.child.as_ref() };
            // The parent of a fork that failed works too, on a machine that is none the worse.
            if let (Some(worker), false) = (worker, round.children.is_empty()) {
                record(bench, name, worker, &reference, pages);
            }
            bench.next(&round)?;
            // What the parent has written is no part of the next fork: a standby made anew has it.
            bench.rig.ready(bench.guest.uuid, 0)?;
            bench.rig.ready(bench.guest.uuid, 1)?;
        }
        let us = never_forked.us(reference.work_ticks()[1]);
        bench.run.recorder.record_apart("work_never_forked_us", us);
        bench.progress.advance(1);
    }
    Ok(())
}

fn record(bench: &mut Bench<'_>, name: &str, worker: &Words, reference: &Words, pages: u64) {
    let guest: Guest = bench.guest;
    let [first, all] = worker.work_ticks().map(|ticks| guest.us(ticks));
    let [first_reference, all_reference] = reference.work_ticks().map(|ticks| guest.us(ticks));
    let recorder = &mut bench.run.recorder;
    recorder.record_apart(format!("tax_{name}_ratio"), all / all_reference);
    recorder.record_apart(format!("tax_{name}_first_pass_ratio"), first / first_reference);
    #[expect(clippy::cast_precision_loss, reason = "some thousand pages")]
    let per_page = (first - first_reference) / pages as f64;
    recorder.record_apart(format!("tax_{name}_per_page_us"), per_page);
}
