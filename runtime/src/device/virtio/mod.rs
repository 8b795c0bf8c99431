//! Virtio devices of a machine that runs Linux.
//!
//! ```text
//!   vCPU thread                       devices' thread
//!     exit: MMIO --> Transport          sleeps in the ring: bell, sockets, alarms
//!     QueueNotify --> bell (no exit) -> Device::work: queues <-> host
//!                  <-- interrupt -----
//! ```
//!
//! A device is its registers ([`Transport`], plain data, part of a fork) and what it does with
//! buffers ([`Device`], which starts anew in a child). Whoever touches either holds the slot's lock;
//! the devices' thread holds it for one batch, and leaves no buffer half used behind. A fork takes
//! the locks of all slots when the vCPUs have stopped, and so finds memory and registers at a border.
//!
//! A child's devices do not run before the child lives. They look at every queue then, because a
//! notification that the parent had not yet followed is not part of the state, and repeat every
//! interrupt that was not acknowledged, because it may have missed the state of a vCPU that stopped
//! early.

mod bus;
mod chain;
mod console;
#[cfg(test)]
mod driver;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod mmio;
mod ring;
mod rng;
#[cfg(test)]
mod tests;
mod vsock;

use std::fmt::Debug;

use virtio_queue::Queue;

pub use bus::{Bus, Quiet, Saved, Window, windows};
pub(super) use chain::Chain;
use console::{Console, Typed};
pub use mmio::{Description, Registers, Transport, Wrote};
pub use ring::{Ask, Done, Ring};
use rng::Rng;
pub use vsock::Vsock;

use crate::memory::GuestRam;
use crate::sys::SysError;

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Unix sockets have short paths.
    #[error(
        "the paths of sockets in {folder} would be longer than 107 bytes; choose another folder"
    )]
    Path {
        /// The folder.
        folder: String,
    },
    /// The socket could not be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// Its path.
        path: String,
        /// Why.
        source: SysError,
    },
    /// This kernel has no `io_uring`, or none for us.
    #[error(
        "the devices of Linux guests need io_uring; set the sysctl kernel.io_uring_disabled to 0, let \
         the container make the call, or boot Linux 5.13 or later"
    )]
    Ring(#[source] SysError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

impl DeviceError {
    /// The call that failed.
    #[must_use]
    pub fn into_sys(self) -> SysError {
        match self {
            Self::Path { .. } => SysError::new("bind")(rustix::io::Errno::NAMETOOLONG),
            Self::Listen { source, .. } | Self::Ring(source) | Self::Sys(source) => source,
        }
    }
}

/// The driver broke a rule that the device cannot work around.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Of queues.
    #[error("the driver's queue cannot be used")]
    Queue(#[from] virtio_queue::Error),
    /// A ring is not in guest memory.
    #[error("a ring is not in guest memory")]
    Ring,
    /// A chain is too long, or too short for what has to be in it.
    #[error("a chain of descriptors is too long or too short")]
    Chain,
    /// A buffer is not in guest memory.
    #[error("a buffer is not in guest memory")]
    Address,
}

/// What came of a batch of work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// The driver wants to be interrupted.
    pub interrupt: bool,
    /// There is more to do at once.
    pub more: bool,
    /// There is something to do at that time, in nanoseconds of the monotonic clock.
    pub at_ns: Option<u64>,
    /// What the guest has said on its console.
    pub said: Vec<u8>,
}

/// Where a device's work shows outside of it.
pub trait Outside {
    /// Interrupts the guest, by an edge on this line.
    fn raise(&self, gsi: u32);

    /// Puts this on the instance's console.
    fn say(&self, bytes: &[u8]);
}

/// What a device does with its buffers. Its lock is held.
pub trait Device: Debug + Send {
    /// What it is, to its driver.
    fn describe(&self) -> Description;

    /// Whether the vCPU that notifies it does its work, because the driver spins until that is done.
    fn is_prompt(&self) -> bool {
        false
    }

    /// The driver has reset it.
    fn reset(&mut self);

    /// The instance lives: whatever the device needs of the host is made.
    ///
    /// # Errors
    ///
    /// What the host refuses.
    fn open(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What is to be done with the host, after work.
    fn asks(&mut self, asks: &mut Vec<Ask>) {
        let _ = asks;
    }

    /// Something that was asked for is done. Work follows.
    fn done(&mut self, done: Done) {
        drop(done);
    }

    /// The instance ends: nothing of the device stays in the host's file systems.
    fn close(&mut self) {}

    /// Its registers have become those of the parent's device; all else is as it was made.
    fn reborn(&mut self) {}

    /// Does what there is to do, but no more than a batch.
    ///
    /// # Errors
    ///
    /// If the driver broke a rule.
    fn work(&mut self, queues: &mut [Queue], ram: &GuestRam) -> Result<Work, Broken>;
}
