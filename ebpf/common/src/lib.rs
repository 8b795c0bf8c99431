//! What the probes in the kernel and their loader agree on.
//!
//! | | is |
//! | --- | --- |
//! | [`Beacon`] | what a process of ours says about itself, read by the probes where it lies |
//! | [`Thread`] | what the probes know of a thread |
//! | [`Settings`] | what the loader says to all of them |
//! | [`Kind`], [`Begun`] | what a thread waits for the end of |
//! | [`Sample`] | one value, of a process that is new |
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

/// Values that are kept in a thread's own entry.
///
/// A fork's child is a process that nothing was counted of before: each new bucket of a histogram
/// would cost it a microsecond. Its first values are written one after the other instead.
pub const SAMPLES: usize = 49;

/// What a thread can be in the midst of at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A page fault.
    Fault = 0,
    /// A fault of the guest.
    Kvm = 1,
    /// The wait for a processor.
    Wake = 2,
    /// A call to KVM.
    Call = 3,
}

/// Number of kinds.
pub const KINDS: usize = 4;

/// What the probes know of a thread, by its id. What each of them looks at comes first: it lies together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Thread {
    /// Its process.
    pub pid: u32,
    /// Its own id; 0 when it has ended: a thread of this number is another one then.
    pub tid: u32,
    /// Address of its process's [`Beacon`]; 0 if that is not known here.
    pub beacon: u64,
    /// What the beacon said when this thread read it last: the [`Role`], not yet [`Role::Young`],
    pub role: u64,
    /// and when the process ran its guest first.
    pub born_ns: u64,
    /// How many of `samples` there are.
    pub used: u64,
    /// What it waits for the end of.
    pub begun: [Begun; KINDS],
    /// [`Sample::word`]s.
    pub samples: [u64; SAMPLES],
}

/// Words of a [`Thread`].
pub const THREAD_WORDS: usize = size_of::<Thread>() / 8;

/// What holds for all programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// Since when the programs of each kind of beginning have been attached, in ns of the monotonic
    /// clock.
    pub since: [u64; KINDS],
    /// Not 0: what happens is sent one by one, too.
    pub traced: u64,
}

/// Words of [`Settings`].
pub const SETTINGS_WORDS: usize = size_of::<Settings>() / 8;

/// One value of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// A [`Role`].
    pub role: u8,
    /// A [`Metric`].
    pub metric: u8,
    /// In ns; for [`Metric::Exits`], which instances count themselves, the reason.
    pub value: u64,
}

impl Sample {
    /// The highest value: three days.
    pub const MOST: u64 = (1 << 48) - 1;

    /// As it is kept.
    #[inline]
    #[must_use]
    pub const fn word(self) -> u64 {
        let value = if self.value > Self::MOST { Self::MOST } else { self.value };
        (self.role as u64) << 56 | (self.metric as u64) << 48 | value
    }

    /// The same backwards.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "parts of a word")]
    pub const fn from_word(word: u64) -> Self {
        let (role, metric) = ((word >> 56) as u8, (word >> 48) as u8);
        Self { role, metric, value: word & Self::MOST }
    }
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
    /// See [`bucket()`].
    pub bucket: u16,
}

impl Settings {
    /// As the loader writes it.
    #[must_use]
    pub const fn words(self) -> [u64; SETTINGS_WORDS] {
        let [fault, kvm, wake, call] = self.since;
        [fault, kvm, wake, call, self.traced]
    }
}

impl Thread {
    /// One that nothing is known of, as the loader writes it.
    #[must_use]
    pub const fn new_words(pid: u32, tid: u32) -> [u64; THREAD_WORDS] {
        let mut words = [0; THREAD_WORDS];
        // On a little-endian machine.
        words[0] = pid as u64 | (tid as u64) << 32;
        words
    }

    /// Whether it has ended, from what lies in memory.
    #[must_use]
    pub const fn has_ended(words: &[u64; THREAD_WORDS]) -> bool {
        words[0] >> 32 == 0
    }

    /// Its process and its samples, from what lies in memory.
    #[expect(clippy::cast_possible_truncation, reason = "the id of a process")]
    pub fn from_words(words: &[u64; THREAD_WORDS]) -> (u32, impl Iterator<Item = Sample>) {
        const HEAD: usize = THREAD_WORDS - SAMPLES;
        const USED: usize = core::mem::offset_of!(Thread, used) / 8;
        let used = usize::try_from(words[USED]).unwrap_or(usize::MAX).min(SAMPLES);
        let samples = words[HEAD..HEAD + used].iter();
        (words[0] as u32, samples.map(|word| Sample::from_word(*word)))
    }

    /// The number of the [`Role`] that it has at `now`.
    #[inline]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a role's number is small")]
    pub const fn role_at(&self, now: u64) -> u8 {
        let young = self.role == Role::Parent as u64
            && self.born_ns != 0
            && now.saturating_sub(self.born_ns) < Role::YOUNG_NS;
        if young { Role::Young as u8 } else { self.role as u8 }
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

/// A fault, a call or a wake-up that has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// No room for another thread.
    pub const THREADS: u32 = 3;
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
        let settings = Settings { since: [1, 2, 3, 4], traced: 5 };
        assert_eq!(settings.words(), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn an_instance_is_young_for_a_millisecond() {
        let mut thread = Thread {
            pid: 1,
            tid: 1,
            beacon: 0,
            role: 0,
            born_ns: 0,
            used: 0,
            begun: [Begun::default(); KINDS],
            samples: [0; SAMPLES],
        };
        let mut role = |role, born_ns, now| {
            (thread.role, thread.born_ns) = (role as u64, born_ns);
            thread.role_at(now)
        };
        assert_eq!(role(Role::Parent, 5, 5 + Role::YOUNG_NS - 1), Role::Young as u8);
        assert_eq!(role(Role::Parent, 5, 5 + Role::YOUNG_NS), Role::Parent as u8);
        assert_eq!(role(Role::Parent, 0, 1), Role::Parent as u8, "a root");
        assert_eq!(role(Role::Standby, 5, 6), Role::Standby as u8);
    }

    #[test]
    fn samples_are_kept_whole() {
        for value in [0, 1, 0xff, Sample::MOST] {
            let sample = Sample { role: 5, metric: 0xfe, value };
            assert_eq!(Sample::from_word(sample.word()), sample);
        }
        let long = Sample { role: 1, metric: 2, value: u64::MAX };
        assert_eq!(Sample::from_word(long.word()).value, Sample::MOST);
    }

    #[test]
    fn a_thread_is_read_as_it_lies_in_memory() {
        let sample = |value| Sample { role: 4, metric: 1, value };
        let mut words = Thread::new_words(7, 8);
        let first = core::mem::offset_of!(Thread, samples) / 8;
        let used = core::mem::offset_of!(Thread, used) / 8;
        words[used] = 2;
        (words[first], words[first + 1]) = (sample(5).word(), sample(6).word());
        words[first + 2] = sample(7).word();
        let (pid, samples) = Thread::from_words(&words);
        assert!(pid == 7 && !Thread::has_ended(&words));
        assert!(samples.eq([sample(5), sample(6)]));
        words[used] = u64::MAX;
        assert_eq!(Thread::from_words(&words).1.count(), SAMPLES);
        words[0] = 7;
        assert!(Thread::from_words(&words).0 == 7 && Thread::has_ended(&words));
    }
}
