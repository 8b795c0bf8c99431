//! More dirty pages than rings and journal hold, and a parent that writes all the time.

use std::mem::offset_of;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_abi::param::{ParamPage, op};
use runtime::kvm::DirtyMode;
use runtime::proto::{InstanceConfig, Request};
use rustix::process::{Pid, Signal, kill_process};
use tests::case::Case;
use tests::census::eventually;
use tests::program::{Forked, check, dirty, dirty_row, fork, pause, peek, rate, step};
use tests::rig::{PATIENCE, Rig};
use uuid::Uuid;

pub fn cases() -> Vec<Case> {
    let of = |dirty, ring_entries, sync| InstanceConfig {
        memory_mib: 256,
        dirty,
        ring_entries,
        child_ring_entries: 1024,
        sync,
        ..<_>::default()
    };
    let writing = |dirty, ring_entries| InstanceConfig {
        memory_mib: 64,
        vcpus: 2,
        dirty,
        ring_entries,
        child_ring_entries: 1024,
        ..<_>::default()
    };
    vec![
        Case::new("isolation::forty_thousand_pages_between_forks_small_ring", move || {
            many(of(DirtyMode::Ring, 1024, true))
        }),
        Case::new("isolation::forty_thousand_pages_between_forks_large_ring", move || {
            many(of(DirtyMode::Ring, 16384, true))
        }),
        Case::new("isolation::forty_thousand_pages_between_forks_without_sync", move || {
            many(of(DirtyMode::Ring, 1024, false))
        }),
        Case::new("isolation::forty_thousand_pages_between_forks_bitmap", move || {
            many(of(DirtyMode::Bitmap, 1024, true))
        }),
        Case::new("isolation::more_pages_than_the_journal_holds_while_a_fork_waits", move || {
            slow_zygote(InstanceConfig {
                vcpus: 2,
                standbys: 0,
                ..of(DirtyMode::Bitmap, 1024, true)
            })
        }),
        Case::new("isolation::the_parent_writes_all_the_time_ring", move || {
            busy(writing(DirtyMode::Ring, 16384), 20_000)
        }),
        Case::new("isolation::the_parent_writes_all_the_time_small_ring", move || {
            busy(writing(DirtyMode::Ring, 1024), 20_000)
        }),
        Case::new("isolation::the_parent_writes_all_the_time_bitmap", move || {
            busy(writing(DirtyMode::Bitmap, 1024), 20_000)
        }),
        Case::new("isolation::the_parent_writes_as_fast_as_it_can_small_ring", move || {
            busy(writing(DirtyMode::Ring, 1024), 10_000_000)
        }),
        Case::new("isolation::a_child_writes_all_the_time", move || {
            busy_child(writing(DirtyMode::Ring, 1024), 20_000)
        }),
        Case::new("isolation::a_child_writes_as_fast_as_it_can", move || {
            busy_child(writing(DirtyMode::Ring, 1024), 10_000_000)
        }),
        Case::new("isolation::a_child_that_nobody_forks_is_not_followed", move || {
            unattended(InstanceConfig { memory_mib: 64, ..of(DirtyMode::Ring, 1024, true) })
        }),
        Case::new("forks::three_vcpus_write_as_fast_as_they_can_small_ring", || {
            crowd(DirtyMode::Ring)
        }),
        Case::new("forks::three_vcpus_write_as_fast_as_they_can_bitmap", || {
            crowd(DirtyMode::Bitmap)
        }),
    ]
}

/// Nearly every page of the image is dirty at the fork, twice, by the guest and by the host.
fn many(config: InstanceConfig) -> Result<()> {
    const PAGES: u64 = 40_000;
    let rig = Rig::new(config)?;
    let mut memory = rig.memory();
    for round in 1..=2_u64 {
        let first = round * 10_000;
        let program = [dirty_row(PAGES, round, first), fork(1, 10), check(0)];
        let seq = rig.begin(rig.root, 0, &program)?;
        memory.dirty_row(PAGES, round, first);
        let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
        ensure!(forked.status == 0, "round {round}: {forked:?}");
        let results = rig.results(forked.child, 0, seq)?;
        let what = format!("round {round}: the child");
        rig.compare(forked.child, &memory, &what)?;
        ensure!(results[0] == memory.sum(), "{what} read something else before");
        // In a child, too: its rings are smaller still, and it has no standby.
        rig.run(forked.child, &[dirty_row(PAGES, 100 + round, 0)])?;
        let mut theirs = memory.clone();
        theirs.dirty_row(PAGES, 100 + round, 0);
        for grandchild in rig.branch(forked.child, 1)? {
            rig.compare(grandchild, &theirs, "the grandchild")?;
        }
        rig.compare(forked.child, &theirs, "the child")?;
        rig.compare(rig.root, &memory, "the root")?;
        rig.kill_children()?;
    }
    Ok(())
}

/// While a fork waits for the zygote to take in what its own vCPU wrote, another vCPU writes as much
/// again: the fork waits for that too, and no page is left behind.
fn slow_zygote(config: InstanceConfig) -> Result<()> {
    const PAGES: u64 = 20_000;
    let rig = Rig::new(config)?;
    let mut memory = rig.memory();
    let zygote = Pid::from_raw(rig.zygote()?).context("the zygote")?;
    for round in 1..=2_u64 {
        kill_process(zygote, Signal::STOP)?;
        // Long enough for the fork to begin to wait, and for the others to be written.
        let late = [pause(300_000), dirty_row(PAGES, round, PAGES)];
        let late = rig.begin(rig.root, 1, &late)?;
        let seq = rig.begin(rig.root, 0, &[dirty_row(PAGES, round, 0), fork(1, 10)])?;
        std::thread::sleep(Duration::from_millis(900));
        kill_process(zygote, Signal::CONT)?;
        rig.results(rig.root, 1, late)?;
        memory.dirty_row(2 * PAGES, round, 0);
        let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
        ensure!(forked.status == 0, "round {round}: {forked:?}");
        rig.compare(forked.child, &memory, &format!("round {round}: the child"))?;
        rig.kill_children()?;
    }
    Ok(())
}

/// Pages that the second vCPU of a child has written when it is done. Read from its memory: on a busy
/// host the parent may have been done, and have said so, before it forked.
fn written(rig: &Rig, child: Uuid) -> Result<u64> {
    let results = guest_abi::entry::param_page(1) + offset_of!(ParamPage, results) as u64;
    let mut wrote = 0;
    let done = eventually(PATIENCE, || match rig.run(child, &[peek(results, 0)]) {
        Ok(word) => {
            wrote = word.first().copied().unwrap_or(0);
            wrote > 0
        }
        Err(_) => false,
    });
    ensure!(done, "the writer in a child does not come to its end");
    Ok(wrote)
}

/// The second vCPU writes while the first forks. Where the writer was at the fork, its results tell
/// in each machine: it goes on there from the same moment.
fn busy(config: InstanceConfig, per_second: u64) -> Result<()> {
    let rig = Rig::new(config)?;
    busy_machine(&rig, rig.root, per_second)
}

/// The same in a child, which has no standbys: between two forks what it writes is not followed.
fn busy_child(config: InstanceConfig, per_second: u64) -> Result<()> {
    let rig = Rig::new(config)?;
    let child = rig.branch(rig.root, 1)?[0];
    busy_machine(&rig, child, per_second)
}

fn busy_machine(rig: &Rig, machine: Uuid, per_second: u64) -> Result<()> {
    const FORKS: u64 = 12;
    let mut memory = rig.memory();
    for round in 1..=FORKS {
        let (generation, seed) = (round * 10, round);
        let writing = rate(rig.ticks(100), generation, seed, per_second, 0);
        let writer = rig.begin(machine, 1, &[writing])?;
        std::thread::sleep(Duration::from_millis(5));
        let children = if round % 2 == 0 {
            rig.branch(machine, 1)?
        } else {
            let results = rig.run(machine, &[fork(1, 10)])?;
            let forked = Forked::read(&results, 10)?;
            ensure!(forked.status == 0, "round {round}: {forked:?}");
            vec![forked.child]
        };
        for child in &children {
            let wrote = written(rig, *child)?;
            let mut theirs = memory.clone();
            theirs.dirty(wrote, generation, seed);
            rig.compare(*child, &theirs, "a child whose writer went on")?;
            rig.kill(*child)?;
        }
        let wrote = rig.results(machine, 1, writer)?[0];
        ensure!(wrote > 0, "the writer did not write");
        memory.dirty(wrote, generation, seed);
        rig.compare(machine, &memory, "the parent")?;
    }
    rig.owner.ask(machine, Request::Sync { on: false })?;
    rig.run(machine, &[dirty(100, 9999, 9)])?;
    memory.dirty(100, 9999, 9);
    for child in rig.branch(machine, 1)? {
        rig.compare(child, &memory, "a child of a machine that is not synced any more")?;
    }
    Ok(())
}

/// A child that writes the same pages again and again pays for them once, and not each time its ring
/// is full. What it wrote until it is forked after all is in its children nevertheless.
fn unattended(config: InstanceConfig) -> Result<()> {
    const PAGES: u64 = 8_000;
    const PASSES: u64 = 16;
    let rig = Rig::new(config)?;
    let mut memory = rig.memory();
    let child = rig.branch(rig.root, 1)?[0];
    for round in 1..=3_u64 {
        let first = round * 2_000;
        let passes = step(op::WORK, 0, [first, PAGES, PASSES, 0]);
        let ticks = rig.run(child, &[passes])?;
        (0..PASSES).for_each(|_| memory.work(first, PAGES));
        ensure!(ticks[1] < 4 * ticks[0], "ticks of one pass and of {PASSES}: {:?}", &ticks[..2]);
        for grandchild in rig.branch(child, 1)? {
            rig.compare(grandchild, &memory, &format!("round {round}: a grandchild"))?;
        }
        // Few pages, which are logged, and again without a standby.
        rig.run(child, &[dirty(100, round, round)])?;
        memory.dirty(100, round, round);
        for grandchild in rig.branch(child, 1)? {
            rig.compare(grandchild, &memory, &format!("round {round}: another grandchild"))?;
        }
        rig.compare(child, &memory, "the child")?;
    }
    rig.compare(rig.root, &rig.memory(), "the root")
}

/// What they write between the look at what is dirty and their stop finds room: a fork waits for it,
/// and does not fail.
fn crowd(dirty: DirtyMode) -> Result<()> {
    const FORKS: u32 = 24;
    let config = InstanceConfig {
        memory_mib: 64,
        vcpus: 4,
        dirty,
        ring_entries: 1024,
        child_ring_entries: 1024,
        ..<_>::default()
    };
    let rig = Rig::new(config)?;
    for number in 1..=FORKS {
        let mut writers = Vec::new();
        for vcpu in 1..4 {
            let writing = rate(rig.ticks(40), number.into(), vcpu.into(), 10_000_000, 0);
            writers.push((vcpu, rig.begin(rig.root, vcpu, &[writing])?));
        }
        let child = if number.is_multiple_of(2) {
            rig.branch(rig.root, 1).with_context(|| format!("fork {number}"))?[0]
        } else {
            let forked = Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?;
            ensure!(forked.status == 0, "fork {number}: {forked:?}");
            forked.child
        };
        rig.kill(child)?;
        for (vcpu, seq) in writers {
            rig.results(rig.root, vcpu, seq)?;
        }
    }
    Ok(())
}
