//! Kind `children`: forks while more and more children are alive, and what one of them weighs.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::bench::Bench;
use super::error::Trouble;
use super::process;
use crate::record::Sample;
use crate::session::LabError;

/// Children whose memory is looked at page by page.
const WEIGHED: usize = 32;
/// How long memory may take to settle before it is measured.
const SETTLE: Duration = Duration::from_secs(1);

/// Again and again from none alive to all: rows that are minutes apart would not compare.
pub(super) fn children(bench: &mut Bench<'_>) -> Result<(), LabError> {
    bench.warm_up()?;
    let scenario = bench.scenario;
    let of_a_cycle = u64::from(scenario.keep_children) + 2 * u64::from(scenario.forks);
    bench.progress.phase("forks", of_a_cycle * u64::from(scenario.cycles));
    for index in 0..scenario.cycles {
        for _ in 0..scenario.forks {
            passing(bench, 0, Sample::aside)?;
        }
        let alive = grow(bench, index == 0)?;
        for _ in 0..scenario.forks {
            passing(bench, alive.len(), |sample| sample)?;
        }
        let begin = Instant::now();
        bench.rig.end_all(&alive)?;
        let seconds = begin.elapsed().as_secs_f64();
        bench.run.values.entry("ended_s".to_owned()).or_insert(seconds);
    }
    Ok(())
}

/// `keep_children` forks whose children stay. The first time these are weighed.
fn grow(bench: &mut Bench<'_>, first: bool) -> Result<Vec<Uuid>, LabError> {
    let keep = bench.scenario.keep_children;
    let before = first.then(|| {
        std::thread::sleep(SETTLE);
        process::available_bytes()
    });
    let begin = Instant::now();
    let mut alive: Vec<Uuid> = Vec::new();
    for _ in 0..keep {
        alive.extend(one(bench, alive.len(), Sample::aside)?);
        bench.rig.ready(bench.guest.uuid, 1)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let short = u32::try_from(alive.len()) != Ok(keep);
    if short {
        bench.run.notes.push(format!("of {keep} children {} came to life", alive.len()));
    }
    if let Some(before) = before {
        if !short {
            bench.run.values.insert("started_s".to_owned(), seconds);
        }
        std::thread::sleep(SETTLE);
        weigh(bench, &alive, before)?;
    }
    Ok(alive)
}

/// A fork whose child ends before the next one.
fn passing(
    bench: &mut Bench<'_>,
    alive: usize,
    as_what: impl FnOnce(Sample) -> Sample,
) -> Result<(), LabError> {
    let children = one(bench, alive, as_what)?;
    bench.rig.end_all(&children)?;
    bench.rig.ready(bench.guest.uuid, 1)?;
    Ok(())
}

/// One fork while so many children are alive.
fn one(
    bench: &mut Bench<'_>,
    alive: usize,
    as_what: impl FnOnce(Sample) -> Sample,
) -> Result<Vec<Uuid>, LabError> {
    let plan = bench.plan();
    let mut round = bench.fork(&plan)?;
    let alive = u32::try_from(alive).map_or(f64::INFINITY, f64::from);
    bench.record_with(&mut round, |sample| as_what(sample.with("alive_children", alive)));
    bench.progress.advance(1);
    Ok(round.children)
}

/// Memory of one child: as the whole machine sees it, and what of it is private user memory.
pub(super) fn weigh(
    bench: &mut Bench<'_>,
    alive: &[Uuid],
    before: Option<u64>,
) -> Result<(), Trouble> {
    let Ok(count @ 1..) = u32::try_from(alive.len()) else { return Ok(()) };
    // Nothing is known if more is free than before: somebody else gave it back.
    let lost = before.zip(process::available_bytes()).and_then(|(was, is)| was.checked_sub(is));
    bench.run.memory_per_child_bytes = lost.map(|lost| lost / u64::from(count));
    let mut private = Vec::new();
    for uuid in alive.iter().step_by(alive.len().div_ceil(WEIGHED)) {
        // The child's zygote is part of it.
        let processes = process::tree(bench.rig.pid(*uuid)?);
        let bytes = processes.into_iter().map(process::private_dirty_bytes);
        private.push(bytes.sum::<Option<u64>>());
    }
    let Some(private) = private.into_iter().collect::<Option<Vec<u64>>>() else { return Ok(()) };
    #[expect(clippy::cast_precision_loss, reason = "bytes of a few processes are below 2^52")]
    let mean = private.iter().sum::<u64>() as f64 / private.len().max(1) as f64;
    bench.run.values.insert("private_user_bytes".to_owned(), mean);
    Ok(())
}
