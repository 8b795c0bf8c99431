//! A fork that fails leaves its parent unharmed, and says which step failed and why.

use anyhow::{Context, Result, ensure};
use runtime::fork::{FAULT_DELAY, FAULT_KILL, FAULT_SHORT_MSRS, Step};
use runtime::owner::OwnerError;
use runtime::proto::{InstanceConfig, Request};
use rustix::process::{Pid, Signal};
use tests::case::Case;
use tests::program::{Forked, dirty, dirty_row, fork};
use tests::rig::Rig;

const EIO: u32 = 5;
const ECHILD: u32 = 10;
const ENOMEM: u32 = 12;
const ETIMEDOUT: u32 = 110;

/// Steps that run in a standby, where they can be made to die.
const IN_STANDBY: [Step; 5] =
    [Step::Prewarm, Step::ApplyPages, Step::RestoreState, Step::Identity, Step::Commit];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for step in Step::ALL {
        let name = step.name();
        let errnos = match step {
            Step::RestoreState => &[EIO, ENOMEM, FAULT_KILL, FAULT_SHORT_MSRS][..],
            Step::CaptureState => &[EIO, ENOMEM, FAULT_SHORT_MSRS],
            _ if IN_STANDBY.contains(&step) => &[EIO, ENOMEM, FAULT_KILL],
            _ => &[EIO, ENOMEM],
        };
        cases.push(Case::new(format!("faults::step_{name}_fails"), move || {
            step_fails(step, errnos)
        }));
    }
    // Steps of the parent, at which a standby dies.
    for step in [
        Step::Take,
        Step::Wake,
        Step::Quiesce,
        Step::Settle,
        Step::CapturePages,
        Step::CaptureState,
    ] {
        let name = format!("faults::a_standby_is_killed_at_{}", step.name());
        cases.push(Case::new(name, move || standby_killed_at(step)));
    }
    cases.push(Case::new("faults::the_guest_tries_again_at_once", again_at_once));
    cases.push(Case::new("faults::the_zygote_is_killed", zygote_killed));
    cases.push(Case::new("faults::a_parked_standby_is_killed", standby_killed));
    cases.push(Case::new("faults::a_stopped_standby_costs_one_fork", standby_stopped));
    cases.push(Case::new(
        "faults::a_stopped_standby_does_not_fill_the_journal",
        standby_stopped_behind,
    ));
    cases.push(Case::new("faults::a_fault_taken_back_does_nothing", taken_back));
    cases
}

/// For each errno: from inside and from the host, with one child and with three.
fn step_fails(step: Step, errnos: &[u32]) -> Result<()> {
    let config = InstanceConfig { memory_mib: 16, ..<_>::default() };
    if step == Step::Arm {
        // Only a machine that is not armed yet can fail to be.
        for errno in errnos {
            for from_guest in [true, false] {
                let rig = Rig::unarmed(config.clone())?;
                let what = format!("{errno}, from the guest: {from_guest}");
                fails(&rig, step, *errno, 1, from_guest).context(what)?;
                works(&rig, 2)?;
            }
        }
        return Ok(());
    }
    let rig = Rig::new(config)?;
    works(&rig, 3)?;
    ready(&rig, step, 1)?;
    // Not the first census: the first fork is the last to map something for good.
    let before = rig.census()?;
    for errno in errnos {
        for (children, from_guest) in [(1, true), (1, false), (3, true), (3, false)] {
            let errno_name = match *errno {
                FAULT_KILL => "kill".into(),
                FAULT_SHORT_MSRS => "short count of MSRs".into(),
                errno => errno.to_string(),
            };
            let what = format!("{errno_name}, {children} children, from the guest: {from_guest}");
            ready(&rig, step, children)?;
            fails(&rig, step, *errno, children, from_guest).context(what.clone())?;
            works(&rig, children).context(what.clone())?;
            ready(&rig, step, 1)?;
            rig.settles_at(before, &what)?;
        }
    }
    Ok(())
}

/// The guest rings again as soon as it has read of the failure: children of the fork that failed
/// take no part in the next.
fn again_at_once() -> Result<()> {
    for step in [Step::CaptureState, Step::RestoreState, Step::Commit] {
        let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
        for round in 0..8 {
            rig.standbys(6)?;
            rig.fault(Some(step), EIO)?;
            let before = rig.owner.alive().len();
            let results = rig.run(rig.root, &[fork(3, 10), fork(1, 10)])?;
            let forked = Forked::read(&results, 10)?;
            ensure!(forked.status == 0 && forked.children == 1, "round {round}: {forked:?}");
            // Whoever should not live would have called by then.
            std::thread::sleep(std::time::Duration::from_millis(100));
            let made = rig.owner.alive().len() - before;
            ensure!(made == 1, "{}, round {round}: {made} children live", step.name());
        }
    }
    Ok(())
}

/// With standbys ready for the fork, or, to fail at making one, without any.
fn ready(rig: &Rig, step: Step, children: u32) -> Result<()> {
    let count = if step == Step::Prewarm { 0 } else { children };
    rig.standbys(count)?;
    let settled = tests::census::eventually(tests::rig::PATIENCE, || {
        rig.owner.stats(rig.root).is_ok_and(|stats| stats.standbys == count)
    });
    ensure!(settled, "there are not {count} standbys");
    Ok(())
}

fn fails(rig: &Rig, step: Step, errno: u32, children: u32, from_guest: bool) -> Result<()> {
    let mut memory = rig.memory();
    rig.run(rig.root, &[tests::program::fill(tests::rig::SEED), dirty(50, 7, 7)])?;
    memory.dirty(50, 7, 7);
    let failed_before = rig.owner.stats(rig.root)?.failed;
    rig.fault(Some(step), errno)?;
    let (named, told) = if from_guest {
        let results = rig.run(rig.root, &[fork(children.into(), 10)])?;
        let forked = Forked::read(&results, 10)?;
        ensure!(forked.status != 0, "the fork succeeded: {forked:?}");
        ensure!(forked.registers && forked.role == 0 && forked.children == 0, "{forked:?}");
        (forked.step().context("no step is named")?, forked.status)
    } else {
        let error = match rig.owner.branch(rig.root, children) {
            Ok(made) => anyhow::bail!("the fork succeeded: {made:?}"),
            Err(error) => error,
        };
        let (named, told) = error.fork_failure().with_context(|| format!("no step: {error}"))?;
        ensure!(error.to_string().contains(named.name()), "the step is not in words: {error}");
        (named, told.cast_unsigned())
    };
    let expected = match errno {
        FAULT_KILL => ECHILD,
        FAULT_SHORT_MSRS => EIO,
        errno => errno,
    };
    ensure!(named == step, "step {} is named instead of {}", named.name(), step.name());
    ensure!(told == expected, "errno {told} is told instead of {expected}");
    rig.fault(None, 0)?;
    rig.compare(rig.root, &memory, "the parent of a fork that failed")?;
    let alone = tests::census::eventually(tests::rig::PATIENCE, || rig.owner.alive().len() == 1);
    ensure!(alone, "a child of a fork that failed is alive");
    // A fork that did not come as far as taking standbys is none of the counter's.
    if named > Step::Take {
        let counted = tests::census::eventually(tests::rig::PATIENCE, || {
            rig.owner.stats(rig.root).is_ok_and(|stats| stats.failed == failed_before + 1)
        });
        ensure!(counted, "the failure was not counted");
    }
    Ok(())
}

/// A fork that succeeds, and children with the right memory, which are killed.
fn works(rig: &Rig, children: u32) -> Result<()> {
    let mut memory = rig.memory();
    rig.run(rig.root, &[tests::program::fill(tests::rig::SEED), dirty(50, 8, 8)])?;
    memory.dirty(50, 8, 8);
    let made = rig.branch(rig.root, children).context("the next fork")?;
    ensure!(made.len() == children as usize);
    for child in made {
        rig.compare(child, &memory, "a child of the next fork")?;
    }
    rig.kill_children()
}

/// Its standbys go with it. A fork right then may fail, in words; the next one works, and so does
/// every one behind it.
fn zygote_killed() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    let mut after_one = None;
    for death in 0..3 {
        let dead = rig.zygote()?;
        rig.owner.ask(rig.root, Request::KillZygote)?;
        for round in 0..2 {
            behind_its_death(&rig, round).with_context(|| format!("death {death}"))?;
        }
        // Its standbys are made by the new one, which is one of ours.
        rig.standbys(2)?;
        let zygote = rig.zygote()?;
        let ours = rig.processes().iter().any(|it| it.pid == zygote && !it.zombie);
        ensure!(zygote != dead && ours, "{zygote} after {dead}: {:?}", rig.processes());
        match after_one {
            None => after_one = Some(rig.census()?),
            Some(before) => rig.settles_at(before, "behind another death")?,
        }
    }
    Ok(())
}

fn behind_its_death(rig: &Rig, round: u32) -> Result<()> {
    match rig.owner.branch(rig.root, 1) {
        Ok(made) => {
            for child in made {
                rig.compare(child, &rig.memory(), "a child behind the zygote's death")?;
                rig.kill(child)?;
            }
        }
        Err(error @ OwnerError::Refused(_)) => {
            ensure!(error.fork_failure().is_some(), "no step is named: {error}");
            ensure!(round == 0, "fork {round} behind the zygote's death: {error}");
        }
        Err(error) => anyhow::bail!("no clear result: {error}"),
    }
    let forked = Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?;
    ensure!(forked.status == 0, "fork {round} from the guest: {forked:?}");
    // Nobody could kill it before.
    rig.owner.wait_for(forked.child, tests::rig::PATIENCE)?;
    rig.kill_children()?;
    rig.compare(rig.root, &rig.memory(), "the parent behind its zygote's death")
}

/// The step is made to take its time, and the standby that was taken is killed meanwhile.
fn standby_killed_at(step: Step) -> Result<()> {
    const DELAY_US: u32 = 150_000;
    let rig = Rig::new(InstanceConfig { memory_mib: 16, vcpus: 2, ..<_>::default() })?;
    works(&rig, 1)?;
    rig.standbys(1)?;
    let before = rig.census()?;
    let mut failed = 0;
    for round in 0..4 {
        let standby = parked(&rig)?;
        let slow = Request::Fault { step: Some(step), errno: FAULT_DELAY, delay_us: DELAY_US };
        rig.owner.ask(rig.root, slow)?;
        let seq = rig.begin(rig.root, 0, &[fork(1, 10)])?;
        std::thread::sleep(std::time::Duration::from_micros(u64::from(DELAY_US) / 3));
        rustix::process::kill_process(standby, Signal::KILL)?;
        let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
        rig.fault(None, 0)?;
        if forked.status == 0 {
            // It was not taken, or not yet: another one was.
            rig.kill_children()?;
        } else {
            let named = forked.step().with_context(|| format!("no step: {forked:?}"))?;
            ensure!(forked.status == ECHILD, "round {round}, {}: {forked:?}", named.name());
            failed += 1;
        }
        works(&rig, 1).with_context(|| format!("round {round}"))?;
        rig.standbys(1)?;
        rig.settles_at(before, "after killing a standby that was taken")?;
    }
    // Before it is taken its death is no failure.
    ensure!(step == Step::Take || failed > 0, "no fork met the death of its standby");
    Ok(())
}

fn standby_killed() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, standbys: 2, ..<_>::default() })?;
    works(&rig, 2)?;
    rig.standbys(2)?;
    let before = rig.census()?;
    for round in 0..4 {
        let zygote = rig.zygote()?;
        let standbys = rig.processes();
        let standbys = standbys.iter().filter(|it| it.parent == zygote && !it.zombie);
        let pids: Vec<_> = standbys.filter_map(|it| Pid::from_raw(it.pid)).collect();
        ensure!(pids.len() == 2, "{} standbys", pids.len());
        // One of two, then both.
        for pid in &pids[round % 2..] {
            rustix::process::kill_process(*pid, Signal::KILL)?;
        }
        if round < 2 {
            // A signal takes its time: a standby that has not ended yet may be taken. The first
            // thread's being a zombie is not it: the line hangs up when the last one is gone.
            let gone = tests::census::eventually(tests::rig::PATIENCE, || {
                let alive: Vec<_> = rig.processes().into_iter().map(|it| it.pid).collect();
                pids[round % 2..].iter().all(|pid| !alive.contains(&pid.as_raw_nonzero().get()))
            });
            ensure!(gone, "a killed standby lives");
            works(&rig, 2)?;
        } else {
            let forked = Forked::read(&rig.run(rig.root, &[fork(2, 10)])?, 10)?;
            // It may have been taken before its end was noticed; the next one is not.
            ensure!(forked.status == 0 || forked.step().is_some(), "{forked:?}");
            rig.kill_children()?;
            works(&rig, 2)?;
        }
        rig.standbys(2)?;
        rig.settles_at(before, "after killing standbys")?;
    }
    Ok(())
}

/// It neither answers nor ends: the fork that took it fails when its time is over, and it is killed, for
/// the next fork cannot be made while it may still look at that one.
fn standby_stopped() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    works(&rig, 1)?;
    rig.standbys(1)?;
    let before = rig.census()?;
    rustix::process::kill_process(parked(&rig)?, Signal::STOP)?;
    let forked = Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?;
    let named = forked.step().with_context(|| format!("no step: {forked:?}"))?;
    ensure!(forked.status == ETIMEDOUT && forked.registers, "{}: {forked:?}", named.name());
    // Nobody lets it go on.
    works(&rig, 1)?;
    rig.standbys(1)?;
    rig.settles_at(before, "after a standby was stopped")
}

/// More is dirty than the journal holds, and one of its readers does not read on: it is given up.
fn standby_stopped_behind() -> Result<()> {
    const PAGES: u64 = 10_000;
    let rig = Rig::new(InstanceConfig { memory_mib: 64, ring_entries: 1024, ..<_>::default() })?;
    works(&rig, 1)?;
    rig.standbys(1)?;
    rustix::process::kill_process(parked(&rig)?, Signal::STOP)?;
    let seq = rig.begin(rig.root, 0, &[dirty_row(PAGES, 9, 0), fork(1, 10)])?;
    let forked = Forked::read(&rig.results(rig.root, 0, seq)?, 10)?;
    let named = forked.step().with_context(|| format!("no step: {forked:?}"))?;
    ensure!(forked.status == ETIMEDOUT && forked.registers, "{}: {forked:?}", named.name());
    let mut memory = rig.memory();
    rig.run(rig.root, &[tests::program::fill(tests::rig::SEED), dirty_row(PAGES, 8, 0)])?;
    memory.dirty_row(PAGES, 8, 0);
    for child in rig.branch(rig.root, 1)? {
        rig.compare(child, &memory, "a child of the next fork")?;
    }
    Ok(())
}

/// The first of its standbys.
fn parked(rig: &Rig) -> Result<Pid> {
    let zygote = rig.zygote()?;
    let standby = rig.processes().into_iter().find(|it| it.parent == zygote && !it.zombie);
    standby.and_then(|it| Pid::from_raw(it.pid)).context("no standby")
}

/// Negative control for all of the above.
fn taken_back() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    for step in Step::ALL {
        rig.fault(Some(step), EIO)?;
        rig.fault(None, 0)?;
        works(&rig, 1)?;
    }
    Ok(())
}
