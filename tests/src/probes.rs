//! What the probes count, against what the kernel, KVM and the instances count.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ebpf_loader::{Counted, Level, Metric, Probes, Role};
use runtime::memory::{BackingKind, Image};
use uuid::Uuid;

use crate::program::{Forked, again, dirty, exit, fork, pause};
use crate::rig::{PATIENCE, Rig};

/// Reason of an exit for a port.
const IO: u16 = 2;

/// What was counted of an instance so far.
///
/// # Errors
///
/// That there are no probes, or that they know nothing of it.
pub fn counted(rig: &Rig, uuid: Uuid) -> Result<Counted> {
    let pid = u32::try_from(rig.pid(uuid)?)?;
    let all = rig.owner.probes(Probes::read).context("no probes")??;
    all.get(&pid).cloned().context("nothing was counted of it")
}

/// Faults of the guest that KVM resolved, as the probes saw, and exits for a port, as the instance did.
fn seen(rig: &Rig) -> Result<(u64, u64)> {
    let faults = count(&counted(rig, rig.root)?, &[], &[Metric::KvmFault]);
    let own = rig.owner.counted(rig.root)?;
    let exits = own.iter().filter(|((_, metric), _)| *metric == Metric::Exits);
    let cells = exits.flat_map(|(_, histogram)| histogram.cells());
    let io = cells.filter(|(reason, ..)| *reason == IO).map(|(.., cell)| cell.count).sum();
    Ok((faults, io))
}

/// What the probes and the instance, and what KVM counted.
type Looked = ((u64, u64), BTreeMap<String, u64>);

/// Runs a known workload in the root: both count the same faults and exits of it, and not fewer than
/// it has.
///
/// # Errors
///
/// The difference.
pub fn agree_with_kvm(rig: &Rig) -> Result<()> {
    const PAGES: u64 = 700;
    const EXITS: u64 = 500;
    let both = || -> Result<Looked> { Ok((seen(rig)?, rig.owner.kvm_stats(rig.root)?)) };
    // Until nothing moves any more: after its results a guest still asks to be parked.
    let look = || -> Result<Looked> {
        let mut last = both()?;
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(20));
            let now = both()?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
        bail!("it does not come to rest")
    };
    // What was mapped before is mapped no more, or read-only.
    rig.standbys(1)?;
    let before = look()?;
    rig.run(rig.root, &[dirty(PAGES, 5, 5)])?;
    rig.run(rig.root, &[pause(0), again(0, EXITS)])?;
    let after = look()?;
    let kvm: BTreeMap<&str, u64> = after
        .1
        .iter()
        .map(|(name, value)| (name.as_str(), value - before.1.get(name).unwrap_or(&0)))
        .filter(|(_, new)| *new > 0)
        .collect();
    let own = |name: &str| kvm.get(name).copied().unwrap_or(0);
    let (faults, io) = (after.0.0 - before.0.0, after.0.1 - before.0.1);
    let told = format!("{faults} faults of {PAGES} pages, {io} exits of {EXITS}; KVM: {kvm:?}");
    // Some are resolved without a new mapping, some turn out to be none.
    let by_kvm = own("pf_fixed")..=own("pf_taken");
    ensure!(by_kvm.contains(&faults) && faults >= PAGES, "{told}");
    ensure!(by_kvm.end() - by_kvm.start() <= PAGES / 50, "{told}");
    // Where KVM emulates the instruction, it counts it so.
    ensure!(io == own("io_exits").max(own("insn_emulation")) && io >= EXITS, "{told}");
    Ok(())
}

/// How often, of those roles (all, if there is none).
#[must_use]
pub fn count(counted: &Counted, roles: &[Role], metrics: &[Metric]) -> u64 {
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

/// Page faults of this process, which touches memory it never had, are as many as in `/proc`.
///
/// # Errors
///
/// The difference.
pub fn agree_with_getrusage() -> Result<()> {
    const PAGES: u32 = 20_000;
    // Not anonymous memory, which a kernel may give out in huge pages.
    let memory = Image::new(BackingKind::Small, u64::from(PAGES) * 4096)?.map_shared()?;
    let mut probes = Probes::load(Level::On)?;
    let pid = std::process::id();
    probes.track(pid, 0)?;
    let read = |probes: &mut Probes| -> Result<u64> {
        let all = probes.read()?;
        Ok(all.get(&pid).map_or(0, |all| count(all, &[], &Metric::PROCESS_FAULTS)))
    };
    let (was, counted_before) = (faults_of(pid)?, read(&mut probes)?);
    (0..PAGES).for_each(|page| memory.touch(page));
    let (counted, kernel) = (read(&mut probes)? - counted_before, faults_of(pid)? - was);
    ensure!(counted >= u64::from(PAGES), "{counted} faults for {PAGES} pages");
    // Other tests run in this process, and reading takes a few faults.
    ensure!(counted.abs_diff(kernel) <= 64 + kernel / 100, "{counted} counted, {kernel} in /proc");
    ensure!(!probes.lost()?.any(), "{:?}", probes.lost()?);
    Ok(())
}

/// Instances count each of their calls to KVM, as the kernel does, which sees the inner part of it:
/// a parent that forks and one that only syncs, and a child from its first call on.
///
/// Its instances must not sync: nothing of the parent's but what forks do, as the kernel's counts and
/// its own are read one after the other.
///
/// # Errors
///
/// The difference.
pub fn agree_with_own_calls(rig: &Rig) -> Result<()> {
    const FORKS: u64 = 10;
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
        Ok((sum(&rig.owner.counted(uuid)?, roles), sum(&counted(rig, uuid)?, roles)))
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
    let before = told(rig);
    let made = rig.branch(rig.root, 1)?[0];
    rig.begin(made, 0, &[exit(3)])?;
    rig.owner.wait_exit(made, PATIENCE)?;
    ensure!(told(rig) > before, "{before} calls were told, and no more at an end");
    Ok(())
}
