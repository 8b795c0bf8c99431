//! The probes on a kernel that allows more, and with a standard KVM.

use anyhow::{Context, Result, ensure};
use ebpf_loader::{Level, Metric, Probes, Role};
use runtime::owner::Owner;
use runtime::proto::InstanceConfig;
use tests::program::{dirty, fork};
use tests::rig::{PATIENCE, Rig};

use super::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("probes::every_part_is_measured_here", every_part),
        ("probes::every_program_loads_by_itself", each),
        ("probes::faults_and_exits_of_a_guest_are_counted", of_a_guest),
        ("probes::faults_and_exits_are_those_of_kvm_s_own_statistics", of_kvm),
        ("probes::faults_of_a_process_are_those_of_getrusage", tests::probes::agree_with_getrusage),
        ("probes::calls_are_those_that_the_kernel_sees", calls),
    ]
}

/// This kernel refuses nothing that the best way needs.
fn every_part() -> Result<()> {
    let probes = Probes::load(Level::Trace)?;
    for attached in probes.attached() {
        println!("{}: {}", attached.what, attached.how);
    }
    for refused in probes.refused() {
        println!("refused: {} ({}): {}", refused.program, refused.how, refused.reason);
    }
    let how = |what| {
        let attached = probes.attached().into_iter().find(|attached| attached.what == what);
        attached.map(|attached| attached.how).with_context(|| format!("nothing measures {what}"))
    };
    for (what, best) in [
        ("processes", "raw_tp"),
        ("time of page faults", "fexit"),
        ("page faults", "raw_tp"),
        ("faults of the guest", "raw_tp"),
        ("time off CPU", "raw_tp"),
        ("calls to KVM", "raw_tp"),
        ("stages of a fork", "usdt"),
    ] {
        ensure!(how(what)? == best, "{what} is measured by {}, not {best}", how(what)?);
    }
    Ok(())
}

fn each() -> Result<()> {
    let all = Probes::survey()?;
    let refused: Vec<_> = all.iter().filter(|one| one.refused.is_some()).collect();
    ensure!(all.len() >= 30 && refused.is_empty(), "of {}: {refused:?}", all.len());
    Ok(())
}

fn of_kvm() -> Result<()> {
    let config = InstanceConfig { memory_mib: 32, ..<_>::default() };
    tests::probes::agree_with_kvm(&Rig::probed(config, Level::Trace)?)
}

fn calls() -> Result<()> {
    let config = InstanceConfig { memory_mib: 32, sync: false, ..<_>::default() };
    tests::probes::agree_with_own_calls(&Rig::probed(config, Level::Trace)?)
}

fn of_a_guest() -> Result<()> {
    const PAGES: u64 = 500;
    let config = InstanceConfig { memory_mib: 32, ..<_>::default() };
    let rig = Rig::probed(config, Level::Trace)?;
    let owner: &Owner = &rig.owner;
    let seq = rig.begin(rig.root, 0, &[fork(1, 10)])?;
    rig.results(rig.root, 0, seq)?;
    let child = owner.next_fork(rig.root, PATIENCE)?.children[0].uuid;
    owner.wait_for(child, PATIENCE)?;
    let count = |metric: Metric| -> Result<u64> {
        let pid = u32::try_from(rig.pid(child)?)?;
        let all = owner.probes(Probes::read).context("no probes")??;
        let all = all.get(&pid).context("nothing was counted of the child")?;
        let of = all.iter().filter(|((role, it), _)| *it == metric && *role != Role::Standby);
        Ok(of.map(|(_, histogram)| histogram.count()).sum())
    };
    let exits = || {
        Ok::<_, anyhow::Error>(tests::probes::count(&owner.counted(child)?, &[], &[Metric::Exits]))
    };
    let before = (count(Metric::KvmFault)?, exits()?);
    rig.run(child, &[dirty(PAGES, 7, 7)])?;
    let after = (count(Metric::KvmFault)?, exits()?);
    let faults = after.0 - before.0;
    println!("{faults} faults of the guest for {PAGES} pages, {} exits", after.1 - before.1);
    ensure!((PAGES..PAGES * 2).contains(&faults), "{faults} faults for {PAGES} pages");
    ensure!(after.1 > before.1, "no exit was counted");
    Ok(())
}
