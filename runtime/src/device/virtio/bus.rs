//! The devices of a machine: where they lie in guest memory, their locks, and their thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Ask, Console, Device, DeviceError, Done, Outside, Registers, Ring, Rng, Transport, Typed,
    Vsock, Work, Wrote,
};
use crate::memory::GuestRam;
use crate::proto::InstanceConfig;
use crate::sys::{SysError, now_ns};

/// Most devices.
const SLOTS: usize = 4;
/// Address of the first device, in the hole below 4 GiB.
const FIRST_ADDRESS: u32 = 0xd000_0000;
/// Bytes from one device to the next.
const WINDOW: u32 = 0x1000;
/// Interrupt line of the first device.
const FIRST_GSI: u32 = 5;

/// Where the guest finds a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Number of the device.
    pub index: u32,
    /// Address of its registers.
    pub start: u32,
    /// Their length in bytes.
    pub bytes: u32,
    /// Its interrupt line: an edge for each interrupt.
    pub gsi: u32,
}

/// Windows of the first `devices` devices.
pub fn windows(devices: usize) -> impl Iterator<Item = Window> {
    (0..).take(devices.min(SLOTS)).map(|index| Window {
        index,
        start: FIRST_ADDRESS + index * WINDOW,
        bytes: WINDOW,
        gsi: FIRST_GSI + index,
    })
}

/// The registers of all devices, as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Saved {
    slots: [Registers; SLOTS],
}

/// The devices of a machine.
#[derive(Debug)]
pub struct Bus {
    slots: Vec<Slot>,
    /// Written when a device was kicked.
    bell: Arc<EventFd>,
    /// Until the devices' thread takes it. Made with the machine: a child's is there before it lives.
    ring: Mutex<Option<Ring>>,
    /// What was typed on its console, if it has one.
    typed: Option<(usize, Typed)>,
    /// Held by whoever wants all slots, so that the devices' thread cannot take one after the other
    /// in front of it.
    turn: Mutex<()>,
}

#[derive(Debug)]
struct Slot {
    window: Window,
    /// The guest has notified it since it last looked at its queues.
    kicked: AtomicBool,
    /// The parent's interrupt is to be repeated.
    repeats: AtomicBool,
    /// Written by KVM when the guest notifies it. `None`: the vCPU does its work, see
    /// [`Device::is_prompt`].
    bell: Option<Arc<EventFd>>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    transport: Transport,
    device: Box<dyn Device>,
}

/// All devices, at rest: no buffer is half used, and none will be for as long as this is held.
#[derive(Debug)]
#[must_use]
pub struct Quiet<'a> {
    slots: [Option<MutexGuard<'a, Inner>>; SLOTS],
    _turn: MutexGuard<'a, ()>,
}

impl Bus {
    /// The devices of instance `uuid`, if it runs Linux.
    ///
    /// # Errors
    ///
    /// A folder for sockets with a path that is too long; `EMFILE`.
    pub fn of_machine(config: &InstanceConfig, uuid: Uuid) -> Result<Option<Self>, DeviceError> {
        if !config.is_linux() {
            return Ok(None);
        }
        let typed = Typed::default();
        let console = Console::new(typed.clone());
        let mut devices: Vec<Box<dyn Device>> = vec![Box::<Rng>::default(), Box::new(console)];
        if config.has_vsock() {
            devices.push(Box::new(Vsock::new(&config.vsock, uuid)?));
        }
        let bus = Self::of(devices.into_iter())?;
        Ok(Some(Self { typed: Some((1, typed)), ..bus }))
    }

    /// How many devices that would be.
    #[must_use]
    pub fn devices_of(config: &InstanceConfig) -> usize {
        2 * usize::from(config.is_linux()) + usize::from(config.has_vsock())
    }

    /// Where the guest writes to notify a device, and what KVM is to do then instead of leaving it.
    pub fn bells(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        let at = |slot: &Slot| u64::from(slot.window.start + VIRTIO_MMIO_QUEUE_NOTIFY);
        self.slots.iter().filter_map(move |slot| Some((at(slot), &**slot.bell.as_ref()?)))
    }

    /// How many devices there are.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn of(devices: impl Iterator<Item = Box<dyn Device>>) -> Result<Self, DeviceError> {
        // The ring waits for one that blocks alone.
        let bell = || -> Result<_, SysError> {
            let bell = EventFd::new(libc::EFD_CLOEXEC);
            Ok(Arc::new(bell.map_err(|source| SysError { call: "eventfd", source })?))
        };
        let slot = |(device, window): (Box<dyn Device>, Window)| {
            let invalid = std::io::ErrorKind::InvalidInput;
            let transport = Transport::new(device.describe())
                .map_err(|_| SysError { call: "making a device", source: invalid.into() })?;
            Ok(Slot {
                window,
                bell: if device.is_prompt() { None } else { Some(bell()?) },
                kicked: AtomicBool::new(false),
                repeats: AtomicBool::new(false),
                inner: Mutex::new(Inner { transport, device }),
            })
        };
        let slots = devices.zip(windows(SLOTS)).map(slot).collect::<Result<_, SysError>>()?;
        let ring = Mutex::new(Some(Ring::new().map_err(DeviceError::Ring)?));
        Ok(Self { slots, bell: bell()?, ring, typed: None, turn: Mutex::new(()) })
    }

    /// The guest reads at `address`, where the machine has no memory.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((slot, offset)) => slot.lock().transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes at `address`, where the machine has no memory.
    pub fn write(&self, address: u64, data: &[u8], ram: &GuestRam, outside: &dyn Outside) {
        let Some((slot, offset)) = self.find(address) else { return };
        // The one register that is written all the time does not wait for the device.
        if offset == u64::from(VIRTIO_MMIO_QUEUE_NOTIFY) {
            if slot.bell.is_none() {
                self.work_promptly(slot, ram, outside);
            } else {
                self.kick(slot);
            }
            return;
        }
        let mut inner = slot.lock();
        match inner.transport.write(offset, data, ram) {
            Wrote::Nothing => {}
            Wrote::Started => self.kick(slot),
            Wrote::Reset => inner.device.reset(),
        }
    }

    /// Works on behalf of the devices' thread.
    fn work_promptly(&self, slot: &Slot, ram: &GuestRam, outside: &dyn Outside) {
        let work = self.work(slot, ram, outside);
        if work.more || work.at_ns.is_some() {
            self.kick(slot);
        }
    }

    /// Types on the guest's console; returns how many bytes there was room for.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let Some((slot, typed)) = &self.typed else { return 0 };
        let taken = typed.add(bytes);
        if let Some(slot) = self.slots.get(*slot) {
            self.kick(slot);
        }
        taken
    }

    fn find(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(FIRST_ADDRESS.into())?;
        let index = usize::try_from(offset / u64::from(WINDOW)).ok()?;
        Some((self.slots.get(index)?, offset % u64::from(WINDOW)))
    }

    fn kick(&self, slot: &Slot) {
        // Once is enough: the devices' thread has not looked since.
        if !slot.kicked.swap(true, Ordering::SeqCst) {
            self.ring();
        }
    }

    fn ring(&self) {
        // It neither fails nor blocks before it was written 2^64 times and not read.
        self.bell.write(1).unwrap_or(());
    }

    /// Waits until all devices are at rest. The vCPUs have stopped: none of them is waiting for a
    /// device, or will.
    pub fn quiesce(&self) -> Quiet<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = std::array::from_fn(|index| self.slots.get(index).map(Slot::lock));
        Quiet { slots, _turn: turn }
    }

    /// In a child that is about to live: the devices are the parent's, and have yet to look at their
    /// queues.
    pub fn restore(&self, saved: &Saved, ram: &GuestRam) {
        for (slot, registers) in self.slots.iter().zip(&saved.slots) {
            let mut inner = slot.lock();
            if inner.transport.restore(registers, ram).is_err() {
                inner.transport.give_up();
            }
            inner.device.reborn();
            slot.repeats.store(inner.transport.is_interrupting(), Ordering::SeqCst);
            slot.kicked.store(true, Ordering::SeqCst);
        }
    }

    /// Has the devices make what they need of the host. What the host refuses, they do without.
    pub fn open(&self) -> Vec<DeviceError> {
        self.slots.iter().filter_map(|slot| slot.lock().device.open().err()).collect()
    }

    /// The instance ends: nothing of the devices stays in the host's file systems.
    pub fn close(&self) {
        for slot in &self.slots {
            slot.lock().device.close();
        }
    }

    /// The devices' thread: works until `over`.
    pub fn run(&self, ram: &GuestRam, outside: &dyn Outside, over: impl Fn() -> bool) {
        // There is one such thread.
        let Some(mut turns) = self.turns() else { return };
        while !over() {
            let next = self.let_work(&mut turns, ram, outside);
            self.hear(&mut turns, next);
        }
    }

    /// What the devices' thread needs; `None` but for the first who asks.
    pub(super) fn turns(&self) -> Option<Turns> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        // Those of the devices, and the one that the rest of the process rings.
        let bells = self.slots.iter().map(|slot| slot.bell.clone());
        let bells: Vec<_> = bells.chain([Some(self.bell.clone())]).collect();
        let (rang, alarms) = ((0..bells.len()).collect(), vec![None; self.slots.len()]);
        Some(Turns { ring, bells, rang, asks: Vec::new(), alarms })
    }

    /// Lets every device work that has something to do; returns when one of them has again, 0: now.
    pub(super) fn let_work(
        &self,
        turns: &mut Turns,
        ram: &GuestRam,
        outside: &dyn Outside,
    ) -> Option<u64> {
        let now = now_ns();
        for (index, (slot, alarm)) in self.slots.iter().zip(&mut turns.alarms).enumerate() {
            let due = alarm.is_some_and(|at| at <= now);
            if slot.kicked.swap(false, Ordering::SeqCst) || due {
                let work = self.work(slot, ram, outside);
                slot.kicked.fetch_or(work.more, Ordering::SeqCst);
                *alarm = work.at_ns;
                self.take_turn(slot).device.asks(&mut turns.asks);
                turns.asks.drain(..).for_each(|ask| turns.ring.ask(index, ask));
            }
        }
        let again = self.slots.iter().any(|slot| slot.kicked.load(Ordering::SeqCst));
        if again { Some(0) } else { turns.alarms.iter().flatten().min().copied() }
    }

    /// Waits until the host has done something, or until `next`.
    pub(super) fn hear(&self, turns: &mut Turns, next: Option<u64>) {
        let Turns { ring, bells, rang, .. } = turns;
        for index in rang.drain(..) {
            if let Some(Some(bell)) = bells.get(index) {
                ring.ask(index, Ask::Ring { bell: bell.clone() });
            }
        }
        ring.turn(next, |index, done| {
            if let Some(slot) = self.slots.get(index) {
                slot.kicked.store(true, Ordering::SeqCst);
            }
            match (self.slots.get(index), done) {
                (_, Done::Rang) => rang.push(index),
                (Some(slot), done) => self.take_turn(slot).device.done(done),
                (None, _) => {}
            }
        });
    }

    /// A slot's lock, after whoever wants all slots.
    fn take_turn<'a>(&'a self, slot: &'a Slot) -> MutexGuard<'a, Inner> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        slot.lock()
    }

    /// One batch of a device's work.
    fn work(&self, slot: &Slot, ram: &GuestRam, outside: &dyn Outside) -> Work {
        let raise = || outside.raise(slot.window.gsi);
        let mut inner = self.take_turn(slot);
        let Inner { transport, device } = &mut *inner;
        if slot.repeats.swap(false, Ordering::SeqCst) && transport.is_interrupting() {
            raise();
        }
        if !transport.is_live() {
            return Work::default();
        }
        let Ok(work) = device.work(transport.queues(), ram) else {
            // The driver is told; nobody else can do anything about it.
            device.reset();
            transport.give_up();
            raise();
            return Work::default();
        };
        if !work.said.is_empty() {
            outside.say(&work.said);
        }
        if work.interrupt {
            transport.used();
            raise();
        }
        work
    }

    /// Wakes the devices' thread, for it to see that all is over.
    pub fn wake(&self) {
        self.ring();
    }
}

/// What the devices' thread goes on with.
#[derive(Debug)]
pub(super) struct Turns {
    ring: Ring,
    bells: Vec<Option<Arc<EventFd>>>,
    /// Of them those that are to be waited for again.
    rang: Vec<usize>,
    asks: Vec<Ask>,
    /// When each device has something to do by itself.
    alarms: Vec<Option<u64>>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Quiet<'_> {
    /// The registers of all devices.
    #[must_use]
    pub fn save(&self) -> Saved {
        let mut saved = Saved::default();
        for (to, slot) in saved.slots.iter_mut().zip(self.slots.iter().flatten()) {
            *to = slot.transport.save();
        }
        saved
    }
}

#[cfg(test)]
impl Saved {
    pub(super) fn first(&self) -> Registers {
        self.slots[0]
    }

    pub(super) fn set_generation(&mut self, generation: u32) {
        self.slots[0].set_generation(generation);
    }
}
