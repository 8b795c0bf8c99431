//! Forks of every shape.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use guest_abi::entry::PARAM;
use runtime::owner::{Owner, OwnerError};
use runtime::proto::{InstanceConfig, WireStep};
use tests::case::Case;
use tests::elf::Elf;
use tests::program::{Forked, Side, again, check, count, dirty, exit, fork, peek, poke};
use tests::rig::{PATIENCE, Rig};
use uuid::Uuid;

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<_> = [1, 2, 10, 100]
        .map(|n| Case::new(format!("forks::fan_out_of_{n}"), move || fan_out(n)))
        .into();
    cases.extend([
        Case::new("forks::no_child_and_too_many_are_refused", refused),
        Case::new("forks::a_guest_need_not_read_the_answer", unread),
        Case::new("forks::a_guest_forks_in_a_loop", in_a_loop),
        Case::new("forks::children_fork_at_once_to_depth_16", nested),
        Case::new("forks::the_host_forks_a_guest_that_never_exits", spinning),
        Case::new("forks::the_host_forks_a_parked_guest", parked),
        Case::new("forks::the_host_forks_a_guest_that_has_just_been_started", newborn),
        Case::new("forks::each_machine_has_its_own_exit_code", exit_codes),
        Case::new("forks::an_announced_fork_works_like_any_other", announced),
    ]);
    cases
}

fn rig(memory_mib: u32) -> Result<Rig> {
    Rig::new(InstanceConfig { memory_mib, ..<_>::default() })
}

/// From inside and from the host, with dirty pages; each child writes something of its own.
fn fan_out(children: u32) -> Result<()> {
    let rig = rig(16)?;
    let mut memory = rig.memory();
    let seq = rig.begin(rig.root, 0, &[dirty(100, 1, 1), fork(children.into(), 10), check(0)])?;
    memory.dirty(100, 1, 1);
    let root = rig.results(rig.root, 0, seq)?;
    let forked = Forked::read(&root, 10)?;
    ensure!(forked.status == 0 && forked.children == children, "{forked:?}");
    ensure!(root[0] == memory.sum(), "the root's memory");
    let all = children as usize + 1;
    let mut machines = rig
        .owner
        .wait_until("children", PATIENCE, |alive| (alive.len() == all).then(|| alive.to_vec()))?;
    machines.retain(|uuid| *uuid != rig.root);
    let mut roles = Vec::new();
    for child in &machines {
        let words = rig.results(*child, 0, seq)?;
        ensure!(words[0] == memory.sum(), "a child's memory");
        roles.push(Forked::read(&words, 10)?.role);
    }
    roles.sort_unstable();
    ensure!(roles == (1..=children).collect::<Vec<_>>(), "roles {roles:?}");
    for (generation, child) in (1000..).zip(&machines) {
        rig.run(*child, &[dirty(5, generation, generation)])?;
    }
    for (generation, child) in (1000..).zip(&machines) {
        let mut theirs = memory.clone();
        theirs.dirty(5, generation, generation);
        rig.compare(*child, &theirs, "a child that wrote")?;
    }
    rig.compare(rig.root, &memory, "the root")?;
    rig.kill_children()?;
    let branched = rig.branch(rig.root, children)?;
    ensure!(branched.len() == children as usize, "{} children", branched.len());
    for child in [branched.first(), branched.last()].into_iter().flatten() {
        rig.compare(*child, &memory, "a child from the host")?;
    }
    Ok(())
}

/// Whose vCPUs may not have run yet: all that is known of them is how they begin.
fn newborn() -> Result<()> {
    for vcpus in [1, 2, 1, 2, 1] {
        let owner = Owner::new()?;
        let root = owner.start(InstanceConfig { memory_mib: 16, vcpus, ..<_>::default() })?;
        let made = owner.branch(root, 1)?;
        for machine in made.into_iter().chain([root]) {
            owner.wait_for(machine, PATIENCE)?;
            for vcpu in 0..vcpus {
                let run = |steps: &[WireStep]| -> Result<u64> {
                    let seq = owner.program(machine, vcpu, steps)?;
                    Ok(owner.results(machine, vcpu, seq, PATIENCE)?[0])
                };
                let word = run(&[peek(PARAM + 8, 0)])? + 8;
                ensure!(run(&[poke(word, 7), peek(word, 0)])? == 7, "vCPU {vcpu} of {vcpus}");
            }
        }
    }
    Ok(())
}

fn refused() -> Result<()> {
    const EINVAL: u32 = 22;
    let rig = rig(16)?;
    let before = rig.census()?;
    for children in [0, 129, u32::MAX] {
        let results = rig.run(rig.root, &[fork(children.into(), 10)])?;
        let forked = Forked::read(&results, 10)?;
        ensure!(forked.status == EINVAL && forked.role == 0, "{children}: {forked:?}");
        ensure!(forked.step().is_some() && forked.registers, "{children}: {forked:?}");
        ensure!(forked.child == Uuid::nil() && forked.children == 0, "{children}: {forked:?}");
        let refusal = rig.owner.branch(rig.root, children);
        let Err(OwnerError::Refused(failure)) = refusal else {
            anyhow::bail!("{children} from the host: {refusal:?}")
        };
        ensure!(failure.errno.cast_unsigned() == EINVAL, "{children}: {failure:?}");
    }
    rig.settles_at(before, "after refusals")?;
    rig.compare(rig.root, &rig.memory(), "the root")?;
    let child = rig.branch(rig.root, 1)?[0];
    rig.compare(child, &rig.memory(), "a child behind refusals")
}

/// Rings the doorbell three times and never asks: eight machines that all exit with 5.
fn unread() -> Result<()> {
    let guest = Elf::running(&[
        0xba, 0x18, 0x0d, 0x00, 0x00, // mov edx, READY
        0xef, // out dx, eax
        0xbb, 0x03, 0x00, 0x00, 0x00, // mov ebx, 3
        0xb8, 0x01, 0x00, 0x00, 0x00, // ring: mov eax, 1
        0xba, 0x00, 0x0d, 0x00, 0x00, // mov edx, FORK
        0xef, // out dx, eax
        0xff, 0xcb, // dec ebx
        0x75, 0xf1, // jnz ring
        0xb8, 0x05, 0x00, 0x00, 0x00, // mov eax, 5
        0xba, 0x08, 0x0d, 0x00, 0x00, // mov edx, EXIT
        0xef, // out dx, eax
        0xeb, 0xfe, // jmp $
    ])
    .file()?;
    let seen = std::sync::Arc::new(std::sync::Mutex::new(BTreeMap::new()));
    let events = seen.clone();
    let owner = runtime::owner::Owner::with_listener(Box::new(move |uuid, event| {
        if let (runtime::proto::Event::Exited { code, .. }, Ok(mut seen)) = (event, events.lock()) {
            seen.insert(uuid, *code);
        }
    }))?;
    owner.start(InstanceConfig { memory_mib: 16, bare: guest.path(), ..<_>::default() })?;
    let exits = || seen.lock().map(|seen| seen.clone()).unwrap_or_default();
    tests::census::eventually(PATIENCE, || exits().len() >= 8);
    std::thread::sleep(Duration::from_millis(100));
    let exits = exits();
    ensure!(exits.len() == 8, "{} machines instead of 8: {exits:?}", exits.len());
    ensure!(exits.values().all(|code| *code == 5), "{exits:?}");
    ensure!(owner.alive().is_empty(), "some did not end");
    Ok(())
}

/// The parent forks ten times in one program, without a pause.
fn in_a_loop() -> Result<()> {
    let rig = rig(16)?;
    let mut memory = rig.memory();
    let program = [dirty(20, 3, 5), fork(1, 10), again(0, 10).in_parent(), check(0)];
    memory.dirty(20, 3, 5);
    let seq = rig.begin(rig.root, 0, &program)?;
    let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
    ensure!(forked.status == 0 && forked.role == 0, "{forked:?}");
    let machines = rig.owner.wait_until("eleven machines", PATIENCE, |alive| {
        (alive.len() == 11).then(|| alive.to_vec())
    })?;
    for child in machines.into_iter().filter(|uuid| *uuid != rig.root) {
        ensure!(rig.results(child, 0, seq)?[0] == memory.sum(), "a child's memory");
    }
    Ok(())
}

/// Each child forks at once, although it has no standby yet, until there are 16 below the root.
fn nested() -> Result<()> {
    const DEPTH: usize = 16;
    let rig = rig(16)?;
    let program = [fork(1, 10), again(0, DEPTH as u64).in_child(), check(0)];
    let seq = rig.begin(rig.root, 0, &program)?;
    let mut line = vec![rig.root];
    for depth in 0..=DEPTH {
        let uuid = line[depth];
        let words = rig.results(uuid, 0, seq)?;
        let forked = Forked::read(&words, 10)?;
        ensure!(forked.status == 0 && forked.registers, "depth {depth}: {forked:?}");
        ensure!(forked.own == uuid, "depth {depth}: {forked:?}");
        ensure!(words[0] == rig.memory().sum(), "depth {depth}: its memory");
        if depth < DEPTH {
            ensure!(forked.role == 0, "depth {depth} did not fork: {forked:?}");
            line.push(forked.child);
        } else {
            ensure!(forked.role == 1, "depth {depth} is the last: {forked:?}");
        }
    }
    ensure!(rig.owner.alive().len() == DEPTH + 1);
    Ok(())
}

fn spinning() -> Result<()> {
    let rig = rig(16)?;
    let place = rig.address(10, 3);
    let ms = 5000;
    let counting = rig.begin(rig.root, 0, &[count(rig.ticks(ms), place, 0)])?;
    let mut children = Vec::new();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(50));
        children.extend(rig.branch(rig.root, 2)?);
    }
    ensure!(children.len() == 6);
    let early = rig.owner.results(rig.root, 0, counting, Duration::from_millis(1));
    ensure!(early.is_err(), "the guest was not spinning any more");
    for uuid in children.into_iter().chain([rig.root]) {
        let last = rig.results(uuid, 0, counting)?[0];
        let word = rig.run(uuid, &[peek(place, 0)])?[0];
        ensure!(last == word && last > 1000, "counted to {last}, memory says {word}");
    }
    Ok(())
}

fn parked() -> Result<()> {
    let rig = rig(16)?;
    let memory = rig.memory();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(20));
        for child in rig.branch(rig.root, 2)? {
            rig.compare(child, &memory, "a child")?;
            rig.begin(child, 0, &[exit(9)])?;
            let end = rig.owner.wait_exit(child, PATIENCE)?;
            ensure!(end == (9, None), "a child: {end:?}");
        }
    }
    rig.compare(rig.root, &memory, "the root")
}

fn exit_codes() -> Result<()> {
    let rig = rig(16)?;
    rig.begin(rig.root, 0, &[fork(2, 10), exit(3).in_parent(), exit(4).in_child()])?;
    let root = rig.owner.wait_exit(rig.root, PATIENCE)?;
    ensure!(root == (3, None), "the root: {root:?}");
    let all_gone = tests::census::eventually(PATIENCE, || rig.owner.alive().is_empty());
    ensure!(all_gone, "the children did not end");
    let report = rig.owner.with(rig.root, |known| known.forks.pop_front())?;
    // A root that ends at once may not have told its owner of the fork any more.
    for child in report.iter().flat_map(|report| &report.children) {
        rig.owner.wait_for(child.uuid, PATIENCE)?;
        let end = rig.owner.wait_exit(child.uuid, PATIENCE)?;
        ensure!(end == (4, None), "a child: {end:?}");
    }
    Ok(())
}

fn announced() -> Result<()> {
    let rig = rig(16)?;
    for _ in 0..5 {
        rig.standbys(1)?;
        let mut forking = fork(1, 10);
        forking.args[1] = 3000;
        forking.args[2] = rig.ticks(1);
        let seq = rig.begin(rig.root, 0, &[forking, check(0)])?;
        let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
        ensure!(forked.status == 0 && forked.registers, "{forked:?}");
        ensure!(rig.results(forked.child, 0, seq)?[0] == rig.memory().sum(), "its memory");
        rig.kill(forked.child)?;
    }
    Ok(())
}
