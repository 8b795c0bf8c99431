//! Several vCPUs fork together.

use std::time::Duration;

use anyhow::{Result, ensure};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::program::{Forked, count, fork, pause, peek, poke};
use tests::rig::Rig;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("state::all_vcpus_go_on_in_parent_and_child", running),
        Case::new("state::all_vcpus_go_on_when_the_host_forks", host),
        Case::new("state::a_vcpu_blocked_in_pause_goes_on_in_both", paused),
        Case::new("state::a_vcpu_parked_at_the_fork_takes_programs_in_both", parked),
        Case::new("state::the_second_vcpu_forks", second),
        Case::new("forks::a_pause_ends_with_the_last_vcpu", late),
    ]
}

fn rig(vcpus: u32) -> Result<Rig> {
    Rig::new(InstanceConfig { memory_mib: 32, vcpus, ..<_>::default() })
}

/// vCPUs 1 and 2 count while vCPU 0 forks; both sides look twice at how far they are.
fn running() -> Result<()> {
    let rig = rig(3)?;
    let (a, b) = (rig.address(10, 3), rig.address(20, 3));
    rig.run(rig.root, &[poke(a, 0), poke(b, 0)])?;
    rig.standbys(2)?;
    let counters = [
        rig.begin(rig.root, 1, &[count(rig.ticks(2000), a, 0)])?,
        rig.begin(rig.root, 2, &[count(rig.ticks(2000), b, 0)])?,
    ];
    let program = [
        pause(20_000),
        peek(a, 0),
        peek(b, 1),
        fork(2, 10),
        peek(a, 2),
        peek(b, 3),
        // Six vCPUs count on what may be two processors.
        pause(400_000),
        peek(a, 4),
        peek(b, 5),
    ];
    let seq = rig.begin(rig.root, 0, &program)?;
    let root = rig.results(rig.root, 0, seq)?;
    let forked = Forked::read(&root, 10)?;
    ensure!(forked.status == 0, "{forked:?}");
    let machines = rig.owner.wait_until("three machines", tests::rig::PATIENCE, |alive| {
        (alive.len() == 3).then(|| alive.to_vec())
    })?;
    for uuid in machines {
        let words = if uuid == rig.root { root.clone() } else { rig.results(uuid, 0, seq)? };
        let what = if uuid == rig.root { "parent" } else { "child" };
        for (vcpu, counter) in [(1, counters[0]), (2, counters[1])] {
            let at = vcpu as usize - 1;
            let (before, just_after, later) = (words[at], words[2 + at], words[4 + at]);
            let last = rig.results(uuid, vcpu, counter)?[0];
            ensure!(before > 0, "{what}: vCPU {vcpu} had not begun");
            ensure!(just_after >= before, "{what}: vCPU {vcpu} fell back: {:?}", &words[..6]);
            ensure!(later > just_after, "{what}: vCPU {vcpu} stands still: {:?}", &words[..6]);
            ensure!(last >= later, "{what}: vCPU {vcpu} ended at {last}, before {later}");
        }
    }
    Ok(())
}

/// The same without a vCPU that asks for it.
fn host() -> Result<()> {
    let rig = rig(2)?;
    let places = [rig.address(10, 3), rig.address(20, 3)];
    rig.run(rig.root, &[poke(places[0], 0), poke(places[1], 0)])?;
    let mut counters = Vec::new();
    for (vcpu, place) in (0..).zip(places) {
        counters.push(rig.begin(rig.root, vcpu, &[count(rig.ticks(500), place, 0)])?);
    }
    std::thread::sleep(Duration::from_millis(30));
    let children = rig.branch(rig.root, 2)?;
    for uuid in children.into_iter().chain([rig.root]) {
        for (vcpu, counter) in (0..).zip(&counters) {
            let last = rig.results(uuid, vcpu, *counter)?[0];
            let word = rig.run(uuid, &[peek(places[vcpu as usize], 0)])?[0];
            ensure!(last > 1000, "vCPU {vcpu} counted to {last}");
            ensure!(last == word, "vCPU {vcpu} counted to {last} in memory that says {word}");
        }
    }
    Ok(())
}

fn paused() -> Result<()> {
    let rig = rig(2)?;
    let flag = rig.address(3, 3);
    rig.run(rig.root, &[poke(flag, 1)])?;
    let sleeper = rig.begin(rig.root, 1, &[pause(400_000), poke(flag, 2), peek(flag, 0)])?;
    let seq = rig.begin(rig.root, 0, &[pause(20_000), fork(1, 10), peek(flag, 0)])?;
    let root = rig.results(rig.root, 0, seq)?;
    let forked = Forked::read(&root, 10)?;
    ensure!(forked.status == 0, "{forked:?}");
    ensure!(root[0] == 1, "the parent's second vCPU did not sleep on");
    for uuid in [rig.root, forked.child] {
        ensure!(rig.results(uuid, 1, sleeper)?[0] == 2, "the sleeper did not go on");
    }
    rig.results(forked.child, 0, seq)?;
    Ok(())
}

fn parked() -> Result<()> {
    let rig = rig(3)?;
    let results = rig.run(rig.root, &[fork(1, 10)])?;
    let forked = Forked::read(&results, 10)?;
    for uuid in [forked.child, rig.root] {
        for vcpu in [2, 1, 0] {
            let place = rig.address(u64::from(vcpu) + 1, 9);
            for value in [5, 6] {
                let words = rig.run_on(uuid, vcpu, &[poke(place, value), peek(place, 0)])?;
                ensure!(words[0] == value, "vCPU {vcpu}");
            }
        }
    }
    Ok(())
}

/// The answer belongs to the vCPU that rang; the first one, parked or running, goes on as well.
fn second() -> Result<()> {
    let rig = rig(2)?;
    rig.standbys(2)?;
    let place = rig.address(10, 3);
    for busy in [false, true] {
        let counter = busy.then(|| rig.begin(rig.root, 0, &[count(rig.ticks(400), place, 0)]));
        let counter = counter.transpose()?;
        let seq = rig.begin(rig.root, 1, &[pause(10_000), fork(2, 10), peek(place, 0)])?;
        let root = Forked::read(&rig.results(rig.root, 1, seq)?, 10)?;
        ensure!(root.status == 0 && root.role == 0 && root.registers, "{root:?}");
        let mut roles = Vec::new();
        let children = rig.owner.wait_until("two children", tests::rig::PATIENCE, |alive| {
            (alive.len() == 3).then(|| alive.to_vec())
        })?;
        for child in children.into_iter().filter(|uuid| *uuid != rig.root) {
            let words = rig.results(child, 1, seq)?;
            let forked = Forked::read(&words, 10)?;
            ensure!(forked.registers && forked.own == child, "{forked:?}");
            roles.push(forked.role);
            if let Some(counter) = counter {
                let last = rig.results(child, 0, counter)?[0];
                ensure!(last > words[0], "the first vCPU stands still in a child");
            }
        }
        roles.sort_unstable();
        ensure!(roles == [1, 2], "roles {roles:?}");
        if let Some(counter) = counter {
            rig.results(rig.root, 0, counter)?;
        }
        rig.kill_children()?;
    }
    Ok(())
}

/// Four vCPUs that share a processor cannot all be back in the guest when the children are: the last
/// one has to wait for its turns.
fn late() -> Result<()> {
    const FORKS: u64 = 8;
    // Less than a turn of the scheduler, more than a fork takes.
    const TURN_NS: u64 = 500_000;
    let all = runtime::sys::affinity();
    let vcpu_cpus = all & all.wrapping_neg();
    let rig = Rig::new(InstanceConfig { memory_mib: 32, vcpus: 4, vcpu_cpus, ..<_>::default() })?;
    for vcpu in 1..4 {
        let place = rig.address(10 * u64::from(vcpu), 3);
        rig.begin(rig.root, vcpu, &[count(rig.ticks(3000), place, 0)])?;
    }
    let mut late = 0;
    for _ in 0..FORKS {
        let forked = Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?;
        ensure!(forked.status == 0, "{forked:?}");
        let report = rig.owner.next_fork(rig.root, tests::rig::PATIENCE)?;
        let (released, resumed) = (report.parent.released, report.parent.resumed);
        ensure!(resumed >= released, "{:?}", report.parent);
        late += u64::from(resumed - released > TURN_NS);
        rig.kill(forked.child)?;
    }
    ensure!(late > FORKS / 2, "the last vCPU was back at once in all but {late} of {FORKS} forks");
    Ok(())
}
