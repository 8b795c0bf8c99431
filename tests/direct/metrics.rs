//! What each metric of the probes counts, by workloads of which that is known.
#![expect(unsafe_code, reason = "a file on a disk is mapped, to be read from there")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ebpf_loader::{Beacon, Counted, Event, EventKind, Level, Metric, Probes, Role};
use runtime::fork::{ForkReport, Moment};
use runtime::memory::{BackingKind, Image, Mapping, PAGE};
use runtime::proto::InstanceConfig;
use rustix::fs::Advice;
use rustix::mm::{MapFlags, ProtFlags};
use tests::case::Case;
use tests::host::{self, Setting};
use tests::probes::{count, counted};
use tests::program::{again, dirty, fork, pause};
use tests::rig::{PATIENCE, Rig};

use crate::probes::{lost, rig, small};

pub fn cases() -> Vec<Case> {
    let missing = host::without_probes();
    let mut cases = vec![
        Case::new("probes::a_page_that_is_read_from_a_disk_is_a_major_fault", major),
        Case::new("probes::a_standby_s_wait_is_what_the_engine_saw", wake_ups).alone(),
        Case::new("probes::wake_ups_of_an_instance_are_not_those_of_a_standby", roles),
        Case::new("probes::a_second_trace_knows_nothing_of_the_first", twice).alone(),
        Case::new("probes::stages_are_where_the_engine_stamps_them", stages).alone(),
    ];
    let backings = [
        ("4k", BackingKind::Small, None),
        ("thp", BackingKind::Thp, host::without_thp()),
        ("hugetlb", BackingKind::Hugetlb, host::without_huge_pages()),
    ];
    for (name, backing, missing) in backings {
        let by_guest = format!("probes::pages_that_a_guest_writes_first_are_faults_{name}");
        let by_process = format!("probes::pages_that_a_process_touches_are_faults_{name}");
        cases.push(Case::new(by_guest, move || touches(backing)).needs(missing.clone()));
        cases.push(Case::new(by_process, move || process(backing)).needs(missing));
    }
    cases.into_iter().map(|case| case.needs(missing.clone())).collect()
}

fn setting(backing: BackingKind) -> Result<Option<Setting>> {
    Ok(match backing {
        BackingKind::Small => None,
        BackingKind::Thp => Some(host::shmem_thp()?),
        BackingKind::Hugetlb => Some(host::huge_pages(160)?),
    })
}

/// What the probes say of this process's faults in a range: copied, mapped, read from a disk.
struct Watched {
    probes: Probes,
    // Read by the kernel where it lies.
    _beacon: Box<Beacon>,
}

impl Watched {
    fn new(start: u64, bytes: usize) -> Result<Self> {
        let beacon = Box::new(Beacon {
            role: Role::Parent as u32,
            stage: 0,
            guest_start: start,
            guest_len: bytes as u64,
            born_ns: 0,
        });
        let mut probes = Probes::load(Level::On)?;
        probes.track(std::process::id(), (&raw const *beacon) as u64)?;
        Ok(Self { probes, _beacon: beacon })
    }

    fn read(&mut self) -> Result<[u64; 3]> {
        let all = self.probes.read()?.remove(&std::process::id()).unwrap_or_default();
        Ok(Metric::GUEST_FAULTS.map(|metric| count(&all, &[Role::Parent], &[metric])))
    }

    /// What `work` added.
    fn during(&mut self, work: impl FnOnce()) -> Result<[u64; 3]> {
        let before = self.read()?;
        work();
        let after = self.read()?;
        ensure!(!self.probes.lost()?.any(), "{:?}", self.probes.lost()?);
        Ok(std::array::from_fn(|at| after[at] - before[at]))
    }
}

/// As many as expected, and up to one in a hundred more in all: the kernel takes a page's mapping away
/// when it moves the page.
fn as_expected(faults: [u64; 3], expected: [u64; 3]) -> bool {
    let sum = |all: [u64; 3]| all.iter().sum::<u64>();
    let at_least = faults.iter().zip(expected).all(|(faults, expected)| *faults >= expected);
    at_least && sum(faults) <= sum(expected) + 2 + sum(expected) / 100
}

/// In a private mapping of a memfd whose pages are there, as an instance has its memory: each page is
/// touched once. What is told apart is what [`Metric`] says.
fn process(backing: BackingKind) -> Result<()> {
    const HUGE: u32 = 512;
    const PAGES: u32 = 4 * HUGE;
    let _setting = setting(backing)?;
    let image = Image::new(backing, u64::from(PAGES) * PAGE as u64)?;
    let shared = image.map_shared()?;
    (0..PAGES).for_each(|page| shared.touch(page));
    drop(shared);
    let image = image.seal().map_err(|unsealed| unsealed.error)?;
    let look = |mapping: &Mapping| (0..PAGES).for_each(|page| mapping.look(page));
    let touch = |mapping: &Mapping| (0..PAGES).for_each(|page| mapping.touch(page));
    let watch =
        |mapping: &Mapping| Watched::new(mapping.address().as_ptr() as u64, mapping.bytes());
    let mapping = image.map_private()?;
    let written = watch(&mapping)?.during(|| touch(&mapping))?;
    drop(mapping);
    let mapping = image.map_private()?;
    let mut watched = watch(&mapping)?;
    let read = watched.during(|| look(&mapping))?;
    let rewritten = watched.during(|| touch(&mapping))?;
    let told = format!("written {written:?}, read {read:?}, then written {rewritten:?}");
    println!("{backing:?}: {told}");
    let (pages, huge) = (u64::from(PAGES), u64::from(PAGES / HUGE));
    // Copied, mapped, read from a disk. Reads map 16 small pages at a time.
    let expected = match backing {
        BackingKind::Small => [[0, pages, 0], [0, pages / 16, 0], [pages, 0, 0]],
        // A write takes a huge mapping apart, and nothing is mapped then but its own page.
        BackingKind::Thp => [[0, pages, 0], [0, huge, 0], [huge, pages - huge, 0]],
        BackingKind::Hugetlb => [[0, huge, 0], [0, huge, 0], [huge, 0, 0]],
    };
    if backing == BackingKind::Thp && read != expected[1] {
        // Memory had not as many huge pages: then it is something in between.
        ensure!(written == expected[0] && (huge..=pages / 16).contains(&read[1]), "{told}");
        ensure!(rewritten.iter().sum::<u64>() == pages && rewritten[2] == 0, "{told}");
    } else {
        for (faults, expected) in [written, read, rewritten].into_iter().zip(expected) {
            ensure!(as_expected(faults, expected), "{told}: {faults:?} is not {expected:?}");
        }
    }
    Ok(())
}

/// Pages that the child's guest writes first are faults that KVM resolves, one for each page of 4 KiB
/// in every backing: that is what a machine's dirty log tells of, so KVM maps nothing larger for
/// writing.
fn touches(backing: BackingKind) -> Result<()> {
    const PAGES: u64 = 1500;
    let _setting = setting(backing)?;
    let rig = rig(InstanceConfig { backing, ..small() })?;
    let child = rig.branch(rig.root, 1)?[0];
    rig.run(child, &[dirty(1, 6, 6)])?;
    let pid = u32::try_from(rig.pid(child)?)?;
    // What the guest's program writes once it has answered may come late, so no fault is counted that
    // has no event, but there may be events of faults that are not counted.
    rig.owner.probes(|probes| probes.trace(true)).context("no probes")??;
    let before = counted(&rig, child)?;
    rig.run(child, &[dirty(PAGES, 7, 7)])?;
    let after = counted(&rig, child)?;
    let events = rig.owner.probes(Probes::events).context("no probes")?;
    let of = |all: &Counted| count(all, &[], &[Metric::KvmFault]);
    let faults = of(&after) - of(&before);
    let kvm = |event: &&Event| event.kind == EventKind::KvmFault as u8 && event.pid == pid;
    let addresses: Vec<u64> = events.iter().filter(kvm).map(|event| event.what).collect();
    // Below are pages of the guest's program.
    let work = |at: &&u64| **at >= rig.work_start;
    let distinct = |bits: u32| {
        let all = addresses.iter().filter(work).map(|at| at >> bits);
        all.collect::<BTreeSet<u64>>().len() as u64
    };
    let (pages, huge) = (distinct(12), distinct(21));
    let told = format!("{faults} faults of {PAGES} pages: {pages} of 4 KiB, {huge} of 2 MiB");
    println!("{backing:?}: {told}");
    let (of_work, told_of) = (addresses.iter().filter(work).count() as u64, addresses.len() as u64);
    let told = format!("{told}, {told_of} events, {of_work} of work pages");
    ensure!((of_work..=told_of).contains(&faults), "{told}");
    ensure!(pages == PAGES && (PAGES..=PAGES + PAGES / 50).contains(&faults), "{told}");
    let last = rig.work_start + rig.work_pages * PAGE as u64 - 1;
    let all = (last >> 21) - (rig.work_start >> 21) + 1;
    // The first one may have a few work pages only.
    ensure!((all - 1..=all).contains(&huge), "{told}, of {all}");
    ensure!(!lost(&rig)?.any(), "{:?}", lost(&rig)?);
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

/// Stages of a fork: what counts them, and the moments between which they lie.
const STAGES: [(Metric, Moment, Moment); 10] = [
    (Metric::StageTakeWake, Moment::Doorbell, Moment::Woken),
    (Metric::StageQuiesce, Moment::Woken, Moment::Quiesced),
    (Metric::StageSettle, Moment::Quiesced, Moment::Settled),
    (Metric::StageCapturePages, Moment::Settled, Moment::Pages),
    (Metric::StageCaptureState, Moment::Pages, Moment::Released),
    (Metric::StageResume, Moment::Released, Moment::Resumed),
    (Metric::StageApply, Moment::Awake, Moment::Applied),
    (Metric::StageRestore, Moment::Applied, Moment::Restored),
    (Metric::StageCommit, Moment::Restored, Moment::Entered),
    (Metric::StageRun, Moment::Entered, Moment::Exited),
];

/// By how much the kernel's time of a stage of so many ns may differ from the engine's: 1 us or 5 %.
/// The first mark of a process that has just woken up costs the kernel some us more than others: it
/// seems to wake up later, so the stage after that seems shorter.
fn bound(stage: Metric, ns: u64) -> u64 {
    let woken = if stage == Metric::StageApply { 6000 } else { 0 };
    woken + (ns / 20).max(1000)
}

/// When the kernel heard of the moments of a fork, in ns after the doorbell.
fn marks(events: &[Event], report: &ForkReport, pids: [u32; 2]) -> Result<BTreeMap<Moment, u64>> {
    let mut marks = BTreeMap::new();
    // The doorbell was there before there was time to mark it: it is the engine's time.
    marks.insert(Moment::Doorbell, 0);
    for (moment, at) in moments(report).into_iter().skip(1) {
        let mut of_moment = events.iter().filter(|event| {
            event.kind == EventKind::Stage as u8
                && event.what == moment as u64 + 1
                && pids.contains(&event.pid)
        });
        let mark = of_moment.next_back().with_context(|| format!("no mark of {moment:?}"))?;
        let mark = mark.ns.checked_sub(report.parent.doorbell_ns);
        let mark = mark.filter(|mark| *mark >= at);
        marks.insert(moment, mark.with_context(|| format!("{moment:?} was marked before it was"))?);
    }
    Ok(marks)
}

/// The kernel's times of a fork's stages, between two marks, are the engine's, between two stamps;
/// and so are the histograms. Medians: whoever else wants the processor comes between a stamp and its
/// mark now and then. A mark comes a microsecond late as it is, so where the host is busy for as long
/// as one try takes, another follows.
fn stages() -> Result<()> {
    stages_once().or_else(|_| stages_once()).or_else(|_| stages_once())
}

fn stages_once() -> Result<()> {
    const FORKS: usize = 30;
    let rig = rig(small())?;
    // By stage: the kernel's times, the engine's, and the amounts by which they differ.
    let mut all: BTreeMap<Metric, [Vec<u64>; 3]> = BTreeMap::new();
    for _ in 0..FORKS {
        rig.owner.probes(|probes| probes.trace(true)).context("no probes")??;
        let (report, events) = traced_fork(&rig)?;
        let child = report.children[0].uuid;
        let pids = [u32::try_from(rig.pid(rig.root)?)?, u32::try_from(rig.pid(child)?)?];
        let marks = marks(&events, &report, pids)?;
        let stamps: BTreeMap<Moment, u64> = moments(&report).into_iter().collect();
        for (stage, from, to) in STAGES {
            let kernel = marks[&to].saturating_sub(marks[&from]);
            let engine = stamps[&to] - stamps[&from];
            let [kernels, engines, differences] = all.entry(stage).or_default();
            kernels.push(kernel);
            engines.push(engine);
            differences.push(kernel.abs_diff(engine));
        }
        rig.kill(child)?;
        rig.standbys(1)?;
    }
    let histograms = rig.owner.counted(rig.root)?;
    for (stage, [kernel, engine, difference]) in all {
        let [kernel, engine, difference] = [kernel, engine, difference].map(median);
        let bound = bound(stage, engine);
        let told =
            format!("{stage:?}: {kernel} ns by marks, {engine} by stamps, {difference} apart");
        println!("{told}");
        ensure!(difference <= bound, "{told}");
        let mut counted = histograms.iter().filter(|((_, metric), _)| *metric == stage);
        let histogram = counted.next().with_context(|| format!("{told}, no histogram"))?.1;
        let middle = histogram.per_mille_ns(500).context("an empty histogram")?;
        // A bucket is a sixteenth wide.
        ensure!(histogram.count() == FORKS as u64, "{told}, {} counted", histogram.count());
        ensure!(middle.abs_diff(kernel) <= bound + kernel / 16, "{told}, the histogram: {middle}");
    }
    Ok(())
}

/// A fork that the guest asks for, and everything that happened until its child had called. The trace
/// is on.
fn traced_fork(rig: &Rig) -> Result<(ForkReport, Vec<Event>)> {
    let seq = rig.begin(rig.root, 0, &[fork(1, 10)])?;
    rig.results(rig.root, 0, seq)?;
    let report = rig.owner.next_fork(rig.root, PATIENCE)?;
    rig.owner.wait_for(report.children[0].uuid, PATIENCE)?;
    Ok((report, rig.owner.probes(Probes::events).context("no probes")?))
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// A standby is woken between the doorbell and the parent's next moment, and runs some time before it
/// says that it is awake: most of that time is its wait for a processor.
fn wake_ups() -> Result<()> {
    const FORKS: usize = 20;
    let rig = rig(InstanceConfig { sync: false, ..small() })?;
    let (mut waits, mut engine) = (Vec::new(), Vec::new());
    for _ in 0..FORKS {
        // So that it sleeps, and its processor does.
        std::thread::sleep(Duration::from_millis(20));
        rig.owner.probes(|probes| probes.trace(true)).context("no probes")??;
        let (report, events) = traced_fork(&rig)?;
        let child = &report.children[0];
        let pid = u32::try_from(rig.pid(child.uuid)?)?;
        let doorbell = report.parent.doorbell_ns;
        let awake = doorbell + child.awake;
        let mut of_standby = events.iter().filter(|event| {
            event.kind == EventKind::OffCpu as u8
                && (event.pid, event.tid) == (pid, pid)
                && (doorbell..=awake).contains(&event.ns)
        });
        let wait = of_standby.next_back().context("no wait of the standby")?;
        ensure!(wait.role == Role::Standby as u8, "{wait:?}");
        let woken = wait.ns - wait.took_ns;
        let within = (doorbell..=doorbell + report.parent.woken).contains(&woken);
        let told = format!("{wait:?}, {child:?}, {:?}", report.parent);
        ensure!(within, "it was woken at another time: {told}");
        let all = counted(&rig, child.uuid)?;
        let histogram = all.get(&(Role::Standby, Metric::OffCpu)).context("no histogram")?;
        ensure!(histogram.sum_ns() >= wait.took_ns, "not in the histogram: {told}");
        waits.push(wait.took_ns);
        engine.push(awake - woken);
        rig.kill(child.uuid)?;
        rig.standbys(1)?;
    }
    let (wait, engine) = (median(waits), median(engine));
    println!("a wait of {wait} ns, awake {engine} ns after the wake-up");
    ensure!(wait * 2 >= engine, "a wait of {wait} ns, awake {engine} ns after the wake-up");
    Ok(())
}

/// Also those of a child that takes no page fault, in which nothing is counted but its wake-ups.
fn roles() -> Result<()> {
    const SLEEPS: u64 = 300;
    let rig = Rig::probed(small(), Level::On)?;
    let child = rig.branch(rig.root, 1)?[0];
    std::thread::sleep(Duration::from_millis(20));
    let waits = |all: &Counted| {
        let of = |role| count(all, &[role], &[Metric::OffCpu]);
        [Role::Standby, Role::Child, Role::Young, Role::Parent].map(of)
    };
    let before = waits(&counted(&rig, child)?);
    rig.run(child, &[pause(100), again(0, SLEEPS)])?;
    let after = waits(&counted(&rig, child)?);
    ensure!(before[..3] == after[..3], "{before:?}, then {after:?}");
    ensure!(after[3] >= before[3] + SLEEPS / 2, "{before:?}, then {after:?}");
    Ok(())
}

/// What was under way at the end of the first one has ended, or goes on, unseen.
fn twice() -> Result<()> {
    let rig = rig(InstanceConfig { sync: false, ..small() })?;
    let trace = |on| rig.owner.probes(|probes| probes.trace(on)).context("no probes");
    let level = |level| rig.owner.probes(|probes| probes.set_level(level)).context("no probes");
    trace(true)??;
    let seq = rig.begin(rig.root, 0, &[count_for(&rig, 400)])?;
    std::thread::sleep(Duration::from_millis(100));
    trace(false)??;
    level(Level::All)??;
    std::thread::sleep(Duration::from_millis(50));
    drop(rig.owner.probes(Probes::events));
    let again = runtime::sys::now_ns();
    level(Level::Trace)??;
    trace(true)??;
    rig.results(rig.root, 0, seq)?;
    rig.run(rig.root, &[pause(0), tests::program::again(0, 10)])?;
    let events = rig.owner.probes(Probes::events).context("no probes")?;
    let timed: Vec<&Event> = events.iter().filter(|event| event.took_ns > 0).collect();
    ensure!(timed.iter().any(|event| event.kind == EventKind::Ioctl as u8), "{events:?}");
    let early = timed.iter().find(|event| event.ns - event.took_ns < again);
    ensure!(early.is_none(), "before the trace, which began at {again}: {early:?}");
    Ok(())
}

/// The guest counts for so many milliseconds without an exit.
fn count_for(rig: &Rig, ms: u64) -> runtime::proto::WireStep {
    tests::program::count(rig.ticks(ms), rig.address(0, 0), 0)
}

/// One that waits for a disk.
fn major() -> Result<()> {
    const PAGES: usize = 16;
    let program = std::env::current_exe()?;
    // Beside this program: what is temporary may be in memory.
    let folder = program.parent().context("a program in no folder")?;
    let mut file = tempfile::tempfile_in(folder)?;
    file.write_all(&vec![7; PAGES * PAGE])?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    let (protection, flags) = (ProtFlags::READ, MapFlags::PRIVATE);
    let none = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice, so it replaces none. The file has
    // no name, so nobody truncates it.
    let start = unsafe { rustix::mm::mmap(none, PAGES * PAGE, protection, flags, &file, 0) }?;
    let faults = Watched::new(start as u64, PAGES * PAGE)?.during(|| {
        let byte = start.cast::<u8>();
        // SAFETY: in the mapping, which is readable and lives; a byte of whatever value may be read.
        unsafe { byte.read_volatile() };
    });
    // SAFETY: the mapping from above, to which there is no reference.
    unsafe { rustix::mm::munmap(start, PAGES * PAGE) }?;
    let faults = faults?;
    ensure!(faults == [0, 0, 1], "copied, mapped, read from a disk: {faults:?}");
    Ok(())
}
