//! Making a standby: a child that lacks nothing but the parent's last changes.
//!
//! ```text
//!   fork(2)ed from the zygote
//!      |  its own zygote is forked off first: same memory, kept for the child's children
//!      |  machine made, base state restored
//!      |  rehearsed: run once to its first exit, then memory and state put back
//!      v
//!   PARKED                  child.rs
//! ```
#![expect(unsafe_code, reason = "fork(2), and giving up inherited descriptors")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::apply::{Applier, PageBits};
use super::child::{Standby, follow};
use super::crew::Crew;
use super::engine::Engine;
use super::link::{self, Link};
use super::rehearse;
use super::shared::{Shared, tell};
use super::step::{ForkCause, ForkError, Step};
use super::zygote::{Embryo, Twin, Womb, Zygote};
use crate::beacon;
use crate::device::generation;
use crate::device::virtio::Bus;
use crate::instance::{Birth, Cradle, Instance, last_words};
use crate::kvm::{Host, Machine, MachineConfig, Vcpu, calls};
use crate::memory::{Image, Mapping, PAGE, RamLayout, Reserve, Sealed};
use crate::proto::InstanceConfig;
use crate::sys::{self, now_ns};

/// Makes a standby and lives its life, in the process that the zygote forked. Returns in another one: the
/// standby's own zygote.
pub(super) fn run(embryo: Embryo) -> (Womb, OwnedFd) {
    let begin = now_ns();
    let Embryo { womb, slot, parent, line } = embryo;
    sys::die_with_parent(true);
    let keep = womb.descriptors(&line);
    // SAFETY: what the zygote had besides is dropped.
    unsafe { sys::close_all_but(&keep) };
    sys::set_process_name("ukp-standby");
    let Womb { host, config, link, image, mapping, owned } = womb;
    let inherited = Inherited { host, config, image, mapping, owned };
    match zygote_of_child(inherited, &link) {
        Ok(Twin::Instance { zygote, womb }) => {
            // An error: the parent has it in the slot; the process has nobody else to tell.
            let code = live(Own { zygote, womb }, link, slot, parent, line, begin).unwrap_or(1);
            std::process::exit(code)
        }
        Ok(Twin::Zygote { womb, line: own }) => {
            // Neither is there any more.
            std::mem::forget((link, line));
            (womb, own)
        }
        Err(error) => {
            tell(&link, slot, &error);
            std::process::exit(1)
        }
    }
}

fn live(
    own: Own,
    link: Link,
    slot: usize,
    parent: Uuid,
    line: OwnedFd,
    begin: u64,
) -> Result<i32, ForkError> {
    let link = Arc::new(link);
    // Open until the error is told: its end tells the parent that there is nothing more to come.
    let mut line = Some(line);
    let prepared = prepare(own, &link, slot, parent, &mut line);
    let (standby, vcpu) = prepared.inspect_err(|error| tell(&link, slot, error))?;
    link.slot(slot).prewarm_ns.store(now_ns() - begin, Ordering::Relaxed);
    // An instance does without its parent's link: nothing here keeps it.
    let weak = Arc::downgrade(&link);
    drop(link);
    let told = |error: &ForkError| weak.upgrade().map(|link| tell(&link, slot, error));
    standby.park_and_go(vcpu).inspect_err(|error| told(error).unwrap_or(()))
}

/// What a standby takes over from its parent's zygote: all but the link.
struct Inherited {
    host: Host,
    config: InstanceConfig,
    image: Option<Image<Sealed>>,
    mapping: Option<Mapping>,
    owned: Option<PageBits>,
}

/// What it has of its own then.
struct Own {
    zygote: Zygote,
    womb: Womb,
}

fn failed<E: Into<ForkCause>>(cause: E) -> ForkError {
    ForkError { step: Step::Prewarm, cause: cause.into() }
}

fn prepare(
    own: Own,
    link: &Arc<Link>,
    slot: usize,
    parent: Uuid,
    line: &mut Option<OwnedFd>,
) -> Result<(Standby, Vcpu), ForkError> {
    // Not before: a page that is written here first is not copied when it counts.
    beacon::role(beacon::Role::Standby);
    let Own { zygote, womb } = own;
    let Womb { host, config, link: own, image, mapping, owned } = womb;
    let (identity, base) = link.read_slot(slot, config.vcpus as usize);
    let (mapping, owned) = mapping.zip(owned).ok_or_else(|| failed(ForkCause::Died))?;
    last_words::parent(link, slot);
    last_words::prepare(mapping.kind()).map_err(failed)?;
    let made = MachineConfig {
        layout: RamLayout::new(config.memory_mib),
        vcpus: config.vcpus,
        dirty: config.dirty,
        ring_entries: config.ring_entries,
    };
    let devices = Bus::of_machine(&config, Uuid::from_bytes(identity.uuid))
        .map_err(|error| failed(error.into_sys()))?;
    let bells = devices.iter().flat_map(Bus::bells);
    let (machine, mut vcpus, log) =
        Machine::with_bells(&host, made, &mapping, true, bells).map_err(failed)?;
    machine.restore_clocks(&mut vcpus, &base.vm).map_err(failed)?;
    machine.restore_irqchips(&base.vm).map_err(failed)?;
    link.populate(link.header().journal_used.load(Ordering::Relaxed) as usize);
    link.populate_fork(config.vcpus as usize);
    let applier = Applier::new(&mapping, owned);
    for page in
        link.header().active_regions().filter(|page| (*page as usize) < mapping.bytes() / PAGE)
    {
        mapping.look(page);
    }
    for page in link.header().hot_pages().filter(|page| (*page as usize) < mapping.bytes() / PAGE) {
        applier.touch(&mapping, page);
    }
    if config.is_linux() {
        // The new generation id goes there.
        applier.touch(&mapping, generation::PAGE_NUMBER);
    }
    let rehearsing = config.rehearse;
    let instance = Instance::assemble(Birth {
        kicks: vcpus.iter_mut().map(Vcpu::kick).collect(),
        config,
        identity,
        parent: Some(parent),
        link: own,
        machine,
        mapping,
        devices,
        zygote,
        engine: Engine::new(log, base.clone()),
    })
    .map_err(failed)?;
    if let Some(image) = image {
        instance.keep_sealed(image);
    }
    let crew =
        Crew::new(applier, Reserve::new(link.header().reserve(), link::MAX_RESERVE as usize));
    let shared = Arc::new(Shared::new(instance.clone(), link.clone(), slot, base, crew));
    let line = line.take().ok_or_else(|| failed(ForkCause::Died))?;
    instance.start_control(Some(Cradle { standby: shared.clone(), line }), None).map_err(failed)?;
    sys::populate_program();
    let mut vcpus = vcpus.into_iter();
    let mut leader = vcpus.next().ok_or_else(|| failed(ForkCause::Died))?;
    for vcpu in vcpus {
        let shared = shared.clone();
        instance.spawn_vcpu(vcpu.index(), move || follow(shared, vcpu)).map_err(failed)?;
    }
    rehearse::run(&mut leader, &shared.base.vcpus[0], rehearsing).map_err(failed)?;
    shared.meeting.wait();
    for page in rehearse::roll_back(&instance, &shared.base.vm).map_err(failed)? {
        shared.crew.applier().note(page);
    }
    shared.meeting.wait();
    if instance.vcpus() > 1 {
        // The rehearsal of another vCPU may have sent it an interrupt.
        rehearse::put_back(&mut leader, &shared.base.vcpus[0]).map_err(failed)?;
    }
    calls::make_room();
    Ok((Standby::new(shared), leader))
}

/// Forks the zygote of this standby before anything in it belongs to KVM.
fn zygote_of_child(inherited: Inherited, parent: &Link) -> Result<Twin, ForkError> {
    let at = ForkError::at::<sys::SysError>;
    parent.header().fault.check(Step::Prewarm)?;
    // Before there is a second thread: without a handler the signal ends the process.
    sys::install_kick_handler().map_err(failed)?;
    let Inherited { host, mut config, image, mapping, owned } = inherited;
    config.standbys = config.child_standbys;
    config.ring_entries = config.child_ring_entries;
    let link =
        Link::new(link::capacity(config.ring_entries, config.vcpus)).map_err(at(Step::Prewarm))?;
    // Otherwise the links of all ancestors would be mapped in each generation.
    parent.keep_from_children();
    // What its parent writes again and again it is likely to write too.
    link.header().set_hot_pages(parent.header().hot_pages());
    link.header().note_filled(u32::try_from(parent.header().reserve()).unwrap_or(0));
    let womb = Womb { host, config, link, image, mapping, owned };
    // SAFETY: this process was forked from a zygote and has not started a thread.
    unsafe { Zygote::fork(womb) }.map_err(at(Step::Prewarm))
}
