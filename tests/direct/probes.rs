//! What the probes count, against a second source.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ebpf_loader::{Level, Lost, Metric, Probes, Role};
use runtime::proto::{InstanceConfig, Request};
use tests::case::Case;
use tests::probes::{count, counted};
use tests::program::{dirty, fork};
use tests::rig::{PATIENCE, Rig};
use tests::{census, host};

/// Makes this program load probes and say so, and wait.
pub const LOAD_AND_WAIT: &str = "UKP_TEST_LOAD_PROBES";

pub fn cases() -> Vec<Case> {
    let missing = host::without_probes();
    let cases = vec![
        Case::new(
            "probes::faults_of_a_process_are_those_of_getrusage",
            tests::probes::agree_with_getrusage,
        ),
        Case::new("probes::a_child_s_faults_are_those_that_the_engine_saw", of_a_child),
        Case::new("probes::faults_and_exits_are_those_of_kvm_s_own_statistics", of_kvm),
        Case::new("probes::a_child_of_a_quiet_parent_takes_no_page_fault", unfaulting).alone(),
        Case::new("probes::a_young_child_that_works_like_its_parent_takes_ten_faults", young)
            .alone(),
        Case::new("probes::every_program_loads_by_itself_or_says_why_not", each),
        Case::new("probes::what_is_missing_is_said_in_one_line", lacking),
        Case::new("probes::without_any_machines_fork_in_namespaces", elsewhere),
        Case::new("probes::nothing_is_kept_of_children_that_have_ended", ended),
        Case::new("probes::children_of_a_raised_zygote_are_known", raised),
        Case::new("probes::calls_are_those_that_the_kernel_sees", calls).alone(),
        Case::new("probes::events_that_found_no_room_are_counted", overrun),
        Case::new("probes::nothing_is_left_of_a_loader_that_was_killed", killed).alone(),
    ];
    cases.into_iter().map(|case| case.needs(missing.clone())).collect()
}

pub fn rig(config: InstanceConfig) -> Result<Rig> {
    Rig::probed(config, Level::Trace)
}

pub fn small() -> InstanceConfig {
    InstanceConfig { memory_mib: 32, ..<_>::default() }
}

pub fn lost(rig: &Rig) -> Result<Lost> {
    Ok(rig.owner.probes(Probes::lost).context("no probes")??)
}

/// Between its wake-up and its first exit.
fn of_a_child() -> Result<()> {
    let rig = rig(small())?;
    let (mut same, mut faults) = (0, 0);
    for round in 0..10_u64 {
        let seq = rig.begin(rig.root, 0, &[dirty(40, round, round), fork(1, 10)])?;
        rig.results(rig.root, 0, seq)?;
        let report = rig.owner.next_fork(rig.root, PATIENCE)?;
        let child = &report.children[0];
        rig.owner.wait_for(child.uuid, PATIENCE)?;
        let all = counted(&rig, child.uuid)?;
        let process = count(&all, &[Role::Child], &Metric::PROCESS_FAULTS);
        let guest = count(&all, &[Role::Child], &[Metric::KvmFault]);
        let engine = u64::from(child.faults);
        // The engine looks before the standby sleeps: another thread may fault meanwhile.
        ensure!(process <= engine, "{process} of the process and {guest} of the guest, {engine}");
        same += u64::from(process == engine);
        faults += process;
        ensure!(count(&all, &[Role::Standby], &Metric::PROCESS_FAULTS) > 0, "{all:?}");
        rig.kill(child.uuid)?;
        rig.standbys(1)?;
    }
    ensure!(faults > 0, "there was no fault to compare");
    ensure!(same >= 3, "the same number in {same} of 10 forks only");
    Ok(())
}

/// Here the kernel does not allow fexit; everything else it must have.
fn each() -> Result<()> {
    let all = Probes::survey()?;
    ensure!(all.len() >= 30, "{} programs only", all.len());
    for one in all {
        let may_be_refused = one.how == "fexit";
        match &one.refused {
            None => {}
            Some(reason) if may_be_refused => {
                ensure!(reason.len() > 10, "{} was refused without a reason", one.program);
            }
            Some(reason) => bail!("{} ({}): {reason}", one.program, one.how),
        }
    }
    Ok(())
}

/// What `part` of this program says, and its errors, where `command` runs it.
fn said_by(command: &[&str], part: &str) -> Result<(String, String)> {
    let output = Command::new(command[0])
        .args(&command[1..])
        .arg(std::env::current_exe()?)
        .env(LOAD_AND_WAIT, part)
        .output()
        .with_context(|| format!("running {}", command[0]))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((text(&output.stdout), text(&output.stderr)))
}

/// In a namespace, without capabilities: a line that says what to do, and the program goes on.
fn lacking() -> Result<()> {
    for (command, expected) in [
        (&["unshare", "--user", "--map-root-user"][..], "this is a user namespace"),
        (&["unshare", "--pid", "--fork", "--kill-child"], "a PID namespace of its own"),
        (&["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"], "setcap cap_bpf,cap_perfmon"),
    ] {
        let (text, _) = said_by(command, "say")?;
        ensure!(text.contains(expected) && text.lines().count() == 1, "{command:?}: {text:?}");
    }
    Ok(())
}

/// A zygote that was raised has executed this program anew: its address space is another.
fn raised() -> Result<()> {
    let rig = rig(small())?;
    rig.kill(rig.branch(rig.root, 1)?[0])?;
    rig.standbys(1)?;
    let before = rig.zygote()?;
    rig.owner.ask(rig.root, Request::KillZygote)?;
    let new = census::eventually(Duration::from_secs(10), || {
        rig.zygote().is_ok_and(|zygote| zygote != before)
    });
    ensure!(new, "no zygote was raised");
    let zygote = u32::try_from(rig.zygote()?)?;
    let known = census::eventually(Duration::from_secs(5), || {
        rig.owner.probes(|probes| probes.knows(zygote)) == Some(true)
    });
    ensure!(known, "the zygote that was raised is not measured");
    // The first child may be of a standby that was made before that was known.
    rig.standbys(1)?;
    rig.kill(rig.branch(rig.root, 1)?[0])?;
    rig.standbys(1)?;
    let child = rig.branch(rig.root, 1)?[0];
    let all = counted(&rig, child)?;
    ensure!(count(&all, &[Role::Standby], &Metric::PROCESS_FAULTS) > 0, "{:?}", all.keys());
    Ok(())
}

/// Between its wake-up and the first exit of its guest: everything was there before. One in four may
/// have met something rare, such as memory that the kernel was about to move.
fn unfaulting() -> Result<()> {
    // With more vCPUs than processors more is done, and kept, before.
    [1, 4]
        .into_iter()
        .try_for_each(|vcpus| unfaulting_with(vcpus).with_context(|| format!("{vcpus} vCPUs")))
}

fn unfaulting_with(vcpus: u32) -> Result<()> {
    const FORKS: usize = 20;
    let rig = Rig::probed(InstanceConfig { vcpus, ..small() }, Level::On)?;
    let mut faults = Vec::new();
    for _ in 0..FORKS {
        let seq = rig.begin(rig.root, 0, &[fork(1, 10)])?;
        rig.results(rig.root, 0, seq)?;
        let child = rig.owner.next_fork(rig.root, PATIENCE)?.children[0].uuid;
        rig.owner.wait_for(child, PATIENCE)?;
        faults.push(count(&counted(&rig, child)?, &[Role::Child], &Metric::PROCESS_FAULTS));
        rig.kill(child)?;
        rig.standbys(1)?;
    }
    let without = faults.iter().filter(|faults| **faults == 0).count();
    ensure!(without >= FORKS * 3 / 4, "page faults of children: {faults:?}");
    Ok(())
}

/// In the first millisecond after its first exit, in which it writes the pages that its parent writes
/// before every fork. One in four may meet something rare.
fn young() -> Result<()> {
    const FORKS: u64 = 20;
    const PAGES: u64 = 50;
    const MOST: u64 = 10;
    let rig = Rig::probed(small(), Level::On)?;
    let mut faults = Vec::new();
    for generation in 1..=FORKS {
        let work = dirty(PAGES, generation, 1);
        let seq = rig.begin(rig.root, 0, &[work, fork(1, 10), work])?;
        rig.results(rig.root, 0, seq)?;
        let child = rig.owner.next_fork(rig.root, PATIENCE)?.children[0].uuid;
        rig.results(child, 0, seq)?;
        std::thread::sleep(Duration::from_millis(2));
        faults.push(count(&counted(&rig, child)?, &[Role::Young], &Metric::PROCESS_FAULTS));
        rig.kill(child)?;
        rig.standbys(1)?;
    }
    println!("page faults of young children: {faults:?}");
    let few = faults.iter().filter(|faults| **faults <= MOST).count();
    ensure!(few >= faults.len() * 3 / 4, "page faults of young children: {faults:?}");
    ensure!(faults.iter().any(|faults| *faults > 0), "none is counted: {faults:?}");
    Ok(())
}

/// Where probes cannot be had, in one way or the other, machines fork as ever.
fn elsewhere() -> Result<()> {
    for command in [
        &["unshare", "--user", "--map-root-user"][..],
        &["unshare", "--pid", "--fork", "--kill-child"],
        &["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
        &["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"],
        &["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"],
    ] {
        let (text, error) = said_by(command, "fork")?;
        ensure!(text.trim() == "forked", "{command:?}: {text:?}, {error:?}");
    }
    Ok(())
}

/// The part of [`elsewhere`]: a fork and one of its child, with their memory.
fn fork_here() -> Result<()> {
    ensure!(Probes::load(Level::On).is_err(), "there are probes here");
    let rig = Rig::new(small())?;
    let memory = rig.memory();
    let child = rig.branch(rig.root, 1)?[0];
    let grandchild = rig.branch(child, 1)?[0];
    rig.compare(grandchild, &memory, "a grandchild")?;
    rig.compare(rig.root, &memory, "the root")
}

fn of_kvm() -> Result<()> {
    let rig = rig(InstanceConfig { memory_mib: 64, ..<_>::default() })?;
    tests::probes::agree_with_kvm(&rig)
}

fn calls() -> Result<()> {
    tests::probes::agree_with_own_calls(&rig(InstanceConfig { sync: false, ..small() })?)
}

/// Neither they nor what their threads began; what was counted of them is added up.
fn ended() -> Result<()> {
    let rig = rig(small())?;
    let held = |rig: &Rig| -> Result<[usize; 2]> {
        let held = |probes: &mut Probes| probes.read().and_then(|_| probes.held());
        Ok(rig.owner.probes(held).context("no probes")??)
    };
    let before = held(&rig)?;
    let children = rig.branch(rig.root, 20)?;
    let during = held(&rig)?;
    ensure!(during[0] >= before[0] + 20 && during[1] > before[1], "{before:?}, then {during:?}");
    for child in children {
        rig.kill(child)?;
    }
    rig.standbys(1)?;
    let settled = census::eventually(Duration::from_secs(5), || {
        held(&rig).is_ok_and(|now| now[0] <= before[0] && now[1] <= before[1])
    });
    ensure!(settled, "{before:?} at first, {during:?}, {:?} at last", held(&rig)?);
    let live = rig.owner.probes(Probes::read).context("no probes")??;
    ensure!(live.len() <= before[0], "of {} processes something is kept", live.len());
    let ended = rig.owner.probes(|probes| probes.ended().clone()).context("no probes")?;
    ensure!(count(&ended, &[Role::Standby], &Metric::PROCESS_FAULTS) > 20, "{ended:?}");
    Ok(())
}

/// Nobody fetches the events of a child that faults more often than there is room for.
fn overrun() -> Result<()> {
    let rig = rig(InstanceConfig { memory_mib: 160, ..small() })?;
    rig.owner.probes(|probes| probes.trace(true)).context("no probes")??;
    let child = rig.branch(rig.root, 1)?[0];
    rig.run(child, &[dirty(30_000, 9, 9)])?;
    let fetched = rig.owner.probes(Probes::events).context("no probes")?.len();
    let lost = lost(&rig)?;
    ensure!(fetched > 10_000 && lost.events > 5_000, "{fetched} events, {lost:?}");
    ensure!(lost == Lost { events: lost.events, ..Lost::default() }, "{lost:?}");
    Ok(())
}

/// The part of [`killed`] that is killed, and those of [`lacking`] and [`elsewhere`].
pub fn load_and_wait_if_asked() {
    if let Ok(what) = std::env::var(LOAD_AND_WAIT) {
        if what == "fork" {
            println!(
                "{}",
                fork_here().map_or_else(|error| format!("{error:#}"), |()| "forked".into())
            );
            std::process::exit(0);
        }
        if what == "say" {
            let probes = Probes::load(Level::On);
            println!(
                "{}",
                probes.map_or_else(|error| runtime::sys::chain(&error), |_| "ok".into())
            );
            std::process::exit(0);
        }
        let probes = Probes::load(Level::Trace);
        println!("{}", probes.as_ref().map_or(0, |probes| probes.attached().len()));
        std::thread::sleep(Duration::from_mins(1));
        std::process::exit(0);
    }
}

/// Programs of ours in the kernel.
fn programs() -> usize {
    let names = ["fault_user", "process_fork", "sched_switch", "sys_enter"];
    let all = aya::programs::loaded_programs().flatten();
    all.filter(|program| program.name_as_str().is_some_and(|name| names.contains(&name))).count()
}

fn killed() -> Result<()> {
    // Those of the tests before are freed some time after their descriptors.
    let mut before = programs();
    let settled = census::eventually(Duration::from_secs(5), || {
        std::thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut before, programs()) == before
    });
    ensure!(settled, "programs come and go");
    let mut loader = Command::new(std::env::current_exe()?)
        .env(LOAD_AND_WAIT, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(loader.stdout.take().context("no pipe")?).read_line(&mut line)?;
    let loaded = programs();
    loader.kill()?;
    loader.wait()?;
    ensure!(line.trim().parse::<usize>()? >= 6, "{line} parts were attached");
    ensure!(loaded >= before + 4, "{loaded} programs, {before} before");
    let gone = census::eventually(Duration::from_secs(5), || programs() == before);
    ensure!(gone, "{} programs are left, {before} were there before", programs());
    Ok(())
}
