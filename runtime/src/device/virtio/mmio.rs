//! The registers of one device: virtio over MMIO, version 2 (virtio 1.2, section 4.2.2).
//!
//! ```text
//!   reset --ACKNOWLEDGE, DRIVER--> features --FEATURES_OK--> queues --DRIVER_OK--> live
//!     ^                                                                             |
//!     +------------ the driver writes 0 <---------- NEEDS_RESET: it broke a rule <--+
//! ```
//!
//! Everything that is written here comes from the guest. What makes no sense changes nothing.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};

use super::Broken;
use crate::memory::GuestRam;

/// Most queues of a device.
pub const MAX_QUEUES: usize = 4;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Without the legacy interface.
const VERSION: u32 = 2;
/// "UKPF": whoever looks for quirks finds none.
const VENDOR: u32 = 0x4650_4b55;

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// What every device offers.
const FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// What a device is, to its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Its kind (virtio 1.2, section 5).
    pub id: u32,
    /// The most entries that each of its queues can have.
    pub queues: &'static [u16],
    /// Its configuration.
    pub config: [u8; 8],
}

/// What the driver's write asks the device for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrote {
    /// Nothing.
    Nothing,
    /// To work: the driver is there.
    Started,
    /// To forget everything.
    Reset,
}

/// One queue, as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct QueueRegisters {
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    next_avail: u16,
    next_used: u16,
    size: u16,
    ready: u16,
}

/// The registers of a device, as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    features: u64,
    features_page: u32,
    driver_features_page: u32,
    queue: u32,
    status: u32,
    interrupt: u32,
    generation: u32,
    queues: [QueueRegisters; MAX_QUEUES],
}

/// The registers, and the queues that they describe.
#[derive(Debug)]
pub struct Transport {
    device: Description,
    /// Without `queues`: those are in use below.
    registers: Registers,
    queues: Vec<Queue>,
}

impl Transport {
    /// The registers of a device after a reset.
    ///
    /// # Errors
    ///
    /// If the description names a queue that cannot be.
    pub fn new(device: Description) -> Result<Self, virtio_queue::Error> {
        let queues = device.queues.iter().take(MAX_QUEUES);
        let queues = queues.map(|size| Queue::new(*size)).collect::<Result<_, _>>()?;
        Ok(Self { device, registers: Registers::default(), queues })
    }

    /// Whether the driver is there, and device and driver understand each other.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.registers.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// The queues.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// Whether the driver has yet to acknowledge an interrupt.
    #[must_use]
    pub fn is_interrupting(&self) -> bool {
        self.registers.interrupt != 0
    }

    /// Notes that buffers were used. The caller interrupts the guest.
    pub fn used(&mut self) {
        self.registers.interrupt |= reg::VIRTIO_MMIO_INT_VRING;
    }

    /// Notes that the driver broke a rule: the device does nothing more until it is reset. The
    /// caller interrupts the guest.
    pub fn give_up(&mut self) {
        self.registers.status |= NEEDS_RESET;
        self.registers.interrupt |= reg::VIRTIO_MMIO_INT_CONFIG;
    }

    /// The driver reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        if let Some(at) = offset.checked_sub(reg::VIRTIO_MMIO_CONFIG) {
            let config = self.device.config.get(at as usize..).unwrap_or_default();
            for (to, from) in data.iter_mut().zip(config) {
                *to = *from;
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let registers = &self.registers;
        let queue = self.queues.get(registers.queue as usize);
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.id,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match registers.features_page {
                0 => low(FEATURES),
                1 => low(FEATURES >> 32),
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(QueueT::ready).into(),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => registers.interrupt,
            reg::VIRTIO_MMIO_STATUS => registers.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => registers.generation,
            // There is no shared memory: its length is all ones.
            reg::VIRTIO_MMIO_SHM_LEN_LOW | reg::VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// The driver writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8], ram: &GuestRam) -> Wrote {
        let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return Wrote::Nothing;
        };
        let value = u32::from_le_bytes(word);
        let registers = &mut self.registers;
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.features_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES if registers.status & FEATURES_OK == 0 => {
                let (keep, set) = match registers.driver_features_page {
                    0 => (u64::from(u32::MAX) << 32, u64::from(value)),
                    1 => (u64::from(u32::MAX), u64::from(value) << 32),
                    _ => return Wrote::Nothing,
                };
                registers.features = registers.features & keep | set;
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => registers.queue = value,
            reg::VIRTIO_MMIO_INTERRUPT_ACK => registers.interrupt &= !value,
            reg::VIRTIO_MMIO_STATUS => return self.set_status(value),
            _ => self.set_queue(offset, value, ram),
        }
        Wrote::Nothing
    }

    fn set_status(&mut self, value: u32) -> Wrote {
        if value == 0 {
            self.reset();
            return Wrote::Reset;
        }
        let registers = &mut self.registers;
        let mut new = value & !registers.status & 0xff & !NEEDS_RESET;
        if new & FEATURES_OK != 0 {
            let features = registers.features;
            if features & !FEATURES == 0 && features & VERSION_1 != 0 {
                for queue in &mut self.queues {
                    queue.set_event_idx(features & EVENT_IDX != 0);
                }
            } else {
                // The driver sees that it did not stay.
                new &= !FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 && (registers.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        registers.status |= new;
        if new & DRIVER_OK != 0 { Wrote::Started } else { Wrote::Nothing }
    }

    /// The registers of the queue that is selected.
    fn set_queue(&mut self, offset: u32, value: u32, ram: &GuestRam) {
        let Some(queue) = self.queues.get_mut(self.registers.queue as usize) else { return };
        if self.registers.status & FEATURES_OK == 0 {
            return;
        }
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            let event_idx = queue.event_idx_enabled();
            if value == 0 {
                queue.reset();
                queue.set_event_idx(event_idx);
            } else if value == 1 && !queue.ready() {
                queue.set_ready(true);
                if !queue.is_valid(ram) {
                    queue.set_ready(false);
                    self.give_up();
                }
            }
            return;
        }
        if queue.ready() {
            return;
        }
        let value = Some(value);
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                let size = value.and_then(|value| u16::try_from(value).ok()).unwrap_or(0);
                queue.set_size(size);
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(value, None),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(value, None),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(value, None),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, value),
            _ => {}
        }
    }

    fn reset(&mut self) {
        let generation = self.registers.generation;
        self.registers = Registers { generation, ..Registers::default() };
        self.queues.iter_mut().for_each(QueueT::reset);
    }

    /// The registers. No buffer is half used meanwhile.
    #[must_use]
    pub fn save(&self) -> Registers {
        let mut registers = self.registers;
        for (to, queue) in registers.queues.iter_mut().zip(&self.queues) {
            *to = QueueRegisters {
                desc_table: queue.desc_table(),
                avail_ring: queue.avail_ring(),
                used_ring: queue.used_ring(),
                next_avail: queue.next_avail(),
                next_used: queue.next_used(),
                size: queue.size(),
                ready: queue.ready().into(),
            };
        }
        registers
    }

    /// Sets the registers to those of another device of the same kind. The configuration may be
    /// another one.
    ///
    /// # Errors
    ///
    /// If no device can have such registers: it is as after a reset then.
    pub fn restore(&mut self, registers: &Registers, ram: &GuestRam) -> Result<(), Broken> {
        self.reset();
        let event_idx = registers.features & EVENT_IDX != 0;
        for (queue, saved) in self.queues.iter_mut().zip(&registers.queues) {
            let state = QueueState {
                max_size: queue.max_size(),
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: event_idx && registers.status & FEATURES_OK != 0,
                size: saved.size,
                ready: saved.ready != 0,
                desc_table: saved.desc_table,
                avail_ring: saved.avail_ring,
                used_ring: saved.used_ring,
            };
            *queue = Queue::try_from(state)?;
            if queue.ready() && !queue.is_valid(ram) {
                queue.reset();
                return Err(Broken::Ring);
            }
        }
        self.registers = Registers { queues: <_>::default(), ..*registers };
        // A driver that is reading the configuration reads it again.
        self.registers.generation = registers.generation.wrapping_add(1);
        Ok(())
    }
}

fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
impl Registers {
    pub(super) fn set_generation(&mut self, generation: u32) {
        self.generation = generation;
    }

    pub(super) fn set_ring(&mut self, address: u64) {
        self.queues[0].desc_table = address;
    }
}
