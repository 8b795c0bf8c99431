//! What the probes count, against what KVM counts.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ebpf_loader::{Counted, Metric, Probes};
use uuid::Uuid;

use crate::program::{again, dirty, pause};
use crate::rig::Rig;

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

/// Faults of the guest that KVM resolved, and exits for a port.
fn seen(counted: &Counted) -> (u64, u64) {
    let of = |wanted: Metric| {
        counted.iter().filter(move |((_, metric), _)| *metric == wanted).map(|(_, it)| it)
    };
    let faults = of(Metric::KvmFault).map(ebpf_loader::Histogram::count).sum();
    let exits = of(Metric::Exits).flat_map(ebpf_loader::Histogram::cells);
    let io = exits.filter(|(reason, ..)| *reason == IO).map(|(.., cell)| cell.count).sum();
    (faults, io)
}

/// What the probes and what KVM counted.
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
    let both = || -> Result<Looked> {
        Ok((seen(&counted(rig, rig.root)?), rig.owner.kvm_stats(rig.root)?))
    };
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
