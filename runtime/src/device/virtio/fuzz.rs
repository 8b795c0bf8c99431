//! A door for the fuzz targets: devices that work when they are told to, not in a thread.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;
use virtio_queue::{Queue, QueueState, QueueT};

use super::bus::Turns;
pub use super::chain::Chain;
use super::{Bus, Console, Device, DeviceError, Outside, Rng, Saved, Vsock, Window, windows};
use crate::memory::GuestRam;
use crate::sys::SysError;

/// Turns until everything that is there to do was done, unless a device never ends.
const TURNS: usize = 64;

/// A queue as a driver might leave it: descriptors, available and used ring lie at `rings`. `None`: no
/// device takes it.
#[must_use]
pub fn queue(size: u16, rings: [u64; 3], next: (u16, u16), event_idx: bool) -> Option<Queue> {
    let [desc_table, avail_ring, used_ring] = rings;
    let state = QueueState {
        max_size: size,
        next_avail: next.0,
        next_used: next.1,
        event_idx_enabled: event_idx,
        size,
        ready: true,
        desc_table,
        avail_ring,
        used_ring,
    };
    Queue::try_from(state).ok().filter(QueueT::ready)
}

/// The devices of a Linux guest.
#[derive(Debug)]
pub struct Board {
    bus: Bus,
    turns: RefCell<Turns>,
    ram: Arc<GuestRam>,
}

/// Nobody is interrupted, and nobody listens.
struct Nobody;

impl Outside for Nobody {
    fn raise(&self, _gsi: u32) {}

    fn say(&self, _bytes: &[u8]) {}
}

impl Board {
    /// Those of instance `uuid`, with its sockets in `folder`.
    ///
    /// # Errors
    ///
    /// What the host refuses.
    pub fn new(folder: &Path, uuid: Uuid, ram: Arc<GuestRam>) -> Result<Self, DeviceError> {
        let devices: [Box<dyn Device>; 3] =
            [Box::<Rng>::default(), Box::<Console>::default(), Box::new(Vsock::new(folder, uuid)?)];
        let bus = Bus::of(devices.into_iter())?;
        let busy = || DeviceError::from(SysError::new("io_uring_setup")(rustix::io::Errno::BUSY));
        match (bus.open().pop(), bus.turns()) {
            (Some(error), _) => Err(error),
            (None, None) => Err(busy()),
            (None, Some(turns)) => Ok(Self { turns: RefCell::new(turns), bus, ram }),
        }
    }

    /// Where they lie.
    #[must_use]
    pub fn window(&self, device: usize) -> Option<Window> {
        windows(self.bus.devices()).nth(device)
    }

    /// The guest reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.bus.read(address, data);
    }

    /// The guest writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.bus.write(address, data, &self.ram, &Nobody);
    }

    /// Lets the devices work until they have nothing to do. Tells whether they came to an end.
    pub fn work(&self) -> bool {
        let mut turns = self.turns.borrow_mut();
        (0..TURNS).any(|_| {
            let next = self.bus.let_work(&mut turns, &self.ram, &Nobody);
            // Without waiting: what has come from the host by now.
            self.bus.hear(&mut turns, Some(0));
            next != Some(0)
        })
    }

    /// What a fork takes over.
    #[must_use]
    pub fn save(&self) -> Saved {
        self.bus.quiesce().save()
    }

    /// Becomes the child of the board that was saved.
    pub fn restore(&self, saved: &Saved) {
        self.bus.restore(saved, &self.ram);
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.bus.close();
    }
}
