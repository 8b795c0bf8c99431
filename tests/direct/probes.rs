//! What the probes count, against a second source.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ebpf_loader::{Counted, EventKind, Level, Lost, Metric, Probes, Role};
use runtime::fork::{ForkReport, Moment};
use runtime::memory::BackingKind;
use runtime::proto::{InstanceConfig, Request};
use tests::case::Case;
use tests::probes::counted;
use tests::program::{Forked, dirty, exit, fork};
use tests::rig::{PATIENCE, Rig};
use tests::{census, host};

/// Makes this program load probes and say so, and wait.
pub const LOAD_AND_WAIT: &str = "UKP_TEST_LOAD_PROBES";

pub fn cases() -> Vec<Case> {
    let missing = host::without_probes();
    let mut cases = vec![
        Case::new("probes::faults_of_a_process_are_those_of_getrusage", getrusage),
        Case::new("probes::a_child_s_faults_are_those_that_the_engine_saw", of_a_child),
        Case::new("probes::faults_and_exits_are_those_of_kvm_s_own_statistics", of_kvm),
        Case::new("probes::a_child_of_a_quiet_parent_takes_no_page_fault", unfaulting).alone(),
        Case::new("probes::every_program_loads_by_itself_or_says_why_not", each),
        Case::new("probes::what_is_missing_is_said_in_one_line", lacking),
        Case::new("probes::nothing_is_kept_of_children_that_have_ended", ended),
        Case::new("probes::children_of_a_raised_zygote_are_known", raised),
        Case::new("probes::calls_are_those_that_the_kernel_sees", calls).alone(),
        Case::new("probes::stages_are_where_the_engine_stamps_them", stages).alone(),
        Case::new("probes::events_that_found_no_room_are_counted", overrun),
        Case::new("probes::nothing_is_left_of_a_loader_that_was_killed", killed).alone(),
    ];
    let backings = [
        ("4k", BackingKind::Small, None),
        ("thp", BackingKind::Thp, host::without_thp()),
        ("hugetlb", BackingKind::Hugetlb, host::without_huge_pages()),
    ];
    cases.extend(backings.map(|(name, backing, missing)| {
        let name = format!("probes::pages_that_a_guest_writes_first_are_faults_{name}");
        Case::new(name, move || touches(backing)).needs(missing)
    }));
    cases.into_iter().map(|case| case.needs(missing.clone())).collect()
}

fn rig(config: InstanceConfig) -> Result<Rig> {
    Rig::probed(config, Level::Trace)
}

fn small() -> InstanceConfig {
    InstanceConfig { memory_mib: 32, ..<_>::default() }
}

fn lost(rig: &Rig) -> Result<Lost> {
    Ok(rig.owner.probes(Probes::lost).context("no probes")??)
}

/// How often, of those roles (all, if there is none).
fn count(counted: &Counted, roles: &[Role], metrics: &[Metric]) -> u64 {
    let wanted = |(role, metric): &(Role, Metric)| {
        (roles.is_empty() || roles.contains(role)) && metrics.contains(metric)
    };
    counted.iter().filter(|(key, _)| wanted(key)).map(|(_, histogram)| histogram.count()).sum()
}

/// Page faults of a process, as the kernel counts them in `/proc`: minor and major.
fn faults_of(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').context("a stat without a name")?.1;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok());
    field(7).zip(field(9)).map(|(minor, major)| minor + major).context("a short stat")
}

/// Of this process, which touches memory it never had.
fn getrusage() -> Result<()> {
    const PAGES: usize = 20_000;
    let mut probes = Probes::load(Level::On)?;
    let pid = std::process::id();
    probes.track(pid, 0)?;
    let read = |probes: &mut Probes| -> Result<u64> {
        let all = probes.read()?;
        Ok(all.get(&pid).map_or(0, |all| count(all, &[], &Metric::PROCESS_FAULTS)))
    };
    let (was, counted_before) = (faults_of(pid)?, read(&mut probes)?);
    let mut memory = vec![0_u8; PAGES * 4096];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
    let (counted, kernel) = (read(&mut probes)? - counted_before, faults_of(pid)? - was);
    ensure!(counted >= PAGES as u64, "{counted} faults for {PAGES} pages");
    // Other tests run in this process, and reading takes a few faults.
    ensure!(counted.abs_diff(kernel) <= 64 + kernel / 100, "{counted} counted, {kernel} in /proc");
    ensure!(!probes.lost()?.any(), "{:?}", probes.lost()?);
    Ok(())
}

/// Pages that the child's guest writes first are faults that KVM resolves, one each with pages of
/// 4 KiB, and at least one for each huge page.
fn touches(backing: BackingKind) -> Result<()> {
    const PAGES: u64 = 1500;
    let _setting = match backing {
        BackingKind::Small => None,
        BackingKind::Thp => Some(host::shmem_thp()?),
        BackingKind::Hugetlb => Some(host::huge_pages(160)?),
    };
    let rig = rig(InstanceConfig { backing, ..small() })?;
    let child = rig.branch(rig.root, 1)?[0];
    rig.run(child, &[dirty(1, 6, 6)])?;
    let before = counted(&rig, child)?;
    rig.run(child, &[dirty(PAGES, 7, 7)])?;
    let after = counted(&rig, child)?;
    let of = |all: &Counted| count(all, &[], &[Metric::KvmFault]);
    let faults = of(&after) - of(&before);
    let least = match backing {
        BackingKind::Small | BackingKind::Thp => PAGES,
        // All of them are written to.
        BackingKind::Hugetlb => 12,
    };
    ensure!((least..=PAGES + 200).contains(&faults), "{faults} faults for {PAGES} pages");
    ensure!(!lost(&rig)?.any(), "{:?}", lost(&rig)?);
    Ok(())
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

/// In a namespace, without capabilities: a line that says what to do, and the program goes on.
fn lacking() -> Result<()> {
    for (command, expected) in [
        (&["unshare", "--user", "--map-root-user"][..], "this is a user namespace"),
        (&["unshare", "--pid", "--fork", "--kill-child"], "a PID namespace of its own"),
        (&["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"], "setcap cap_bpf,cap_perfmon"),
    ] {
        let output = Command::new(command[0])
            .args(&command[1..])
            .arg(std::env::current_exe()?)
            .env(LOAD_AND_WAIT, "say")
            .output()
            .with_context(|| format!("running {}", command[0]))?;
        let text = String::from_utf8_lossy(&output.stdout);
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
    const FORKS: usize = 20;
    let rig = Rig::probed(small(), Level::On)?;
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

fn of_kvm() -> Result<()> {
    let rig = rig(InstanceConfig { memory_mib: 64, ..<_>::default() })?;
    tests::probes::agree_with_kvm(&rig)
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

/// Moments of a report in ns after the doorbell, of the parent and of its first child.
fn moments(report: &ForkReport) -> Vec<(Moment, u64)> {
    let (parent, child) = (&report.parent, &report.children[0]);
    vec![
        (Moment::Doorbell, 0),
        (Moment::Woken, parent.woken),
        (Moment::Quiesced, parent.quiesced),
        (Moment::Settled, parent.settled),
        (Moment::Pages, parent.pages),
        (Moment::Released, parent.released),
        (Moment::Resumed, parent.resumed),
        (Moment::Awake, child.awake),
        (Moment::Applied, child.applied),
        (Moment::Restored, child.restored),
        (Moment::Entered, child.entered),
        (Moment::Exited, child.exited),
    ]
}

/// The kernel's times of a fork's stages are the engine's: in a trace a mark comes after its stamp by
/// as long as the kernel takes to hear of it. The histograms are the reports' stages.
fn stages() -> Result<()> {
    const FORKS: u64 = 20;
    let rig = rig(small())?;
    let mut late: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
    let (mut paused, mut child_took) = (0, 0);
    for _ in 0..FORKS {
        rig.owner.probes(|probes| probes.trace(true)).context("no probes")??;
        let seq = rig.begin(rig.root, 0, &[fork(1, 10)])?;
        rig.results(rig.root, 0, seq)?;
        let report = rig.owner.next_fork(rig.root, PATIENCE)?;
        let child = report.children[0].uuid;
        rig.owner.wait_for(child, PATIENCE)?;
        let events = rig.owner.probes(Probes::events).context("no probes")?;
        let pids = [u32::try_from(rig.pid(rig.root)?)?, u32::try_from(rig.pid(child)?)?];
        let moments = moments(&report);
        // The doorbell was there before there was time to mark it.
        for (moment, at) in moments.iter().skip(1) {
            let mut marks = events.iter().filter(|event| {
                event.kind == EventKind::Stage as u8
                    && event.what == *moment as u64 + 1
                    && pids.contains(&event.pid)
            });
            let Some(mark) = marks.next_back() else { bail!("no mark of {moment:?}") };
            let mark = mark.ns.checked_sub(report.parent.doorbell_ns + at);
            let mark = mark.with_context(|| format!("{moment:?} was marked before it was"))?;
            late.entry(*moment as usize).or_default().push(mark);
        }
        paused += report.parent.resumed;
        child_took += report.children[0].exited - report.children[0].awake;
        rig.kill(child)?;
        rig.standbys(1)?;
    }
    // What is alike for all is no part of a stage, which lies between two marks. Others on the
    // machine make marks later, never earlier.
    let quickest = |late: &mut Vec<u64>| {
        late.sort_unstable();
        late[late.len() / 4]
    };
    // The first mark of a process that has just woken up takes the kernel 2 us longer.
    let awake = late.remove(&(Moment::Awake as usize)).map(|mut late| quickest(&mut late));
    ensure!(awake.is_some_and(|ns| ns <= 20_000), "children are awake {awake:?} ns too late");
    let late: Vec<u64> = late.values_mut().map(quickest).collect();
    let spread = late.iter().max().zip(late.iter().min()).map(|(most, least)| most - least);
    ensure!(spread.is_some_and(|ns| ns <= 3000), "marks are late by {late:?} ns");
    let counted = rig.owner.counted(rig.root)?;
    for (role, stages, wanted) in [(Role::Parent, 6, paused), (Role::Child, 4, child_took)] {
        let ours = counted.iter().filter(|((of, metric), _)| *of == role && is_stage(*metric));
        let counts: Vec<u64> = ours.clone().map(|(_, it)| it.count()).collect();
        ensure!(counts == vec![FORKS; stages], "{}: {counts:?}", role.name());
        let sum: u64 = ours.map(|(_, it)| it.sum_ns()).sum();
        ensure!(sum == wanted, "{}: {sum} ns in stages of {wanted} ns", role.name());
    }
    Ok(())
}

fn is_stage(metric: Metric) -> bool {
    metric as u8 >= Metric::StageTakeWake as u8
}

/// Instances count each of their calls to KVM, as the kernel does, which sees the inner part of it:
/// a parent that forks and one that only syncs, and a child from its first call on.
fn calls() -> Result<()> {
    const FORKS: u64 = 10;
    // Nothing of the parent's but what forks do: the kernel's counts and its own are read one after
    // the other.
    let rig = rig(InstanceConfig { sync: false, ..small() })?;
    let sum = |counted: &Counted, roles: &[Role]| {
        let wanted =
            |(role, metric): &(Role, Metric)| *metric == Metric::Ioctl && roles.contains(role);
        let ours = counted.iter().filter(|(key, _)| wanted(key)).map(|(_, it)| it);
        ours.fold((0, 0), |sum, it| (sum.0 + it.count(), sum.1 + it.sum_ns()))
    };
    // On the border between the first millisecond and the time after, both may see it differently.
    let parent = [Role::Parent, Role::Young];
    let child = [Role::Child, Role::Parent, Role::Young];
    let both = |uuid, roles: &[Role]| -> Result<_> {
        Ok((sum(&rig.owner.counted(uuid)?, roles), sum(&counted(&rig, uuid)?, roles)))
    };
    // They are asked one after the other, and a young instance still has things to do.
    let look = |uuid, roles: &[Role]| -> Result<_> {
        let mut last = both(uuid, roles)?;
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(20));
            let now = both(uuid, roles)?;
            if now == last && now.0.0 > 0 {
                return Ok(now);
            }
            last = now;
        }
        bail!("it does not come to rest")
    };
    rig.branch(rig.root, 1)?;
    rig.kill_children()?;
    rig.standbys(1)?;
    let before = look(rig.root, &parent)?;
    for _ in 0..FORKS {
        let made = Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?.child;
        rig.owner.wait_for(made, PATIENCE)?;
        rig.kill(rig.branch(made, 1)?[0])?;
        let (own, kernel) = look(made, &child)?;
        ensure!(own.0 == kernel.0 && own.0 > 0, "a child counts {own:?}, the kernel {kernel:?}");
        ensure!(own.1 >= kernel.1, "a child counts {own:?}, the kernel {kernel:?}");
        rig.kill(made)?;
        rig.standbys(1)?;
    }
    let after = look(rig.root, &parent)?;
    let new = |before: (u64, u64), after: (u64, u64)| (after.0 - before.0, after.1 - before.1);
    let (own, kernel) = (new(before.0, after.0), new(before.1, after.1));
    // State is read by seven calls, at least.
    ensure!(own.0 == kernel.0 && own.0 >= 7 * FORKS, "the parent: {own:?}, the kernel {kernel:?}");
    ensure!(own.1 >= kernel.1, "the parent: {own:?}, the kernel {kernel:?}");
    // An instance that ends tells its calls; one that is killed cannot.
    let told = |rig: &Rig| sum(&rig.owner.counted_of_ended(), &child).0;
    let before = told(&rig);
    let made = rig.branch(rig.root, 1)?[0];
    rig.begin(made, 0, &[exit(3)])?;
    rig.owner.wait_exit(made, PATIENCE)?;
    ensure!(told(&rig) > before, "{before} calls were told, and no more at an end");
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

/// The part of [`killed`] that is killed.
pub fn load_and_wait_if_asked() {
    if let Ok(what) = std::env::var(LOAD_AND_WAIT) {
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
