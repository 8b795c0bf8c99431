//! The root of a tree of instances: booted instead of forked.
#![expect(unsafe_code, reason = "fork(2)")]

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::net::RecvFlags;
use uuid::Uuid;

use super::vcpu::Action;
use super::{Birth, Instance, Unarmed, last_words};
use crate::beacon;
use crate::boot::linux::{self, Linux};
use crate::boot::{self, BootError};
use crate::device::virtio::{Bus, DeviceError};
use crate::fork::{
    Base, Engine, ForkCause, ForkError, Identity, Keeper, Link, MAX_VCPUS, Step, Twin, Womb,
    Zygote, capacity, live,
};
use crate::kvm::{Host, KvmError, Machine, MachineConfig, Vcpu, VcpuState, VmState};
use crate::memory::{BackingKind, Image, MemoryError, RamLayout, Unsealed, Writable};
use crate::proto::{Envelope, Event, InstanceConfig, MAX_MESSAGE, Request};
use crate::sys::{self, SysError, chain};

/// The first message of a root.
pub const READY: &[u8] = b"ready";

/// Why a root instance could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The guest is not one.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The configuration makes no sense.
    #[error("{what} is {value}, it must be between {least} and {most}")]
    Config {
        /// What.
        what: &'static str,
        /// What it is.
        value: u64,
        /// Least value.
        least: u64,
        /// Greatest value.
        most: u64,
    },
    /// The owner said something else than it should.
    #[error("the owner did not send a configuration")]
    Owner,
}

/// Runs a root instance in this process, which has one thread and whose descriptor 3 is connected
/// to the owner. Returns its exit code.
#[must_use]
pub fn run_root(owner: &OwnedFd) -> i32 {
    sys::set_process_name("ukp-instance");
    // Before zygote and standbys, which inherit it.
    sys::open_to_its_own();
    match start(owner) {
        Ok(code) => code,
        Err(error) => {
            let event = Event::Exited { code: 1, reason: Some(chain(&error)) };
            if let Ok(bytes) = serde_json::to_vec(&event) {
                sys::send(owner, &bytes, &[]).unwrap_or(());
            }
            1
        }
    }
}

fn start(owner: &OwnedFd) -> Result<i32, StartError> {
    // Whoever waits for it sees a process that is this program, and has forked nothing yet.
    sys::send(owner, READY, &[])?;
    let config = receive_config(owner)?;
    check(&config)?;
    let host = Host::open()?;
    let link = Link::new(capacity(config.ring_entries, config.vcpus))?;
    let womb = Womb { host, config, link, image: None, mapping: None, owned: None };
    sys::reap_children_automatically();
    // SAFETY: this process has not started a thread yet.
    let (zygote, womb) = match unsafe { Zygote::fork(womb) }? {
        Twin::Instance { zygote, womb } => (zygote, womb),
        Twin::Zygote { womb, line } => live(womb, line),
    };
    beacon::role(beacon::Role::Parent);
    let Womb { host, mut config, link, .. } = womb;
    let layout = RamLayout::new(config.memory_mib);
    let (image, note) = image(config.backing, layout.bytes())?;
    config.backing = image.kind();
    last_words::prepare(image.kind())?;
    let mapping = image.map_shared()?;
    let machine_config = MachineConfig {
        layout,
        vcpus: config.vcpus,
        dirty: config.dirty,
        ring_entries: config.ring_entries,
    };
    let identity = Identity::new().map_err(|_| SysError::last("getrandom"))?;
    let devices = Bus::of_machine(&config, Uuid::from_bytes(identity.uuid))?;
    let bells = devices.iter().flat_map(Bus::bells);
    let (machine, mut vcpus, log) =
        Machine::with_bells(&host, machine_config, &mapping, false, bells)?;
    let mut base = Base { vm: VmState::default(), vcpus: vec![VcpuState::default(); vcpus.len()] };
    sys::install_kick_handler()?;
    let kicks = vcpus.iter_mut().map(Vcpu::kick).collect();
    if let Some(boot) = vcpus.first() {
        machine.save(boot, &mut base.vm)?;
    }
    let instance = Instance::assemble(Birth {
        config,
        identity,
        parent: None,
        link,
        machine,
        mapping,
        devices,
        kicks,
        zygote,
        engine: Engine::new(log, base),
    })?;
    instance.keep_image(Unarmed { image, private: false });
    load_guest(&instance, layout, &mut vcpus)?;
    for vcpu in &mut vcpus {
        // A fork finds registers where KVM leaves them at an exit. One may be asked for before this
        // vCPU has run, so it makes an exit now.
        vcpu.warm_up()?;
    }
    instance.come_alive();
    if let Some(text) = note {
        instance.post(Event::Note { text });
    }
    let line = owner.try_clone().map_err(|source| SysError { call: "dup", source })?;
    instance.start_control(None, Some(line))?;
    let mut vcpus = vcpus.into_iter();
    let leader = vcpus.next();
    for vcpu in vcpus {
        let shared = instance.clone();
        instance.spawn_vcpu(vcpu.index(), move || {
            shared.settle_thread();
            shared.gate().enter(vcpu.index() as usize);
            shared.run_vcpu(vcpu, Action::Continue);
        })?;
    }
    let Some(leader) = leader else { return Ok(1) };
    instance.settle_thread();
    instance.gate().enter(0);
    instance.run_leader(leader, Action::Continue)
}

/// Puts the guest into memory, and its vCPUs to its beginning.
fn load_guest(instance: &Instance, layout: RamLayout, vcpus: &mut [Vcpu]) -> Result<(), BootError> {
    let (config, ram) = (instance.config(), instance.ram());
    if config.is_linux() {
        let InstanceConfig { kernel, initrd, initrd_tail, cmdline, .. } = config;
        let devices = instance.devices().map_or(0, Bus::devices);
        let linux = Linux { kernel, initrd, initrd_tail, cmdline, devices };
        let entry = linux::load(&linux, ram, &layout, config.vcpus)?;
        instance.machine().mask_pics()?;
        instance.write_generation()?;
        return vcpus.iter_mut().try_for_each(|vcpu| linux::start(vcpu, entry));
    }
    let guest = if config.bare.as_os_str().is_empty() {
        boot::EMBEDDED.to_vec()
    } else {
        std::fs::read(&config.bare)
            .map_err(|source| BootError::Read { path: config.bare.display().to_string(), source })?
    };
    let loaded = boot::load(&guest, ram, &layout)?;
    let khz = vcpus.first().map_or(Ok(0), Vcpu::tsc_khz)?;
    boot::prepare(ram, &layout, &loaded, config.vcpus, khz)?;
    vcpus.iter_mut().try_for_each(|vcpu| boot::start(vcpu, &loaded))
}

fn receive_config(owner: &OwnedFd) -> Result<InstanceConfig, StartError> {
    let message = sys::receive_whole(owner, MAX_MESSAGE, RecvFlags::empty())?;
    match serde_json::from_slice::<Envelope>(&message) {
        Ok(Envelope { request: Request::Start(config), .. }) => Ok(*config),
        _ => Err(StartError::Owner),
    }
}

fn check(config: &InstanceConfig) -> Result<(), StartError> {
    let ring = u64::from(config.ring_entries);
    let child_ring = u64::from(config.child_ring_entries);
    for (what, value, least, most) in [
        (
            "memory_mib",
            config.memory_mib.into(),
            RamLayout::MIN_MIB.into(),
            RamLayout::MAX_MIB.into(),
        ),
        ("vcpus", config.vcpus.into(), 1, MAX_VCPUS as u64),
        ("ring_entries", ring, 1024, 65536),
        ("child_ring_entries", child_ring, 1024, 65536),
        ("standbys", config.standbys.into(), 0, 128),
        ("child_standbys", config.child_standbys.into(), 0, 128),
    ] {
        if !(least..=most).contains(&value) {
            return Err(StartError::Config { what, value, least, most });
        }
    }
    for (what, value) in [("ring_entries", ring), ("child_ring_entries", child_ring)] {
        if !value.is_power_of_two() {
            let (least, most) = (value.next_power_of_two() / 2, value.next_power_of_two());
            return Err(StartError::Config { what, value, least, most });
        }
    }
    Ok(())
}

/// An image of the backing asked for, or of the ordinary one with a line that says why.
fn image(kind: BackingKind, bytes: u64) -> Result<(Image<Writable>, Option<String>), MemoryError> {
    match Image::new(kind, bytes) {
        Ok(image) => Ok((image, None)),
        Err(error) if kind != BackingKind::Small => {
            let image = Image::new(BackingKind::Small, bytes)?;
            Ok((image, Some(format!("{}; using 4 KiB pages instead", chain(&error)))))
        }
        Err(error) => Err(error),
    }
}

/// Makes a root forkable; tells whether it was not before. Children are born armed.
///
/// What has been done before a step fails is kept or undone, so that the guest runs on as before and
/// the next call can succeed: a pool of huge pages that is empty now need not be later.
pub(super) fn arm(instance: &Instance, keeper: &mut Keeper) -> Result<bool, ForkError> {
    let at = |cause: ForkCause| ForkError { step: Step::Arm, cause };
    if instance.is_armed() {
        return Ok(false);
    }
    instance.link().header().fault.check(Step::Arm)?;
    let stopped = instance
        .gate()
        .stop(None, std::time::Duration::from_secs(1))
        .ok_or_else(|| at(ForkCause::Timeout { waited_ms: 1000 }))?;
    // What a device writes while the mapping is replaced would be lost.
    let devices = instance.quiet_devices();
    let armed = make_forkable(instance, keeper);
    drop(devices);
    drop(stopped);
    armed.map_err(at)?;
    instance.armed.store(true, Ordering::SeqCst);
    Ok(true)
}

/// With all vCPUs stopped.
fn make_forkable(instance: &Instance, keeper: &mut Keeper) -> Result<(), ForkCause> {
    let fresh = seal(instance)?;
    let sealed = instance.sealed().ok_or(ForkCause::Died)?;
    match keeper.zygote().adopt(sealed) {
        // The keeper raises another one when it needs it.
        Ok(()) | Err(ForkCause::ZygoteGone) => {}
        Err(cause) => return Err(cause),
    }
    // What the guest wrote since a step failed an earlier time, its zygote has not.
    let pages = if fresh { Vec::new() } else { instance.mapping().private_pages()? };
    // Last: while pages are logged and nobody harvests, the ring fills up and the guest stands still.
    // Nothing is lost before, because no vCPU runs.
    let tracked = instance.machine().track(instance.mapping(), true).map_err(ForkCause::from);
    tracked.and_then(|()| instance.engine().arm(instance, pages)).inspect_err(|_| {
        // If this fails too, a ring that fills up is emptied for nothing, see `Engine::drain`.
        instance.machine().track(instance.mapping(), false).unwrap_or(());
    })
}

/// Makes the memory of this instance private, and its image what it was until now, for ever. Tells
/// whether all of it was done now: no page differs from the image then.
fn seal(instance: &Instance) -> Result<bool, ForkCause> {
    let Some(Unarmed { image, private }) = instance.take_image() else { return Ok(false) };
    if !private && let Err(error) = instance.mapping().make_private(image.file()) {
        instance.keep_image(Unarmed { image, private });
        return Err(error.into());
    }
    match image.seal() {
        Ok(sealed) => {
            instance.keep_sealed(sealed);
            Ok(!private)
        }
        Err(Unsealed { image, error }) => {
            instance.keep_image(Unarmed { image, private: true });
            Err(error.into())
        }
    }
}
