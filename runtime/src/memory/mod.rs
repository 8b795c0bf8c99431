//! Guest memory: where its bytes come from, and who may write them.
//!
//! ```text
//!   Image<Writable> --seal()--> Image<Sealed>          a memfd; sealed once, at arming
//!        |                          |
//!    map_shared                 map_private            the instance, its zygote, every standby
//!        v                          v
//!     Mapping  --make_private-->  Mapping              private pages: what changed since
//! ```
//!
//! Mapping a memfd privately while somebody still writes to it would leak those writes into the
//! child, so a sealed image has no way to write: the kernel refuses (`F_SEAL_WRITE`), and the type
//! offers none.

mod backing;
mod device_dirty;
mod guest;
mod image;
mod layout;
mod mapping;
mod reserve;
mod uffd;

pub use backing::{Backing, BackingKind, MemoryError};
pub use device_dirty::DeviceDirty;
pub use guest::{GuestRam, guest_ram};
pub use image::{Image, Sealed, Unsealed, Writable};
pub use layout::{PAGE, RamLayout, RamRange};
pub use mapping::{Mapping, prefetch_page};
pub use reserve::Reserve;
pub use uffd::{Copied, Uffd};
