//! Loads the probes, attaches them, and reads what they counted.
//!
//! ```no_run
//! use ebpf_loader::{Level, Probes};
//!
//! let mut probes = Probes::load(Level::On)?;
//! probes.track(std::process::id(), 0)?;
//! for (pid, counted) in probes.read()? {
//!     for ((role, metric), histogram) in counted {
//!         println!("{pid} {} {}: {}", role.name(), metric.name(), histogram.count());
//!     }
//! }
//! # Ok::<(), ebpf_loader::ProbeError>(())
//! ```
//!
//! Everything in the kernel belongs to descriptors of this process: it goes when the process does,
//! however it ends. Nothing is pinned.
#![warn(clippy::print_stdout)]

mod attach;
mod counted;
mod error;
mod histogram;
mod host;
pub mod names;
mod offsets;
mod probes;
mod trace;
mod usdt;

pub use counted::{Counted, Lost, Row, counted, merge, rows};
pub use ebpf_common::{Beacon, Event, EventKind, Metric, Role};
pub use error::ProbeError;
pub use histogram::Histogram;
pub use probes::{Attached, Level, Probes, Refused, Shortfall, Surveyed};
