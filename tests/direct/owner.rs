//! Owners, and roots that cannot start.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use runtime::owner::{Owner, OwnerError};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::census;
use tests::elf::{Elf, TempFile};
use tests::program::{Forked, check, dirty, fork};
use tests::rig::Rig;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("owner::a_tree_is_gone_with_its_owner", gone),
        Case::new("owner::children_survive_their_parent", orphans),
        Case::new("owner::children_of_a_busy_parent_survive_it", busy_orphans),
        Case::new("owner::configurations_out_of_range_are_refused", configurations),
        Case::new("owner::a_file_that_is_no_guest_is_refused", files),
        Case::new("owner::a_guest_that_crashes_says_so", crash),
    ]
}

fn gone() -> Result<()> {
    let owner = Owner::new()?;
    let root = owner.start(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    let leader = owner.with(root, |known| known.pid)?;
    for child in owner.branch(root, 3)? {
        owner.wait_for(child, tests::rig::PATIENCE)?;
        owner.branch(child, 2)?;
    }
    let alive = census::group(leader);
    // Ten machines, a zygote each, and the root's standby.
    ensure!(alive.len() >= 20, "{alive:?}");
    // Without waiting for anything; only a busy machine takes more than some milliseconds.
    let limit = Duration::from_secs(10);
    let begin = Instant::now();
    drop(owner);
    let gone =
        census::eventually(limit, || census::group(leader).iter().all(|process| process.zombie));
    ensure!(gone, "left: {:?}", census::group(leader));
    ensure!(begin.elapsed() < limit, "it took {:?}", begin.elapsed());
    Ok(())
}

/// The parent's death is nothing to its children: they run, fork, and hold their memory.
fn orphans() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 32, ..<_>::default() })?;
    let mut memory = rig.memory();
    rig.run(rig.root, &[dirty(100, 1, 1)])?;
    memory.dirty(100, 1, 1);
    let children = rig.branch(rig.root, 2)?;
    rig.kill(rig.root)?;
    for (generation, child) in (10..).zip(children) {
        rig.compare(child, &memory, "an orphan")?;
        let seq =
            rig.begin(child, 0, &[dirty(50, generation, generation), fork(1, 10), check(0)])?;
        let mut theirs = memory.clone();
        theirs.dirty(50, generation, generation);
        let forked = Forked::read(&rig.results(child, 0, seq)?, 10)?;
        ensure!(forked.status == 0, "an orphan's fork: {forked:?}");
        ensure!(rig.results(forked.child, 0, seq)?[0] == theirs.sum(), "its memory");
        rig.kill(child)?;
        rig.compare(forked.child, &theirs, "an orphan's orphan")?;
    }
    Ok(())
}

/// The parent is killed right when the fork has been answered.
fn busy_orphans() -> Result<()> {
    for _ in 0..5 {
        let rig = Rig::new(InstanceConfig { memory_mib: 16, standbys: 3, ..<_>::default() })?;
        let children = rig.branch(rig.root, 3)?;
        rig.owner.kill(rig.root)?;
        for child in children {
            rig.owner.wait_for(child, tests::rig::PATIENCE)?;
            rig.compare(child, &rig.memory(), "a child whose parent was killed at once")?;
        }
    }
    Ok(())
}

/// Why a root did not start; nothing may be left of it.
fn refusal(config: InstanceConfig) -> Result<String> {
    let owner = Owner::new()?;
    match owner.start(config) {
        Ok(_) => anyhow::bail!("it started"),
        Err(OwnerError::Ended { why: Some(why), code, .. }) => {
            ensure!(code != 0, "exit code 0");
            ensure!(!why.contains('\n') && !why.is_empty(), "not one line: {why}");
            Ok(why)
        }
        Err(error) => anyhow::bail!("no clear line: {error}"),
    }
}

fn configurations() -> Result<()> {
    let good = || InstanceConfig { memory_mib: 16, ..<_>::default() };
    for (word, config) in [
        ("memory_mib", InstanceConfig { memory_mib: 0, ..good() }),
        ("memory_mib", InstanceConfig { memory_mib: 7, ..good() }),
        ("memory_mib", InstanceConfig { memory_mib: u32::MAX, ..good() }),
        ("vcpus", InstanceConfig { vcpus: 0, ..good() }),
        ("vcpus", InstanceConfig { vcpus: 17, ..good() }),
        ("ring_entries", InstanceConfig { ring_entries: 0, ..good() }),
        ("ring_entries", InstanceConfig { ring_entries: 1500, ..good() }),
        ("child_ring_entries", InstanceConfig { child_ring_entries: 1 << 20, ..good() }),
        ("standbys", InstanceConfig { standbys: 129, ..good() }),
        ("child_standbys", InstanceConfig { child_standbys: u32::MAX, ..good() }),
    ] {
        let why = refusal(config).context(word)?;
        ensure!(why.contains(word), "{word}: {why}");
    }
    // The control: without the mistake it starts.
    Owner::new()?.start(good())?;
    Ok(())
}

fn files() -> Result<()> {
    let code = [0xeb_u8, 0xfe];
    let good = Elf::running(&code);
    let start = |bare| InstanceConfig { memory_mib: 16, bare, ..<_>::default() };
    for (word, bytes) in [
        (
            "ELF",
            b"#!/bin/sh\necho this is a script, and longer than the header of an ELF\n".to_vec(),
        ),
        ("shorter", b"\x7fELF".to_vec()),
        ("static", Elf { kind: 3, ..good.clone() }.bytes()),
        ("dynamic", Elf { segment: 2, ..good.clone() }.bytes()),
        ("dynamic", Elf { segment: 3, ..good.clone() }.bytes()),
        ("guest RAM", Elf { address: 0x10_0000, ..good.clone() }.bytes()),
        ("guest RAM", Elf { address: 64 << 20, ..good.clone() }.bytes()),
        ("guest RAM", Elf { memory: 64 << 20, ..good.clone() }.bytes()),
        ("entry point", Elf { segment: 4, ..good.clone() }.bytes()),
        ("beyond", good.bytes()[..0x70].to_vec()),
    ] {
        let file = TempFile::new(&bytes)?;
        let why = refusal(start(file.path())).context(word)?;
        ensure!(why.to_lowercase().contains(&word.to_lowercase()), "{word}: {why}");
    }
    let why = refusal(start("/nonexistent/guest.elf".into()))?;
    ensure!(why.contains("/nonexistent/guest.elf"), "{why}");
    let file = good.file()?;
    Owner::new()?.start(start(file.path()))?;
    Ok(())
}

/// An exception without a handler ends the instance, and the owner hears why.
fn crash() -> Result<()> {
    // ud2
    let file = Elf::running(&[0x0f, 0x0b]).file()?;
    let owner = Owner::new()?;
    let started =
        owner.start(InstanceConfig { memory_mib: 16, bare: file.path(), ..<_>::default() });
    let (code, why) = match started {
        Ok(root) => owner.wait_exit(root, tests::rig::PATIENCE)?,
        Err(OwnerError::Ended { code, why, .. }) => (code, why),
        Err(error) => return Err(error.into()),
    };
    ensure!(code == 125, "exit code {code}, {why:?}");
    ensure!(why.is_some_and(|why| !why.is_empty()), "it does not say why");
    Ok(())
}
