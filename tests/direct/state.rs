//! Registers and clocks survive a fork.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest_abi::entry::ELF_BASE;
use kvm_bindings::kvm_regs;
use runtime::boot::{self, Loaded};
use runtime::kvm::{DirtyMode, Host, KvmError, Machine, MachineConfig, Vcpu, VcpuState, VmState};
use runtime::memory::{BackingKind, Image, RamLayout, guest_ram};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::host;
use tests::program::{Forked, again, clock, fork};
use tests::rig::Rig;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

/// What a clock may be off.
const STEP_US: u64 = 2_000;
/// How long a fork may take as its guest sees it.
const GAP_US: u64 = 5_000;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("state::registers_survive_in_parent_and_children", registers),
        Case::new("state::a_crash_that_kvm_has_not_told_is_put_back", untold_crash)
            .needs(host::without_triple_fault_event()),
        Case::new("state::an_msr_that_kvm_refuses_is_an_error", refused_msr),
        Case::new("state::a_tsc_that_the_guest_has_moved_is_moved_in_the_child", moved_tsc),
        Case::new("state::tsc_and_kvmclock_run_on_in_parent_and_child", || clocks(1)).alone(),
        Case::new("state::tsc_and_kvmclock_run_on_on_every_vcpu", || clocks(2)).alone(),
        Case::new("state::the_fork_itself_is_no_gap_in_time", gap).alone(),
    ]
}

fn config() -> InstanceConfig {
    InstanceConfig { memory_mib: 16, ..<_>::default() }
}

fn registers() -> Result<()> {
    let rig = Rig::new(config())?;
    for _ in 0..5 {
        // Both sides fork once more: the grandchild's registers were a child's before.
        let seq = rig.begin(rig.root, 0, &[fork(2, 0), again(0, 2)])?;
        let root = Forked::read(&rig.results(rig.root, 0, seq)?, 0)?;
        let mut machines = 0;
        // 1, then 1 + 2, then 3 + 6.
        rig.owner.wait_until("nine machines", tests::rig::PATIENCE, |alive| {
            machines = alive.len();
            (machines == 9).then_some(())
        })?;
        ensure!(root.status == 0 && root.registers, "in the root: {root:?}");
        for uuid in rig.owner.alive().into_iter().filter(|uuid| *uuid != rig.root) {
            let forked = Forked::read(&rig.results(uuid, 0, seq)?, 0)?;
            ensure!(forked.status == 0 && forked.registers, "in a child: {forked:?}");
        }
        rig.kill_children()?;
    }
    Ok(())
}

/// A rehearsal can be stopped between a crash and KVM's word of it. It is part of the state then, so
/// that it can be taken back.
fn untold_crash() -> Result<()> {
    let host = Host::open()?;
    let layout = RamLayout::new(RamLayout::MIN_MIB);
    let mapping = Image::new(BackingKind::Small, layout.bytes())?.map_shared()?;
    let made = MachineConfig { layout, vcpus: 1, dirty: DirtyMode::Bitmap, ring_entries: 1024 };
    let (_machine, mut vcpus, _log) = Machine::new(&host, made, &mapping, false)?;
    let vcpu = vcpus.first_mut().context("no vCPU")?;
    let state = |vcpu: &mut Vcpu| -> Result<Box<VcpuState>> {
        // Takes in what was set, and runs nothing.
        vcpu.warm_up()?;
        let mut state = Box::new(VcpuState::default());
        vcpu.save(&mut state)?;
        Ok(state)
    };
    let sound = state(vcpu)?;
    let mut crashed = sound.clone();
    crashed.events.triple_fault.pending = 1;
    vcpu.restore(&crashed, Some(&sound))?;
    let seen = state(vcpu)?;
    ensure!(seen.events.triple_fault.pending == 1, "the crash is not part of the state");
    vcpu.restore(&sound, Some(&seen))?;
    let back = state(vcpu)?;
    ensure!(back.events.triple_fault.pending == 0, "the crash was not taken back");
    Ok(())
}

/// KVM stops at an MSR that it does not know, and says how many it has set.
fn refused_msr() -> Result<()> {
    const NOT_ONE: u32 = 0xdead_0000;
    let host = Host::open()?;
    let layout = RamLayout::new(RamLayout::MIN_MIB);
    let mapping = Image::new(BackingKind::Small, layout.bytes())?.map_shared()?;
    let made = MachineConfig { layout, vcpus: 1, dirty: DirtyMode::Bitmap, ring_entries: 1024 };
    let (_machine, mut vcpus, _log) = Machine::new(&host, made, &mapping, false)?;
    let vcpu = vcpus.first_mut().context("no vCPU")?;
    vcpu.warm_up()?;
    let mut state = Box::new(VcpuState::default());
    vcpu.save(&mut state)?;
    state.msrs[3].index = NOT_ONE;
    match vcpu.restore(&state, None) {
        Err(KvmError::ShortMsrs { applied: 3, requested, index: NOT_ONE, .. }) => {
            ensure!(requested == state.msrs().len(), "{requested} were asked for");
            Ok(())
        }
        other => anyhow::bail!("{other:?}"),
    }
}

/// The guest writes to its TSC, for which it has to be in CPL 0, and the state that it leaves is given
/// to another machine.
fn moved_tsc() -> Result<()> {
    /// `wrmsr`, then `out dx, al`: an exit.
    const PROGRAM: [u8; 3] = [0x0f, 0x30, 0xee];
    const TSC: u64 = 0x10;
    const TSC_ADJUST: u64 = 0x3b;
    let host = Host::open()?;
    let layout = RamLayout::new(RamLayout::MIN_MIB);
    for (msr, value) in [(TSC_ADJUST, 5_000_000_u64), (TSC, 1 << 40)] {
        let mapping = Image::new(BackingKind::Small, layout.bytes())?.map_shared()?;
        let ram = guest_ram(&mapping, &layout)?;
        let loaded = Loaded { entry: ELF_BASE, end: ELF_BASE + 4096 };
        boot::prepare(&ram, &layout, &loaded, 1, 0)?;
        ram.write_slice(&PROGRAM, GuestAddress(ELF_BASE))?;
        let made = MachineConfig { layout, vcpus: 1, dirty: DirtyMode::Bitmap, ring_entries: 1024 };
        let (_machine, mut vcpus, _log) = Machine::new(&host, made, &mapping, false)?;
        let vcpu = vcpus.first_mut().context("no vCPU")?;
        let Some(before) = vcpu.tsc_offset() else { return Ok(()) };
        boot::start(vcpu, &loaded)?;
        let regs = kvm_regs {
            rip: ELF_BASE,
            rax: value & u64::from(u32::MAX),
            rcx: msr,
            rdx: value >> 32,
            rflags: 2,
            ..Default::default()
        };
        vcpu.boot(&regs, |sregs| {
            (sregs.cs.selector, sregs.cs.dpl) = (0x10, 0);
            (sregs.ss.selector, sregs.ss.dpl) = (0x18, 0);
        })?;
        let exit = loop {
            if let Some(exit) = vcpu.run()? {
                break format!("{exit:?}");
            }
        };
        ensure!(exit.starts_with("IoOut"), "a write to {msr:#x} ends with {exit}");
        let after = vcpu.tsc_offset().context("no offset any more")?;
        let mut state = Box::new(VcpuState::default());
        vcpu.settle()?;
        vcpu.save(&mut state)?;
        // Where guests read the processor's own TSC (kvm_pvm), theirs is moved by nothing.
        println!("a write to {msr:#x} moves the TSC by {}", after.wrapping_sub(before));

        let (other, mut vcpus, _log) = Machine::new(&host, made, &mapping, false)?;
        let clocks = VmState { tsc_offset: [before, 1], ..VmState::default() };
        other.restore_clocks(&mut vcpus, &clocks)?;
        let vcpu = vcpus.first_mut().context("no vCPU")?;
        vcpu.restore(&state, None)?;
        let child = vcpu.tsc_offset().context("no offset there")?;
        ensure!(child == after, "MSR {msr:#x}: the offset is {child:#x} instead of {after:#x}");
    }
    Ok(())
}

/// A reading of a guest's clocks, and the host's time around it, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Reading {
    host: (u64, u64),
    tsc: u64,
    kvmclock: u64,
}

fn read(rig: &Rig, zero: Instant, uuid: Uuid, vcpu: u32) -> Result<Reading> {
    let now = || u64::try_from(zero.elapsed().as_micros());
    let before = now()?;
    let words = rig.run_on(uuid, vcpu, &[clock(0)])?;
    let after = now()?;
    ensure!(words[1] > 0, "there is no kvmclock");
    ensure!(words[0] <= words[2], "the TSC went backwards");
    Ok(Reading {
        host: (before, after),
        tsc: words[0] * 1000 / rig.tsc_khz,
        kvmclock: words[1] / 1000,
    })
}

impl Reading {
    /// Both guest clocks went on by what the host's did, within the step allowed.
    fn follows(&self, first: &Self, what: &str) -> Result<()> {
        let least = (self.host.0 - first.host.1).saturating_sub(STEP_US);
        let most = self.host.1 - first.host.0 + STEP_US;
        for (clock, before, now) in
            [("the TSC", first.tsc, self.tsc), ("kvmclock", first.kvmclock, self.kvmclock)]
        {
            ensure!(now >= before, "{what}: {clock} went back from {before} to {now} µs");
            let went = now - before;
            ensure!(
                (least..=most).contains(&went),
                "{what}: {clock} went on by {went} µs, the host by {least} to {most}"
            );
        }
        Ok(())
    }
}

/// The standby is old when it is used: a clock left as it was when that was made would be 300 ms
/// late.
fn clocks(vcpus: u32) -> Result<()> {
    let rig = Rig::new(InstanceConfig { vcpus, ..config() })?;
    let zero = Instant::now();
    for vcpu in 0..vcpus {
        let first = read(&rig, zero, rig.root, vcpu)?;
        let mut line = vec![rig.root];
        for depth in 1..=3 {
            std::thread::sleep(Duration::from_millis(300));
            let parent = line[line.len() - 1];
            let before = read(&rig, zero, parent, vcpu)?;
            line.extend(rig.branch(parent, 1)?);
            for (index, uuid) in line.iter().enumerate() {
                let now = read(&rig, zero, *uuid, vcpu)?;
                let what = format!("vCPU {vcpu}, fork {depth}, machine {index}");
                now.follows(&before, &what)?;
                now.follows(&first, &what)?;
            }
        }
        for child in &line[1..] {
            rig.kill(*child)?;
        }
        rig.standbys(1)?;
    }
    Ok(())
}

fn gap() -> Result<()> {
    let rig = Rig::new(config())?;
    let mut gaps = Vec::new();
    for _ in 0..20 {
        rig.standbys(1)?;
        std::thread::sleep(Duration::from_millis(20));
        let seq = rig.begin(rig.root, 0, &[fork(1, 0)])?;
        let parent = Forked::read(&rig.results(rig.root, 0, seq)?, 0)?;
        let child = Forked::read(&rig.results(parent.child, 0, seq)?, 0)?;
        ensure!(parent.tsc_before == child.tsc_before, "not the same moment before the fork");
        for (what, forked) in [("parent", parent), ("child", child)] {
            ensure!(forked.tsc_after > forked.tsc_before, "the {what}'s TSC went backwards");
        }
        let us = |forked: Forked| (forked.tsc_after - forked.tsc_before) * 1000 / rig.tsc_khz;
        gaps.push(us(parent).max(us(child)));
        rig.kill(parent.child)?;
    }
    // The scheduler of a busy machine may delay one of twenty; a clock that steps delays all.
    gaps.sort_unstable();
    ensure!(gaps[17] <= GAP_US, "gaps in µs: {gaps:?}");
    Ok(())
}
