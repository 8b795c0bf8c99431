//! A driver for tests: the guest's side of registers and queues.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::{Bus, Device, Outside, Saved, Window, windows};
use crate::memory::GuestRam;

/// Bytes of guest memory.
pub const MEMORY: usize = 16 << 20;
/// Where the first queue's rings lie, and how far the next one's are.
const RINGS: u64 = 0x10_0000;
const APART: u64 = 0x1_0000;
/// Where the buffers of the first queue lie, and how far the next one's are.
const BUFFERS: u64 = 0x20_0000;
const BUFFERS_APART: u64 = 0x20_0000;
/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(20);

const ALL_STATUS: [u32; 3] = [1, 1 | 2, 1 | 2 | 8];
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

/// Memory of a guest.
pub fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory")
}

/// Waits until `done`, for [`LIMIT`] at most.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        let waited = begin.elapsed();
        assert!(waited < LIMIT, "waited in vain: {what}");
        // Sleeping may take milliseconds, and most answers come at once.
        if waited > Duration::from_millis(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::yield_now();
    }
}

/// A queue as its driver sees it. Each entry is one buffer of `bytes` bytes, in as many descriptors
/// as `parts` says.
#[derive(Clone, Debug)]
pub struct DriverQueue {
    index: u64,
    size: u16,
    bytes: u32,
    parts: Vec<u32>,
    indirect: bool,
    /// Buffers that the driver has.
    free: Vec<u16>,
    available: u16,
    used: u16,
    /// What was available when the device was last notified, or was found not to want it.
    notified: u16,
}

impl DriverQueue {
    /// Queue number `index`, whose buffers are in pieces of `parts` bytes.
    pub fn new(index: u64, size: u16, parts: &[u32], indirect: bool) -> Self {
        let entries = if indirect { usize::from(size) } else { usize::from(size) / parts.len() };
        let entries = u16::try_from(entries).expect("small");
        Self {
            index,
            size,
            bytes: parts.iter().sum(),
            parts: parts.to_vec(),
            indirect,
            free: (0..entries).rev().collect(),
            available: 0,
            used: 0,
            notified: 0,
        }
    }

    fn ring(&self) -> u64 {
        RINGS + self.index * APART
    }

    pub fn avail(&self) -> u64 {
        self.ring() + 0x4000
    }

    pub fn used_ring(&self) -> u64 {
        self.ring() + 0x8000
    }

    fn buffer(&self, entry: u16) -> GuestAddress {
        let bytes = u64::from(self.bytes).next_multiple_of(64);
        GuestAddress(BUFFERS + self.index * BUFFERS_APART + u64::from(entry) * bytes)
    }

    /// Gives a buffer to the device, with `data` in it, or to be written. `None`: there is none left.
    pub fn add(&mut self, ram: &GuestRam, data: Option<&[u8]>) -> Option<()> {
        let entry = self.free.pop()?;
        let address = self.buffer(entry);
        let mut parts = self.parts.clone();
        if let Some(data) = data {
            ram.write_slice(data, address).expect("in memory");
            cut(&mut parts, u32::try_from(data.len()).expect("small"));
        }
        let write = if data.is_none() { 2 } else { 0 };
        let many = u16::try_from(self.parts.len()).expect("few");
        // An indirect table lies behind the used ring.
        let table = self.ring() + 0xa000 + u64::from(entry) * 16 * u64::from(many);
        let (first, place) = if self.indirect {
            let bytes = u32::try_from(parts.len() * 16).expect("few");
            Self::descriptor(ram, self.ring() + u64::from(entry) * 16, table, bytes, 4, 0);
            (0, table)
        } else {
            (entry * many, self.ring() + u64::from(entry * many) * 16)
        };
        let mut at = address.0;
        for (number, len) in (0_u16..).zip(&parts) {
            let last = usize::from(number) + 1 == parts.len();
            let flags = write | u16::from(!last);
            let place = place + u64::from(number) * 16;
            Self::descriptor(ram, place, at, *len, flags, first + number + 1);
            at += u64::from(*len);
        }
        let head = if self.indirect { entry } else { entry * many };
        self.offer(ram, head);
        Some(())
    }

    /// Makes descriptor `head` available.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let at = self.avail() + 4 + u64::from(self.available % self.size) * 2;
        ram.write_obj(head, GuestAddress(at)).expect("in memory");
        self.available = self.available.wrapping_add(1);
        ram.store(self.available, GuestAddress(self.avail() + 2), Ordering::Release)
            .expect("in memory");
    }

    /// Whether the device wants to be notified of what was made available.
    pub fn wants_kick(&mut self, ram: &GuestRam, event_idx: bool) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.notified, self.available);
        if !event_idx {
            let flags: u16 =
                ram.load(GuestAddress(self.used_ring()), Ordering::SeqCst).expect("in memory");
            return flags & 1 == 0;
        }
        let at = self.used_ring() + 4 + u64::from(self.size) * 8;
        let event: u16 = ram.load(GuestAddress(at), Ordering::SeqCst).expect("in memory");
        let new = self.available;
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    fn descriptor(ram: &GuestRam, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        ram.write_slice(&bytes, GuestAddress(at)).expect("in memory");
    }

    /// Takes back a buffer that the device has used, and what is in it.
    pub fn take(&mut self, ram: &GuestRam) -> Option<Vec<u8>> {
        let used: u16 =
            ram.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).expect("in memory");
        if used == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        let head: u32 = ram.read_obj(GuestAddress(at)).expect("in memory");
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).expect("in memory");
        self.used = self.used.wrapping_add(1);
        // Interrupt for the next one too.
        let event = self.avail() + 4 + u64::from(self.size) * 2;
        ram.store(self.used, GuestAddress(event), Ordering::SeqCst).expect("in memory");
        let many = if self.indirect { 1 } else { u32::try_from(self.parts.len()).expect("few") };
        let entry = u16::try_from(head / many).expect("an entry");
        self.free.push(entry);
        let mut data = vec![0; len as usize];
        ram.read_slice(&mut data, self.buffer(entry)).expect("in memory");
        Some(data)
    }
}

/// Shortens `parts` to `len` bytes in all.
fn cut(parts: &mut Vec<u32>, len: u32) {
    let mut left = len;
    for part in parts.iter_mut() {
        *part = (*part).min(left);
        left -= *part;
    }
    parts.retain(|part| *part > 0);
}

/// What a device has done.
#[derive(Debug)]
pub struct Heard {
    interrupts: Arc<AtomicU32>,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Outside for Heard {
    fn raise(&self, _gsi: u32) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
    }

    fn say(&self, bytes: &[u8]) {
        self.said.lock().expect("nobody panicked").extend(bytes);
    }
}

/// A machine with one device, and the thread that runs it.
#[derive(Debug)]
pub struct Rig {
    pub ram: Arc<GuestRam>,
    pub bus: Arc<Bus>,
    pub window: Window,
    /// Interrupts so far.
    pub interrupts: Arc<AtomicU32>,
    said: Arc<Mutex<Vec<u8>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    pub fn new(device: impl Device + 'static, ram: Arc<GuestRam>) -> Self {
        let bus = Bus::of(std::iter::once::<Box<dyn Device>>(Box::new(device))).expect("a bus");
        Self {
            ram,
            bus: Arc::new(bus),
            window: windows(1).next().expect("one"),
            interrupts: Arc::default(),
            said: Arc::default(),
            over: Arc::default(),
            thread: None,
        }
    }

    /// Starts the devices' thread.
    pub fn go(&mut self) {
        let errors = self.bus.open();
        assert!(errors.is_empty(), "{errors:?}");
        let (bus, ram) = (self.bus.clone(), self.ram.clone());
        let (outside, over) = (self.outside(), self.over.clone());
        let thread = std::thread::Builder::new().name("devices".into());
        let run = move || {
            bus.run(&ram, &outside, || over.load(Ordering::SeqCst));
        };
        self.thread = Some(thread.spawn(run).expect("a thread"));
    }

    pub fn outside(&self) -> Heard {
        Heard { interrupts: self.interrupts.clone(), said: self.said.clone() }
    }

    /// What the guest has said.
    pub fn said(&self) -> Vec<u8> {
        self.said.lock().expect("nobody panicked").clone()
    }

    pub fn read(&self, offset: u32) -> u32 {
        let mut word = [0; 4];
        self.bus.read(u64::from(self.window.start + offset), &mut word);
        u32::from_le_bytes(word)
    }

    pub fn write(&self, offset: u32, value: u32) {
        let address = u64::from(self.window.start + offset);
        self.bus.write(address, &value.to_le_bytes(), &self.ram, &self.outside());
    }

    /// Does what a driver does until it has set the features.
    pub fn negotiate(&self, features: u64) {
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        for status in &ALL_STATUS[..2] {
            self.write(reg::VIRTIO_MMIO_STATUS, *status);
        }
        for (page, shift) in [(0, 0), (1, 32)] {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            let value = u32::try_from(features >> shift & 0xffff_ffff).expect("a word");
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, value);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, ALL_STATUS[2]);
    }

    /// Tells the device where a queue is.
    pub fn set_queue(&self, queue: &DriverQueue) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, u32::try_from(queue.index).expect("small"));
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, queue.size.into());
        for (low, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, queue.ring()),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.avail()),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, queue.used_ring()),
        ] {
            self.write(low, u32::try_from(address).expect("low memory"));
            self.write(low + 4, 0);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Brings the device to life.
    pub fn start(&self, features: u64, queues: &[&DriverQueue]) {
        self.negotiate(features);
        for queue in queues {
            self.set_queue(queue);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, ALL_STATUS[2] | 4);
    }

    pub fn kick(&self, queue: u32) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }

    /// What a fork takes over: the registers, and memory at the same moment. `before`: what the guest
    /// does after the device has looked for the last time.
    pub fn capture(&self, before: impl FnOnce()) -> (Saved, Arc<GuestRam>) {
        let quiet = self.bus.quiesce();
        before();
        let mut bytes = vec![0; MEMORY];
        self.ram.read_slice(&mut bytes, GuestAddress(0)).expect("in memory");
        let saved = quiet.save();
        drop(quiet);
        let copy = ram();
        copy.write_slice(&bytes, GuestAddress(0)).expect("in memory");
        (saved, Arc::new(copy))
    }

    /// Whether the device has given up on its driver.
    pub fn is_broken(&self) -> bool {
        self.read(reg::VIRTIO_MMIO_STATUS) & 0x40 != 0
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        self.bus.wake();
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking());
        }
        self.bus.close();
    }
}
