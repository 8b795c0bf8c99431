//! What the probes in the kernel and their loader agree on.
//!
//! | | is |
//! | --- | --- |
//! | [`Beacon`] | what a process of ours says about itself, read by the probes where it lies |
//! | [`Tracked`] | what the probes know of a process |
//! | [`CellKey`], [`Cell`] | one bucket of one histogram |
//! | [`Metric`] | what is counted |
//! | [`bucket`] | which bucket a value goes to |
//! | [`Event`] | one thing that happened, for `runtime trace` |
#![no_std]

mod bucket;
mod event;
mod metric;

pub use bucket::{BUCKETS, SUB_BITS, bucket, highest, lowest};
pub use event::{Event, EventKind};
pub use metric::{Metric, Role};

/// Where a process of ours says who it is and where its guest's memory lies. The probes read it in
/// the process that they interrupt, so that telling costs a store and no system call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Beacon {
    /// A [`Role`].
    pub role: u32,
    /// The stage of a fork that it is in, a number of the engine's; 0 outside.
    pub stage: u32,
    /// Where the guest's memory is mapped.
    pub guest_start: u64,
    /// Its length in bytes.
    pub guest_len: u64,
    /// When it ran its guest first, in ns of the monotonic clock; 0 if it did not yet.
    pub born_ns: u64,
}

/// What the probes know of a process, by its id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tracked {
    /// Address of its [`Beacon`]; 0 if that is not known.
    pub beacon: u64,
    /// Not 0: its events are sent one by one, too.
    pub traced: u32,
    /// The [`Role`] that it had when it was heard of last.
    pub role: u32,
}

/// One bucket of one histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct CellKey {
    /// The process.
    pub pid: u32,
    /// A [`Role`].
    pub role: u8,
    /// A [`Metric`].
    pub metric: u8,
    /// See [`bucket()`]; for [`Metric::Exits`] the reason.
    pub bucket: u16,
}

impl Tracked {
    /// As the loader reads and writes it.
    #[must_use]
    pub const fn words(self) -> [u64; 2] {
        [self.beacon, self.traced as u64 | (self.role as u64) << 32]
    }

    /// The same backwards.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "two halves of a word")]
    pub const fn from_words([beacon, rest]: [u64; 2]) -> Self {
        Self { beacon, traced: rest as u32, role: (rest >> 32) as u32 }
    }
}

impl CellKey {
    /// As the loader reads and writes it: what lies in memory, on a little-endian machine.
    #[must_use]
    pub const fn word(self) -> u64 {
        self.pid as u64
            | (self.role as u64) << 32
            | (self.metric as u64) << 40
            | (self.bucket as u64) << 48
    }

    /// The same backwards.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "parts of a word")]
    pub const fn from_word(word: u64) -> Self {
        Self {
            pid: word as u32,
            role: (word >> 32) as u8,
            metric: (word >> 40) as u8,
            bucket: (word >> 48) as u16,
        }
    }
}

/// What fell into a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Cell {
    /// How often.
    pub count: u64,
    /// The sum, in ns.
    pub sum: u64,
}

/// A fault, a call or a wake-up that has begun, by the thread that waits for its end.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Begun {
    /// When, in ns of the monotonic clock; 0: nothing has.
    pub ns: u64,
    /// The address of a fault, the number of an `ioctl`.
    pub what: u64,
    /// The error code of a fault.
    pub code: u64,
}

/// Slots of the map of losses.
pub mod lost {
    /// No room for another bucket.
    pub const CELLS: u32 = 0;
    /// No room for another event.
    pub const EVENTS: u32 = 1;
    /// No room for another process.
    pub const PROCESSES: u32 = 2;
    /// No room for something that has begun.
    pub const BEGUN: u32 = 3;
    /// Number of slots.
    pub const SLOTS: u32 = 4;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_what_lies_in_memory() {
        let key = CellKey { pid: 0x0403_0201, role: 5, metric: 6, bucket: 0x0807 };
        assert_eq!(key.word(), 0x0807_0605_0403_0201);
        assert_eq!(CellKey::from_word(key.word()), key);
        let tracked = Tracked { beacon: 7, traced: 1, role: 2 };
        assert_eq!(tracked.words(), [7, 0x2_0000_0001]);
        assert_eq!(Tracked::from_words(tracked.words()), tracked);
    }
}
