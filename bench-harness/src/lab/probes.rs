//! Kind `probes`: the same forks with and without probes in the kernel, and what the probes say of
//! the children.

use std::hint::black_box;
use std::time::Instant;

use ebpf_loader::{Counted, EventKind, Level, Metric, ProbeError, Probes, Role};
use guest_abi::entry::PAGE;
use guest_abi::param::{op, who};
use runtime::kvm::calls;
use runtime::memory::RamLayout;

use super::bench::{Bench, Round};
use super::error::Trouble;
use super::program::{Plan, Work, step};
use crate::record::Summary;
use crate::session::LabError;

/// Forks of one level in a row, and those before them that do not count.
const BLOCK: u32 = 10;
const UNCOUNTED: u32 = 2;
/// Passes of the work that parent and child do after each fork.
const PASSES: u64 = 4;
/// Pages that this process touches to time a page fault.
const TOUCHED: usize = 2000;
/// Memory of this size the allocator always gets from the kernel, untouched.
const FRESH: usize = 48 << 20;
/// Exits in a row to time one.
const EXITS: u64 = 1000;

/// Calls to time what counting one costs.
const CALLS: u32 = 1_000_000;

/// Forks whose faults are looked at one by one.
const WHERE: u32 = 30;

const LEVELS: [(Level, &str); 4] =
    [(Level::Off, "off"), (Level::On, "on"), (Level::All, "all"), (Level::Trace, "trace")];

/// What is told of each child: metric, role, what is added up.
const OF_A_CHILD: [(&str, Role, &[Metric]); 5] = [
    ("child_process_faults", Role::Child, &Metric::PROCESS_FAULTS),
    ("child_guest_faults", Role::Child, &[Metric::KvmFault]),
    ("young_process_faults", Role::Young, &Metric::PROCESS_FAULTS),
    ("young_guest_faults", Role::Young, &[Metric::KvmFault]),
    ("young_exits", Role::Young, &[Metric::Exits]),
];

/// `forks` of each level, in blocks that take turns.
pub(super) fn probes(bench: &mut Bench<'_>) -> Result<(), LabError> {
    let scenario = bench.scenario;
    let own = std::process::id();
    with(bench, |probes| probes.track(own, 0))?;
    bench.warm_up()?;
    let blocks = scenario.forks.div_ceil(BLOCK);
    bench.progress.phase("forks", u64::from(blocks * BLOCK) * LEVELS.len() as u64);
    let mut ratios = [const { Vec::new() }; LEVELS.len()];
    for block in 0..blocks as usize {
        let mut medians = [f64::NAN; LEVELS.len()];
        for turn in 0..LEVELS.len() {
            let at = (block + turn) % LEVELS.len();
            medians[at] = one_block(bench, LEVELS[at])?;
        }
        for (ratios, median) in ratios.iter_mut().zip(medians) {
            ratios.push(median / medians[0] - 1.0);
        }
    }
    bench.progress.phase("where", WHERE.into());
    places(bench)?;
    for (ratios, (_, name)) in ratios.iter().zip(LEVELS).skip(1) {
        if let Some(summary) = Summary::of(ratios) {
            bench.run.values.insert(format!("probes_{name}_cost_ratio"), summary.p50.0);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "some ns")]
    let cost = calls::cost_ns(CALLS) as f64;
    bench.run.values.insert("probes_call_cost_ns".to_owned(), cost);
    let lost = with(bench, Probes::lost)?;
    if lost.any() {
        bench.run.notes.push(format!("the probes lost something for want of room: {lost:?}"));
    }
    Ok(())
}

/// What `f` makes of the probes of this scenario.
fn with<R>(
    bench: &Bench<'_>,
    f: impl FnOnce(&mut Probes) -> Result<R, ProbeError>,
) -> Result<R, LabError> {
    match bench.rig.probes(f) {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(LabError::Failed(Box::new(error))),
        None => Err(LabError::Unavailable { reason: "there are no probes".to_owned() }),
    }
}

/// One block; the median of its `branch_us`.
fn one_block(bench: &mut Bench<'_>, (level, name): (Level, &str)) -> Result<f64, LabError> {
    with(bench, |probes| probes.set_level(level))?;
    let mut branch = Vec::new();
    for index in 0..UNCOUNTED + BLOCK {
        let plan = with_work(bench);
        let mut round = bench.fork(&plan)?;
        if index >= UNCOUNTED {
            branch.push(round.sample.value("branch_us").unwrap_or(f64::INFINITY));
            // Reading is work, which the next fork feels: it is done with every level.
            let faults = of_a_child(bench, &round)?;
            if level == Level::All {
                for (name, count) in faults {
                    bench.run.recorder.record_apart(name, count);
                }
                bench.record(&mut round);
            }
            bench.progress.advance(1);
        }
        bench.next(&round)?;
    }
    for us in &branch {
        bench.run.recorder.record_apart(format!("probes_{name}_branch_us"), *us);
    }
    let (fault, exit) = (fault_us(), exit_us(bench)?);
    bench.run.recorder.record_apart(format!("probes_{name}_fault_us"), fault);
    bench.run.recorder.record_apart(format!("probes_{name}_exit_us"), exit);
    Ok(Summary::of(&branch).map_or(f64::NAN, |summary| summary.p50.0))
}

/// Where in guest memory the children's faults are, from their wake-up to the end of their first
/// millisecond.
fn places(bench: &mut Bench<'_>) -> Result<(), LabError> {
    with(bench, |probes| probes.set_level(Level::All))?;
    with(bench, |probes| probes.trace(true))?;
    for _ in 0..WHERE {
        let plan = with_work(bench);
        let round = bench.fork(&plan)?;
        let events = with(bench, |probes| Ok(probes.events()))?;
        let child = round.children.first().and_then(|child| bench.rig.pid(*child).ok());
        let of_child = events.iter().filter(|event| {
            let young = [Role::Child as u8, Role::Young as u8].contains(&event.role);
            young && child.is_some_and(|pid| pid.cast_unsigned() == event.pid)
        });
        for event in of_child {
            let metric = u8::try_from(event.detail >> 32).ok().and_then(Metric::from_number);
            let (name, address) = match EventKind::from_number(event.kind) {
                Some(EventKind::KvmFault) => ("guest_fault_page", event.what),
                Some(EventKind::Fault)
                    if metric.is_some_and(|metric| Metric::GUEST_FAULTS.contains(&metric)) =>
                {
                    ("process_fault_page", RamLayout::address(event.what))
                }
                _ => continue,
            };
            #[expect(clippy::cast_precision_loss, reason = "a page's number is below 2^52")]
            let page = (address >> 12) as f64;
            bench.run.recorder.record_apart(name, page);
        }
        bench.next(&round)?;
        bench.progress.advance(1);
    }
    with(bench, |probes| probes.trace(false))
}

/// A fork after which parent and child work.
fn with_work(bench: &mut Bench<'_>) -> Plan {
    let pages = (u64::from(bench.scenario.work_mib) << 20) / PAGE;
    let work = Work { who: who::ALL, pages, passes: PASSES };
    Plan { work: Some(work), ..bench.plan() }
}

/// What the probes counted of the child of a fork, whose first millisecond is over: it has answered.
fn of_a_child(bench: &Bench<'_>, round: &Round) -> Result<Vec<(&'static str, f64)>, LabError> {
    let Some(child) = round.children.first() else { return Ok(Vec::new()) };
    let pid = bench.rig.pid(*child)?.cast_unsigned();
    let counted: Counted = with(bench, Probes::read)?.remove(&pid).unwrap_or_default();
    let of = |(name, role, metrics): (_, Role, &[Metric])| {
        let histograms = metrics.iter().filter_map(|metric| counted.get(&(role, *metric)));
        let count: u64 = histograms.map(ebpf_loader::Histogram::count).sum();
        #[expect(clippy::cast_precision_loss, reason = "some thousand faults")]
        let count = count as f64;
        (name, count)
    };
    Ok(OF_A_CHILD.map(of).into())
}

/// Time of a page fault of this process, which the probes count too.
fn fault_us() -> f64 {
    let mut memory = vec![0_u8; FRESH];
    let clock = Instant::now();
    memory.iter_mut().step_by(4096).take(TOUCHED).for_each(|byte| *byte = 1);
    let us = clock.elapsed().as_secs_f64() * 1e6;
    black_box(&memory);
    #[expect(clippy::cast_precision_loss, reason = "two thousand")]
    let pages = TOUCHED as f64;
    us / pages
}

/// Time of an exit of the parent's guest that asks for nothing, and of its return.
fn exit_us(bench: &Bench<'_>) -> Result<f64, Trouble> {
    let guest = bench.guest;
    let all = |op, result, args| step(op, who::ALL, result, args);
    let steps = [
        all(op::CLOCK, 0, [0; 4]),
        all(op::PAUSE, 0, [0; 4]),
        all(op::LOOP, 0, [1, EXITS, 0, 0]),
        all(op::CLOCK, 4, [0; 4]),
    ];
    let words = bench.rig.run(guest.uuid, &steps)?;
    #[expect(clippy::cast_precision_loss, reason = "a thousand")]
    let exits = EXITS as f64;
    Ok(guest.us(words.at(4).saturating_sub(words.at(2))) / exits)
}
