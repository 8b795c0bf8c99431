//! Who has nothing to do uses no processor, and nobody keeps one from the others.

use std::time::Duration;

use anyhow::{Result, ensure};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::census;
use tests::program::{Forked, count, dirty, fork, pause};
use tests::rig::{PATIENCE, Rig};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("idle::standbys_and_parked_machines_use_no_processor", parked),
        Case::new("idle::children_that_never_exit_are_ordinary_threads_soon", ordinary),
        Case::new("idle::what_is_written_after_a_fork_is_not_left_to_the_next", burst).alone(),
    ]
}

fn parked() -> Result<()> {
    let config = InstanceConfig { memory_mib: 32, vcpus: 2, standbys: 2, ..<_>::default() };
    let rig = Rig::new(config)?;
    rig.branch(rig.root, 2)?;
    rig.standbys(2)?;
    std::thread::sleep(Duration::from_millis(200));
    let ticks = || -> Vec<_> {
        let all = rig.processes().into_iter().filter(|process| !process.zombie);
        all.map(|process| (process.pid, census::cpu_ticks(process.pid))).collect()
    };
    let before = ticks();
    // Root, two children, two standbys, and a zygote each.
    ensure!(before.len() == 10, "{:?}", rig.processes());
    std::thread::sleep(Duration::from_secs(1));
    for ((pid, before), (_, after)) in before.into_iter().zip(ticks()) {
        // Of 100 in a second; sync rounds of the root may cost one.
        ensure!(after - before <= 3, "process {pid} used {} ticks", after - before);
    }
    Ok(())
}

/// A child runs ahead of everybody until it is there, and not until its guest happens to exit.
fn ordinary() -> Result<()> {
    for (vcpus, from_guest) in [(1, false), (2, false), (2, true)] {
        let rig = Rig::new(InstanceConfig { memory_mib: 16, vcpus, ..<_>::default() })?;
        for vcpu in u32::from(from_guest)..vcpus {
            let place = rig.address(10 + u64::from(vcpu), 3);
            rig.begin(rig.root, vcpu, &[count(rig.ticks(1500), place, 0)])?;
        }
        let children = if from_guest {
            vec![Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?.child]
        } else {
            rig.branch(rig.root, 1)?
        };
        for child in children {
            rig.owner.wait_for(child, PATIENCE)?;
            let pid = rig.pid(child)?;
            let realtime = || census::realtime_threads(pid);
            let soon = census::eventually(Duration::from_millis(700), || realtime() == 0);
            let what = format!("{vcpus} vCPUs, from the guest: {from_guest}");
            ensure!(soon, "{what}: {} threads have real-time priority", realtime());
        }
    }
    Ok(())
}

/// A guest that was idle for long, forks, writes, and forks again a moment later: sync rounds were
/// half a second apart by then, and the second fork copied all that had been written.
fn burst() -> Result<()> {
    const PAGES: u64 = 600;
    const TRIES: usize = 5;
    let rig = Rig::new(InstanceConfig { memory_mib: 32, standbys: 2, ..<_>::default() })?;
    let mut left = Vec::new();
    for number in 1..=TRIES as u64 {
        rig.standbys(2)?;
        std::thread::sleep(Duration::from_millis(1500));
        let burst = [fork(1, 10), dirty(PAGES, number, number), pause(60_000), fork(1, 40)];
        let seq = rig.begin(rig.root, 0, &burst)?;
        rig.results(rig.root, 0, seq)?;
        rig.owner.next_fork(rig.root, PATIENCE)?;
        left.push(rig.owner.next_fork(rig.root, PATIENCE)?.captured_pages);
        rig.kill_children()?;
    }
    left.sort_unstable();
    // In the middle: a round may come late on a busy machine, or by chance at the right time.
    ensure!(u64::from(left[TRIES / 2]) < PAGES / 4, "pages left to the second fork: {left:?}");
    Ok(())
}
