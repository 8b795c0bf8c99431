//! Kinds `fork` and `fanout`: children that end before the next fork.

use std::time::{Duration, Instant};

use super::bench::Bench;
use super::program::{Rate, rate_only};
use crate::record::Summary;
use crate::schedule::Schedule;
use crate::session::LabError;

/// Closed or open loop.
pub(super) fn forks(bench: &mut Bench<'_>) -> Result<(), LabError> {
    bench.warm_up()?;
    let scenario = bench.scenario;
    bench.progress.phase("forks", scenario.forks.into());
    let start = Instant::now() + Duration::from_millis(20);
    let schedule = Schedule::new(start, scenario.interval_us);
    let mut taxes = [Vec::new(), Vec::new()];
    for index in 0..scenario.forks {
        if scenario.is_open_loop() {
            schedule.wait(index);
        }
        let plan = bench.plan();
        let mut round = bench.fork(&plan)?;
        let reported = round.reported;
        bench.record_with(&mut round, |sample| {
            if scenario.is_open_loop() {
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
        if let Some(rate) = plan.rate {
            taxes[1].push(without_sync(bench, rate)?);
        }
        bench.progress.advance(1);
    }
    tax_of_sync(bench, &taxes);
    Ok(())
}

/// Part of its time that the guest was behind its schedule.
fn behind(bench: &Bench<'_>, ticks: u64, rate: Rate) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "some thousand µs")]
    let us = rate.us as f64;
    bench.guest.us(ticks) / us
}

/// The same pages a second without sync rounds, and without a fork.
fn without_sync(bench: &mut Bench<'_>, rate: Rate) -> Result<f64, LabError> {
    let guest = bench.guest;
    let (generation, seed) = bench.fresh();
    let rate = Rate { seed: bench.model.known_seed(seed, 1), ..rate };
    bench.rig.sync(guest.uuid, false)?;
    let words = bench.rig.run(guest.uuid, &rate_only(&guest, rate, generation))?;
    bench.rig.sync(guest.uuid, bench.scenario.sync)?;
    let (pages, ticks) = words.rate();
    bench.model.dirty(pages, generation, rate.seed);
    // So that the next round begins with nothing left of this one.
    std::thread::sleep(Duration::from_millis(10));
    Ok(behind(bench, ticks, rate))
}

fn tax_of_sync(bench: &mut Bench<'_>, [on, off]: &[Vec<f64>; 2]) {
    let (Some(with), Some(without)) = (Summary::of(on), Summary::of(off)) else { return };
    for (name, samples) in [("behind_sync_on_ratio", on), ("behind_sync_off_ratio", off)] {
        for sample in samples {
            bench.run.recorder.record_apart(name, *sample);
        }
    }
    let tax = with.mean.0 - without.mean.0;
    bench.run.values.insert("sync_tax_ratio".to_owned(), tax);
}
