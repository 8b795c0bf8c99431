//! One instance: the VMM process around one machine.
//!
//! Threads: one per vCPU (`vcpu.rs`), and one control thread (`control.rs`) that talks to the owner
//! and keeps standbys ready. A root instance is booted (`root.rs`); every other one comes out of a
//! standby.

mod control;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod gate;
mod haste;
pub(crate) mod last_words;
mod root;
mod vcpu;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use guest_abi::param::STEPS;
use rustix::process::Pid;
use uuid::Uuid;

pub use control::Cradle;
pub use gate::{Gate, Stopped};
pub use last_words::POOL_EMPTY;
pub use root::{READY, run_root};
pub(crate) use vcpu::Action;

use crate::beacon;
use crate::device::{Answer, Serial, generation, virtio};
use crate::fork::{Engine, Identity, Link, Step, Zygote};
use crate::kvm::{Kick, Machine};
use crate::memory::{
    GuestRam, Image, Mapping, MemoryError, RamLayout, Sealed, Writable, guest_ram,
};
use crate::proto::{Event, InstanceConfig};
use crate::sys::{self, CpuSet, SysError};

/// Stack of a vCPU thread: its frames are small, and a thousand children have one each.
const VCPU_STACK: usize = 128 * 1024;

/// Stack of the devices' thread.
const DEVICE_STACK: usize = 256 * 1024;

/// Bytes of console output in one message.
const CONSOLE_CHUNK: usize = 4096;
/// Messages that wait for the owner before console output is dropped.
const OUTBOX: usize = 1024;

/// What an instance is assembled from.
#[derive(Debug)]
pub struct Birth {
    /// Its configuration.
    pub config: InstanceConfig,
    /// Who it is.
    pub identity: Identity,
    /// Its parent.
    pub parent: Option<Uuid>,
    /// Its link to its own children.
    pub link: Link,
    /// Its machine.
    pub machine: Machine,
    /// Its memory.
    pub mapping: Mapping,
    /// Its virtio devices, if it runs Linux.
    pub devices: Option<virtio::Bus>,
    /// Handles to stop its vCPUs.
    pub kicks: Vec<Kick>,
    /// Its zygote.
    pub zygote: Zygote,
    /// Its engine.
    pub engine: Engine,
}

/// The image of a root that has not been armed.
#[derive(Debug)]
struct Unarmed {
    image: Image<Writable>,
    /// The root's memory is a private mapping of it already: nobody writes to the image any more.
    private: bool,
}

/// An instance, shared by its threads.
#[derive(Debug)]
pub struct Instance {
    config: InstanceConfig,
    identity: Identity,
    parent: Option<Uuid>,
    // Dropped before the mapping that they refer to.
    ram: GuestRam,
    machine: Machine,
    mapping: Mapping,
    link: Link,
    gate: Gate,
    engine: Mutex<Engine>,
    /// The root's image, until it is sealed.
    image: Mutex<Option<Unarmed>>,
    /// The sealed image, once the instance is armed.
    sealed: OnceLock<Image<Sealed>>,
    /// Taken by the control thread.
    zygote: Mutex<Option<Zygote>>,
    zygote_pid: AtomicI32,
    serial: Serial,
    /// Of a Linux guest.
    devices: Option<virtio::Bus>,
    /// Per vCPU.
    answers: Box<[Mutex<Answer>]>,
    vcpus: usize,
    outbox: Mutex<VecDeque<Event>>,
    console_lost: AtomicU64,
    /// This process is an instance of its own right, not a standby.
    alive: AtomicBool,
    ready: AtomicBool,
    exit_code: AtomicI32,
    /// It can fork. Children are born so.
    armed: AtomicBool,
    standby_cpus: u64,
    /// Processors that this process may use, as whoever started its tree chose.
    all_cpus: Option<CpuSet>,
    /// Futex: changes when the control thread has done something that a waiting fork waits for.
    news: AtomicU32,
}

impl Instance {
    /// Puts the parts together.
    ///
    /// # Errors
    ///
    /// If mapping and configuration do not fit.
    pub fn assemble(birth: Birth) -> Result<Arc<Self>, MemoryError> {
        let layout = RamLayout::new(birth.config.memory_mib);
        let ram = guest_ram(&birth.mapping, &layout)?;
        let standby_cpus = match birth.config.standby_cpus {
            0 => sys::affinity(),
            mask => mask,
        };
        let vcpus = birth.kicks.len();
        haste::prepare();
        beacon::guest(&birth.mapping);
        Ok(Arc::new(Self {
            ram,
            gate: Gate::new(birth.kicks.into_iter()),
            standby_cpus,
            // Of a standby, too: its zygote has never chosen any.
            all_cpus: sys::all_affinity(),
            config: birth.config,
            identity: birth.identity,
            parent: birth.parent,
            machine: birth.machine,
            mapping: birth.mapping,
            link: birth.link,
            engine: Mutex::new(birth.engine),
            sealed: OnceLock::new(),
            zygote_pid: AtomicI32::new(birth.zygote.pid().as_raw_nonzero().get()),
            zygote: Mutex::new(Some(birth.zygote)),
            image: Mutex::new(None),
            serial: Serial::default(),
            devices: birth.devices,
            answers: std::iter::repeat_with(Mutex::default).take(vcpus).collect(),
            vcpus,
            outbox: Mutex::default(),
            console_lost: AtomicU64::new(0),
            alive: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            exit_code: AtomicI32::new(0),
            armed: AtomicBool::new(birth.parent.is_some()),
            news: AtomicU32::new(0),
        }))
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &InstanceConfig {
        &self.config
    }

    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its UUID.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        Uuid::from_bytes(self.identity.uuid)
    }

    /// The memory that it shares with its zygote and standbys.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Its machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its memory.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Its memory by guest address.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Its serial line.
    #[must_use]
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// Its virtio devices, if it runs Linux.
    #[must_use]
    pub fn devices(&self) -> Option<&virtio::Bus> {
        self.devices.as_ref()
    }

    /// Waits until its devices are at rest, and keeps them there. Its vCPUs have stopped.
    pub fn quiet_devices(&self) -> Option<virtio::Quiet<'_>> {
        self.devices.as_ref().map(virtio::Bus::quiesce)
    }

    /// The gate of its vCPUs.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// The engine. Held for short steps only: a fork waits for it.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, if nobody else has it.
    pub fn try_engine(&self) -> Option<MutexGuard<'_, Engine>> {
        match self.engine.try_lock() {
            Ok(engine) => Some(engine),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Process of its zygote.
    #[must_use]
    pub fn zygote_pid(&self) -> Option<Pid> {
        Pid::from_raw(self.zygote_pid.load(Ordering::Relaxed))
    }

    /// Its zygote is another one now.
    pub fn set_zygote_pid(&self, pid: Pid) {
        self.zygote_pid.store(pid.as_raw_nonzero().get(), Ordering::Relaxed);
    }

    /// The sealed image, once the instance is armed.
    #[must_use]
    pub fn sealed(&self) -> Option<&Image<Sealed>> {
        self.sealed.get()
    }

    /// Keeps the sealed image, from which a lost zygote is raised again.
    pub fn keep_sealed(&self, image: Image<Sealed>) {
        // There is only one sealed image in the life of an instance.
        self.sealed.get_or_init(|| image);
    }

    fn keep_image(&self, image: Unarmed) {
        *self.image.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
    }

    fn take_image(&self) -> Option<Unarmed> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether it can fork; a root cannot from the beginning.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::SeqCst)
    }

    fn take_zygote(&self) -> Option<Zygote> {
        self.zygote.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Sets what the guest reads at the doorbell with vCPU `vcpu`.
    pub fn set_answer(&self, vcpu: usize, answer: Answer) {
        if let Some(mut place) = self.answer(vcpu) {
            *place = answer;
        }
    }

    /// Ends the uncertainty of the answer that vCPU `vcpu` got to its fork.
    pub fn conclude_answer(&self, vcpu: usize, failed: Option<(Step, i32)>) {
        let failed = failed.map(|(step, errno)| Answer::failed(&self.identity, errno, step as u32));
        if let Some(mut answer) = self.answer(vcpu) {
            answer.conclude(failed);
        }
    }

    fn answer(&self, vcpu: usize) -> Option<MutexGuard<'_, Answer>> {
        Some(self.answers.get(vcpu)?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on this process lives for itself.
    pub fn come_alive(&self) {
        self.alive.store(true, Ordering::SeqCst);
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    /// Has the control thread send `event` to the owner.
    pub fn post(&self, event: Event) {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        self.link.ring();
    }

    /// Whether the owner reads more slowly than the guest has things to say.
    fn is_outbox_full(&self) -> bool {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner).len() >= OUTBOX
    }

    /// Console output for the owner. The guest can write faster than the owner reads: what is too
    /// much is dropped, and the owner is told.
    fn post_console(&self, bytes: &[u8]) {
        let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        // A message has a greatest length, what a driver gives at once need not.
        for bytes in bytes.chunks(CONSOLE_CHUNK) {
            let full = outbox.len() >= OUTBOX;
            match outbox.back_mut() {
                Some(Event::Console { bytes: last }) if last.len() < CONSOLE_CHUNK => {
                    last.extend_from_slice(bytes);
                }
                _ if full => {
                    self.console_lost.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                _ => outbox.push_back(Event::Console { bytes: bytes.into() }),
            }
        }
        drop(outbox);
        self.link.ring();
    }

    fn take_events(&self) -> VecDeque<Event> {
        let lost = self.console_lost.swap(0, Ordering::Relaxed);
        let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events = std::mem::take(&mut *outbox);
        if lost > 0 {
            events.push_back(Event::Note {
                text: format!("{lost} bytes of console output were lost"),
            });
        }
        events
    }

    /// Puts the generation id of this instance where its guest's ACPI tables say that it is.
    ///
    /// # Errors
    ///
    /// If guest memory ends before that.
    pub fn write_generation(&self) -> Result<(), SysError> {
        if !self.config.is_linux() {
            return Ok(());
        }
        generation::write(&self.ram, &self.identity.vm_generation).map_err(|_| SysError {
            call: "writing the generation id",
            source: std::io::ErrorKind::InvalidInput.into(),
        })
    }

    /// Has the guest look at its generation id. Its vCPUs have their state.
    pub fn tell_of_generation(&self) {
        if self.config.is_linux() {
            // It cannot fail for a line that the interrupt controllers have.
            self.machine.pulse(generation::EVENT_GSI).unwrap_or(());
        }
    }

    /// Ends the instance: all vCPU threads return, the control thread says goodbye.
    pub fn exit(&self, code: i32, reason: Option<String>) {
        self.exit_code.store(code, Ordering::SeqCst);
        self.post(Event::Exited { code, reason });
        self.gate.quit();
    }

    /// Starts the thread of a vCPU.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if there are too many threads.
    pub fn spawn_vcpu(
        &self,
        index: u32,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), SysError> {
        std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(VCPU_STACK)
            .spawn(run)
            .map(drop)
            .map_err(|source| SysError { call: "starting a vCPU thread", source })
    }

    /// Starts the devices of an instance that lives.
    fn start_devices(self: &Arc<Self>) {
        let Some(devices) = &self.devices else { return };
        for error in devices.open() {
            self.post(Event::Note { text: sys::chain(&error) });
        }
        let instance = self.clone();
        let run = move || {
            let Some(devices) = &instance.devices else { return };
            devices.run(&instance.ram, &*instance, || instance.gate.quitting());
        };
        let thread = std::thread::Builder::new().name("devices".into()).stack_size(DEVICE_STACK);
        if let Err(error) = thread.spawn(run) {
            let text = format!("the guest has no devices: {error}");
            self.post(Event::Note { text });
        }
    }

    /// Processors that standbys may run on (bit n: processor n, of the first 64).
    #[must_use]
    pub fn standby_cpus(&self) -> u64 {
        self.standby_cpus
    }

    /// Number of processors for standbys besides `avoid` (1 + the processor).
    #[must_use]
    pub fn spare_cpus(&self, avoid: u32) -> usize {
        (self.standby_cpus & !bit(avoid)).count_ones() as usize
    }

    /// Prepares the calling thread for the critical moments of a standby: real-time priority where
    /// it is allowed, and the processors that the configuration names.
    /// `avoid` is 1 + a processor to keep away from. Tells whether it has the priority; without
    /// permission the thread stays as it is, and `runtime doctor` tells.
    pub fn prepare_thread(&self, avoid: u32) -> bool {
        sys::populate_stack();
        let cpus = match self.standby_cpus & !bit(avoid) {
            0 => self.standby_cpus,
            cpus => cpus,
        };
        // A mask that names no processor of this host is reported by the root instance.
        sys::set_affinity(cpus).unwrap_or(());
        self.config.realtime && haste::take()
    }

    /// Before a thread so prepared enters the guest.
    pub fn renew_priority(&self) {
        haste::renew();
    }

    /// Undoes [`Instance::prepare_thread`]: from here on the thread runs the guest like any other.
    pub fn settle_thread(&self) {
        if self.config.realtime {
            haste::give_back();
        }
        let set = match (self.config.vcpu_cpus, &self.all_cpus) {
            // Not simply all: taskset(1) or a service manager may have chosen some.
            (0, Some(all)) => sys::set_affinity_to(all),
            (0, None) => sys::set_affinity(u64::MAX),
            (chosen, _) => sys::set_affinity(chosen),
        };
        // A mask that names no processor of this host leaves the thread where it is.
        set.unwrap_or(());
    }
}

impl virtio::Outside for Instance {
    fn raise(&self, gsi: u32) {
        // It cannot fail for a line that the interrupt controllers have.
        self.machine.pulse(gsi).unwrap_or(());
    }

    fn say(&self, bytes: &[u8]) {
        self.serial.overhear(bytes);
        self.post_console(bytes);
    }
}

/// The bit of a processor given as 1 + its number; none for 0.
fn bit(cpu: u32) -> u64 {
    1_u64.checked_shl(cpu.wrapping_sub(1)).unwrap_or(0)
}

/// Most steps of a program, for checks at the edge.
pub const MAX_STEPS: usize = STEPS;
