//! The floor: what a fork would cost if nothing but the kernel's own primitives took time.
//!
//! ```text
//! floor = exit and entry of one parent vCPU
//!       + wake-up of a parked process
//!       + first run of a rehearsed vCPU, to its first exit
//!       + (capture + apply) × dirty pages
//! ```
//!
//! Each term is the median of its primitive, timed alone. `branch / floor` is what survives the
//! noise of a machine: a slow moment slows both.
//!
//! ```no_run
//! use bench_harness::baseline::floor::{DirtyPages, Floor, FloorConfig, Standby};
//!
//! let floor = Floor::measure(&FloorConfig { memory_mib: 512, ..FloorConfig::default() })?;
//! for dirty in [0, 100, 1000] {
//!     let pages = DirtyPages { dirty, hot: 0 };
//!     println!("{dirty}: {:.1} µs", floor.sum_us(pages, Standby::Parked));
//! }
//! # Ok::<(), bench_harness::baseline::BaselineError>(())
//! ```

mod entry;
mod pages;
mod standby;

use std::collections::BTreeMap;
use std::time::Duration;

use runtime::kvm::Host;
use runtime::memory::{BackingKind, PAGE, RamLayout};
use serde::{Deserialize, Serialize};

use super::{BaselineError, Figure, guest};

/// Of the machine that the primitives are timed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloorConfig {
    /// Guest RAM in MiB, at least 8.
    pub memory_mib: u32,
    /// Number of vCPUs that the machine has. One of them is run: the others run at the same time.
    pub vcpus: u32,
    /// What the image is made of.
    pub backing: BackingKind,
}

impl Default for FloorConfig {
    fn default() -> Self {
        Self { memory_mib: 512, vcpus: 1, backing: BackingKind::Small }
    }
}

/// Pages that differ between the parent and its standby at the fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// All of them.
    pub dirty: u64,
    /// Those among them that are private to the standby already.
    pub hot: u64,
}

/// What the standby does while it waits for the fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standby {
    /// It sleeps.
    #[default]
    Parked,
    /// The fork was announced: it spins.
    Spinning,
}

/// The primitives, measured once for a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Bytes of the page that the first write to a private mapping copies.
    pub copy_bytes: u64,
    /// One exit and one entry of a vCPU of the parent.
    pub exit_and_entry: Figure,
    /// From `FUTEX_WAKE` to the first statement of a process that slept for 2 ms.
    pub wake: Figure,
    /// The same with a process that spins, on another processor than this one if there is one: from
    /// the store to the first statement after it.
    pub wake_spinning: Figure,
    /// `KVM_RUN` of a vCPU that was rehearsed, slept for 2 ms and was woken, to its first exit.
    pub first_run: Figure,
    /// Copying one random page into a warm shared buffer, per page.
    pub capture: Figure,
    /// Giving contents to a page that the standby has not mapped, per page of `copy_bytes`.
    pub apply: Figure,
    /// Giving contents to a page that is private to the standby, per page of 4 KiB.
    pub apply_hot: Figure,
    /// What was measured in another way than usual.
    pub notes: Vec<String>,
}

/// Most wall time of each part; all of them together stay below 1.5 s.
const PART: Duration = Duration::from_millis(350);

impl Floor {
    /// Measures every primitive, within about 1.5 s.
    ///
    /// About a dozen short-lived processes are forked from this one, so that the sleep and the
    /// faults of a standby are those of a process. They are gone when it returns.
    ///
    /// # Errors
    ///
    /// What this host lacks, or the step that failed.
    pub fn measure(config: &FloorConfig) -> Result<Self, BaselineError> {
        let layout = RamLayout::new(config.memory_mib.max(RamLayout::MIN_MIB));
        // Processes first: what they inherit slows down their start, and KVM's descriptors would
        // keep the parent's machine alive.
        let mut notes = Vec::new();
        let wake = standby::wake_up(Standby::Parked, PART, &mut notes)?;
        let wake_spinning = standby::wake_up(Standby::Spinning, PART, &mut notes)?;
        let host = Host::open()?;
        let image = guest::image(config.backing, layout)?;
        let first_run = standby::first_run(&host, &image, config, PART)?;
        let exit_and_entry = entry::exit_and_entry(&host, &image, config, PART / 2)?;
        let pages = pages::measure(&image, &mut notes)?;
        Ok(Self {
            memory_mib: config.memory_mib,
            copy_bytes: config.backing.backing().copy_bytes() as u64,
            exit_and_entry,
            wake,
            wake_spinning,
            first_run,
            capture: pages.capture,
            apply: pages.apply,
            apply_hot: pages.apply_hot,
            notes,
        })
    }

    /// The floor of a fork in µs.
    #[must_use]
    pub fn sum_us(&self, pages: DirtyPages, standby: Standby) -> f64 {
        self.terms_us(pages, standby).values().sum()
    }

    /// Its terms in µs, by name: they add up to [`Floor::sum_us`].
    #[must_use]
    pub fn terms_us(&self, pages: DirtyPages, standby: Standby) -> BTreeMap<String, f64> {
        let wake = match standby {
            Standby::Parked => self.wake,
            Standby::Spinning => self.wake_spinning,
        };
        let dirty = count(pages.dirty);
        let hot = count(pages.hot.min(pages.dirty));
        let copies = self.copies(dirty - hot);
        // Where one copy takes in several dirty pages, those after the first are private by then.
        let apply = self.apply.p50_us * copies + self.apply_hot.p50_us * (dirty - copies);
        [
            ("exit_and_entry_us", self.exit_and_entry.p50_us),
            ("wake_us", wake.p50_us),
            ("first_run_us", self.first_run.p50_us),
            ("capture_us", self.capture.p50_us * dirty),
            ("apply_us", apply),
        ]
        .map(|(name, us)| (name.to_owned(), us))
        .into()
    }

    /// The primitives by name, each as measured.
    #[must_use]
    pub fn primitives(&self) -> [(&'static str, Figure); 7] {
        [
            ("exit_and_entry", self.exit_and_entry),
            ("wake", self.wake),
            ("wake_spinning", self.wake_spinning),
            ("first_run", self.first_run),
            ("capture", self.capture),
            ("apply", self.apply),
            ("apply_hot", self.apply_hot),
        ]
    }

    /// Expected number of copies of `copy_bytes` that `cold` random pages of 4 KiB need.
    fn copies(&self, cold: f64) -> f64 {
        if self.copy_bytes <= PAGE as u64 {
            return cold;
        }
        let places = count((u64::from(self.memory_mib) << 20) / self.copy_bytes).max(1.0);
        // Each place is missed by all of them with (1 - 1/places)^cold.
        places * (1.0 - (1.0 - 1.0 / places).powf(cold))
    }
}

/// A number of pages for arithmetic with times.
fn count(pages: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "2^53 pages are more than any machine has")]
    let pages = pages as f64;
    pages
}

#[cfg(test)]
mod tests;
