//! Virtio devices of a machine that runs Linux.
//!
//! ```text
//!   vCPU thread                       devices' thread
//!     exit: MMIO --> Transport          sleeps on the bell and on what devices wait for
//!     QueueNotify --> kick + bell -->   Device::work: queues <-> host
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
#[cfg(test)]
mod driver;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod mmio;
mod rng;
#[cfg(test)]
mod tests;
mod vsock;

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_queue::Queue;

pub use bus::{Bus, Quiet, Saved, Sources, Window, windows};
pub(super) use chain::Chain;
pub use mmio::{Description, Registers, Transport, Wrote};
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
            Self::Listen { source, .. } | Self::Sys(source) => source,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// The driver wants to be interrupted.
    pub interrupt: bool,
    /// There is more to do at once.
    pub more: bool,
    /// There is something to do at that time, in nanoseconds of the monotonic clock.
    pub at_ns: Option<u64>,
}

/// What a device does with its buffers. Its lock is held.
pub trait Device: Debug + Send {
    /// What it is, to its driver.
    fn describe(&self) -> Description;

    /// The driver has reset it.
    fn reset(&mut self);

    /// The instance lives: whatever the device needs of the host is made. Returns what is readable
    /// when there is work to do.
    ///
    /// # Errors
    ///
    /// What the host refuses.
    fn open(&mut self) -> Result<Option<Arc<OwnedFd>>, DeviceError> {
        Ok(None)
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
