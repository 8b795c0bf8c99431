//! Forks and kills leave nothing behind, and do not become slower.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::host;
use tests::memory::Memory;
use tests::program::{Forked, dirty, fork};
use tests::rig::{PATIENCE, Rig};
use uuid::Uuid;

/// Forks after which everything that stays is there.
const WARM: usize = 20;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("leaks::forks_and_kills_leave_nothing", many_forks).alone(),
        Case::new("leaks::many_live_children_leave_nothing", many_children).alone(),
        Case::new("leaks::children_that_exit_leave_nothing", exits),
        Case::new("leaks::a_dead_generation_leaves_nothing", generations),
        Case::new("leaks::a_line_of_64_leaves_nothing", line),
    ]
}

/// 200 forks, or 10,000 in a soak. The last fifth is interleaved with forks of a young machine, so that
/// what else the host does meanwhile makes both slow.
fn many_forks() -> Result<()> {
    let forks = if host::soak() { 10_000 } else { 200 };
    let limit = Duration::from_secs(if host::soak() { 1800 } else { 120 });
    let config = InstanceConfig { memory_mib: 32, ..<_>::default() };
    let rig = Rig::with_limit(config.clone(), limit)?;
    let mut memory = rig.memory();
    let mut young: Option<(Rig, Memory)> = None;
    let (mut old_ns, mut young_ns) = (Vec::new(), Vec::new());
    let mut warm = None;
    for number in 1..=forks {
        let generation = number as u64;
        old_ns.push(fork_once(&rig, &mut memory, generation)?);
        if number == WARM {
            warm = Some(rig.census()?);
        }
        if number == forks - forks / 5 {
            let rig = Rig::with_limit(config.clone(), limit)?;
            let mut memory = rig.memory();
            for generation in 1..=WARM as u64 {
                fork_once(&rig, &mut memory, generation)?;
            }
            young = Some((rig, memory));
        } else if let Some((rig, memory)) = &mut young {
            young_ns.push(fork_once(rig, memory, generation)?);
        }
    }
    rig.compare(rig.root, &memory, "the root")?;
    drop(young);
    if let Some(warm) = warm {
        rig.settles_at(warm, "after all forks")?;
    }
    let last = &old_ns[old_ns.len() - young_ns.len()..];
    if host::soak() {
        let (old, young) = (percentile(last, 50), percentile(&young_ns, 50));
        ensure!(old * 10 < young * 11, "p50 is {old} ns after {forks} forks, {young} ns at first");
    } else {
        // Forty of each are too few for more than the coarsest.
        let (old, young) = (percentile(last, 10), percentile(&young_ns, 10));
        ensure!(old < 2 * young, "the quickest tenth takes {old} ns at last, {young} ns at first");
    }
    Ok(())
}

/// Forks with 20 dirty pages, and kills the child; `branch` in nanoseconds.
fn fork_once(rig: &Rig, memory: &mut Memory, generation: u64) -> Result<u64> {
    let seq = rig.begin(rig.root, 0, &[dirty(20, generation, generation), fork(1, 10)])?;
    memory.dirty(20, generation, generation);
    let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
    ensure!(forked.status == 0, "fork {generation}: {forked:?}");
    rig.results(forked.child, 0, seq)?;
    let report = rig.owner.next_fork(rig.root, PATIENCE)?;
    if generation.is_multiple_of(50) {
        rig.compare(forked.child, memory, "a child")?;
    }
    rig.kill(forked.child)?;
    rig.standbys(1)?;
    report.branch_ns().with_context(|| format!("fork {generation} was not timed"))
}

fn percentile(times: &[u64], percent: usize) -> u64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() * percent / 100).copied().unwrap_or(0)
}

/// 50 children at once, or 1,000 in a soak; then none.
fn many_children() -> Result<()> {
    let (memory_mib, rounds) = if host::soak() { (512, 20) } else { (32, 1) };
    let rig = Rig::with_limit(
        InstanceConfig { memory_mib, ..<_>::default() },
        Duration::from_secs(if host::soak() { 600 } else { 120 }),
    )?;
    let memory = rig.memory();
    rig.branch(rig.root, 2)?;
    rig.kill_children()?;
    rig.standbys(1)?;
    let before = rig.census()?;
    for _ in 0..rounds {
        let made = rig.branch(rig.root, 50)?;
        ensure!(made.len() == 50);
        rig.compare(made[49], &memory, "the last child")?;
    }
    let alive = rig.owner.alive().len();
    ensure!(alive == 50 * rounds + 1, "{alive} machines are alive");
    let full = rig.census()?;
    ensure!(full.processes >= 2 * alive, "{full:?}");
    // All at once, as a crash of the owner would.
    for uuid in rig.owner.alive().into_iter().filter(|uuid| *uuid != rig.root) {
        rig.owner.kill(uuid)?;
    }
    rig.kill_children()?;
    rig.standbys(1)?;
    rig.settles_at(before, "after all children")?;
    rig.compare(rig.root, &memory, "the root")
}

fn exits() -> Result<()> {
    use tests::program::{Side, exit};
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    let mut warm = None;
    for number in 0..30 {
        let seq = rig.begin(rig.root, 0, &[fork(1, 10), exit(7).in_child()])?;
        let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
        ensure!(forked.status == 0, "{forked:?}");
        rig.owner.wait_for(forked.child, PATIENCE)?;
        let end = rig.owner.wait_exit(forked.child, PATIENCE)?;
        ensure!(end == (7, None), "{end:?}");
        rig.owner.forget(forked.child);
        rig.standbys(1)?;
        if number == 10 {
            warm = Some(rig.census()?);
        }
    }
    warm.map_or(Ok(()), |warm| rig.settles_at(warm, "after exits"))
}

/// A child and its children; all are killed from the oldest to the youngest.
fn generations() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    rig.branch(rig.root, 1)?;
    rig.kill_children()?;
    rig.standbys(1)?;
    let before = rig.census()?;
    for _ in 0..5 {
        let mut line = rig.branch(rig.root, 1)?;
        for depth in 0..4 {
            line.extend(rig.branch(line[depth], 1)?);
        }
        for uuid in line {
            rig.kill(uuid)?;
        }
        rig.standbys(1)?;
        rig.settles_at(before, "after a dead line")?;
    }
    Ok(())
}

/// Each machine forks the next one; the youngest forks last of all. 64 of them, or 1,000 in a soak.
fn line() -> Result<()> {
    let most = if host::soak() { 1000 } else { 64 };
    let limit = Duration::from_secs(if host::soak() { 1800 } else { 120 });
    let rig = Rig::with_limit(InstanceConfig { memory_mib: 16, ..<_>::default() }, limit)?;
    rig.branch(rig.root, 1)?;
    rig.kill_children()?;
    rig.standbys(1)?;
    let before = rig.census()?;
    let mut memory = rig.memory();
    let mut line = vec![rig.root];
    for depth in 1..=most {
        let youngest = *line.last().context("no machine")?;
        rig.run(youngest, &[dirty(10, depth, depth)])?;
        memory.dirty(10, depth, depth);
        line.extend(rig.branch(youngest, 1)?);
    }
    rig.compare(*line.last().context("no machine")?, &memory, "the youngest")?;
    // What a generation adds to the stack stays in all that follow.
    let stack = |uuid: Uuid| stack_kib(rig.pid(uuid)?);
    let (first, last) = (stack(line[1])?, stack(*line.last().context("no machine")?)?);
    ensure!(last <= first, "the stack has {first} KiB in the first child, {last} in the last");
    for uuid in line.into_iter().filter(|uuid| *uuid != rig.root) {
        rig.kill(uuid)?;
    }
    rig.standbys(1)?;
    rig.settles_at(before, "after the line")
}

/// Size of the stack of a process's first thread.
fn stack_kib(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmStk:")).context("no VmStk")?;
    line.split_whitespace().next().context("no size")?.parse().context("not a number")
}
