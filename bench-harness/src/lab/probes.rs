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
use crate::session::{LabError, ScenarioRun};
use crate::stats::bootstrap::median_interval;
use crate::stats::rng::Rng;
use crate::stats::signed_rank::median;

/// Forks of one level in a row, and those before them that do not count.
const BLOCK: u32 = 5;
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
const OF_A_CHILD: [(&str, Role, &[Metric]); 4] = [
    ("child_process_faults", Role::Child, &Metric::PROCESS_FAULTS),
    ("child_guest_faults", Role::Child, &[Metric::KvmFault]),
    ("young_process_faults", Role::Young, &Metric::PROCESS_FAULTS),
    ("young_guest_faults", Role::Young, &[Metric::KvmFault]),
];

/// What one block measured, in µs: the median of its `branch_us`, a page fault, an exit.
#[derive(Clone, Copy)]
struct Block {
    branch: f64,
    fault: f64,
    exit: f64,
}

/// `forks` of each level, in blocks of each level whose order is drawn anew every time: whatever a
/// block leaves to the next one comes from every level alike.
pub(super) fn probes(bench: &mut Bench<'_>) -> Result<(), LabError> {
    let scenario = bench.scenario;
    let own = std::process::id();
    with(bench, |probes| probes.track(own, 0))?;
    bench.warm_up()?;
    let blocks = scenario.forks.div_ceil(BLOCK);
    bench.progress.phase("forks", u64::from(blocks * BLOCK) * LEVELS.len() as u64);
    // All of its bits fit into a value of the report.
    let seed = runtime::sys::realtime_ns() & u64::from(u32::MAX);
    #[expect(clippy::cast_precision_loss, reason = "32 bits")]
    bench.run.values.insert("probes_order_seed".to_owned(), seed as f64);
    let mut rng = Rng::new(seed);
    let mut rounds = Vec::new();
    for _ in 0..blocks {
        let mut round = [Block { branch: f64::NAN, fault: f64::NAN, exit: f64::NAN }; LEVELS.len()];
        for at in order(&mut rng) {
            round[at] = one_block(bench, LEVELS[at])?;
        }
        rounds.push(round);
    }
    bench.progress.phase("where", WHERE.into());
    places(bench)?;
    for (level, (_, name)) in LEVELS.iter().enumerate().skip(1) {
        costs(&mut bench.run, &rounds, level, name, &mut rng);
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

/// The levels in an order that is as likely as any other.
fn order(rng: &mut Rng) -> [usize; LEVELS.len()] {
    let mut order = std::array::from_fn(|at| at);
    for last in (1..order.len()).rev() {
        let places = last as u64 + 1;
        // Of four places none is favoured by more than 2^-61.
        order.swap(last, usize::try_from(rng.bits() % places).unwrap_or(last));
    }
    order
}

/// What a level costs more than none: medians over what blocks that were neighbours differ by.
fn costs(
    run: &mut ScenarioRun,
    rounds: &[[Block; LEVELS.len()]],
    level: usize,
    name: &str,
    rng: &mut Rng,
) {
    let over = |cost: fn(&Block, &Block) -> f64| -> Vec<f64> {
        rounds.iter().map(|round| cost(&round[level], &round[0])).collect()
    };
    let mut put = |name: String, value: Option<f64>| run.values.extend(value.map(|it| (name, it)));
    let mut ratios = over(|with, without| with.branch / without.branch - 1.0);
    let interval = median_interval(&ratios, rng);
    put(format!("probes_{name}_cost_low"), interval.map(|[low, _]| low));
    put(format!("probes_{name}_cost_high"), interval.map(|[_, high]| high));
    put(format!("probes_{name}_cost_ratio"), median(&mut ratios));
    let mut fault = over(|with, without| with.fault - without.fault);
    put(format!("probes_{name}_fault_cost_us"), median(&mut fault));
    let mut exit = over(|with, without| with.exit - without.exit);
    put(format!("probes_{name}_exit_cost_us"), median(&mut exit));
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

fn one_block(bench: &mut Bench<'_>, (level, name): (Level, &str)) -> Result<Block, LabError> {
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
    Ok(Block { branch: median(&mut branch).unwrap_or(f64::NAN), fault, exit })
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_order_is_as_likely_as_the_others() {
        let mut rng = Rng::new(3);
        let mut seen = BTreeMap::<_, u32>::new();
        for _ in 0..2400 {
            *seen.entry(order(&mut rng)).or_default() += 1;
        }
        assert_eq!(seen.len(), 24);
        assert!(seen.values().all(|count| (60..150).contains(count)), "{seen:?}");
        assert_eq!(order(&mut Rng::new(5)), order(&mut Rng::new(5)));
    }

    #[test]
    fn costs_are_differences_between_neighbours() {
        // The machine becomes slower from round to round; a level costs a tenth of a fork.
        let round = |slow: u32| {
            let us = f64::from(100 + slow);
            let block = |factor: f64| Block { branch: us * factor, fault: us * factor, exit: us };
            [block(1.0), block(1.1), block(1.2), block(1.3)]
        };
        let rounds: Vec<_> = (0..20).map(round).collect();
        let mut run = ScenarioRun::default();
        costs(&mut run, &rounds, 1, "on", &mut Rng::new(1));
        let value = |name: &str| run.values.get(name).copied().unwrap_or(f64::NAN);
        for name in ["probes_on_cost_ratio", "probes_on_cost_low", "probes_on_cost_high"] {
            assert!((value(name) - 0.1).abs() < 1e-9, "{name}: {}", value(name));
        }
        assert!((value("probes_on_fault_cost_us") - 10.95).abs() < 1e-9);
        assert!(value("probes_on_exit_cost_us").abs() < 1e-9);
    }
}
