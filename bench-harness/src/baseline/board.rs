//! Memory that a measuring process shares with one that it started: orders, answers, stamps.
#![expect(unsafe_code, reason = "memory shared between processes is reached by raw pointers")]

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use runtime::sys::SysError;
use rustix::mm::{MapFlags, ProtFlags};

/// Room for samples.
pub(super) const MAX_SAMPLES: usize = 1024;
/// Room for what a process says when it fails, in bytes.
const MAX_MESSAGE: usize = 512;

/// States of a started process.
pub(super) mod state {
    /// It prepares.
    pub(crate) const STARTING: u32 = 0;
    /// It waits for an order.
    pub(crate) const WAITING: u32 = 1;
    /// It is through.
    pub(crate) const DONE: u32 = 2;
    /// It failed; the message says why.
    pub(crate) const FAILED: u32 = 3;
}

/// A value that shares its cache line with no other: a spinning reader of one must not slow down
/// the writer of the next.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Line<T>(pub(super) T);

/// What is shared. Only atomics, and zeroes are a valid start.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Board {
    /// Futex: number of the last order. Only the starting process writes it.
    pub(super) order: Line<AtomicU32>,
    /// Number of the last order that was carried out.
    pub(super) answer: Line<AtomicU32>,
    /// See [`state`].
    pub(super) state: Line<AtomicU32>,
    /// 1: spin for the next order instead of sleeping.
    pub(super) spin: AtomicU32,
    /// Moments of the last order, nanoseconds of the monotonic clock.
    pub(super) stamps: Line<[AtomicU64; 2]>,
    /// When a spinning process last looked at `order` in vain, on the same clock.
    pub(super) looked_ns: AtomicU64,
    /// Number of samples.
    pub(super) count: AtomicU32,
    /// Samples, nanoseconds.
    pub(super) samples: [AtomicU64; MAX_SAMPLES],
    /// A value that the process reports besides.
    pub(super) value: AtomicU64,
    message_bytes: AtomicU32,
    message: [AtomicU8; MAX_MESSAGE],
}

impl Board {
    /// Adds a sample; one too many is dropped.
    pub(super) fn push(&self, sample_ns: u64) {
        let index = self.count.load(Ordering::Relaxed);
        if let Some(place) = self.samples.get(index as usize) {
            place.store(sample_ns, Ordering::Relaxed);
            self.count.store(index + 1, Ordering::Release);
        }
    }

    /// The samples, in µs.
    pub(super) fn samples_us(&self) -> Vec<f64> {
        let count = (self.count.load(Ordering::Acquire) as usize).min(MAX_SAMPLES);
        let us = |ns: &AtomicU64| super::us_between(0, ns.load(Ordering::Relaxed));
        self.samples[..count].iter().map(us).collect()
    }

    /// Says why the process failed.
    pub(super) fn fail(&self, message: &str) {
        let mut bytes = 0;
        for (to, from) in self.message.iter().zip(message.bytes()) {
            to.store(from, Ordering::Relaxed);
            bytes += 1;
        }
        self.message_bytes.store(bytes, Ordering::Relaxed);
        self.state.0.store(state::FAILED, Ordering::Release);
    }

    /// What the process said.
    pub(super) fn message(&self) -> String {
        let bytes = (self.message_bytes.load(Ordering::Relaxed) as usize).min(MAX_MESSAGE);
        let bytes: Vec<u8> =
            self.message[..bytes].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A board in memory that forked processes share.
#[derive(Debug)]
pub(super) struct Shared {
    board: NonNull<Board>,
}

impl Shared {
    /// A board of zeroes.
    pub(super) fn new() -> Result<Self, SysError> {
        // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                size_of::<Board>(),
                ProtFlags::READ | ProtFlags::WRITE,
                // Populated: the first wake-up must not pay for a page fault.
                MapFlags::SHARED | MapFlags::POPULATE,
            )
        }
        .map_err(SysError::new("mmap"))?;
        let board = NonNull::new(address.cast()).ok_or_else(|| SysError::last("mmap"))?;
        Ok(Self { board })
    }
}

impl Deref for Shared {
    type Target = Board;

    fn deref(&self) -> &Board {
        // SAFETY: page-aligned, as long as a board, mapped until `self` is dropped, zeroed by the
        // kernel and only ever accessed atomically.
        unsafe { self.board.as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping; references into it borrow `self`.
        let result = unsafe { rustix::mm::munmap(self.board.as_ptr().cast(), size_of::<Board>()) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_and_not_lost() {
        let board = Shared::new().unwrap();
        board.fail("out of luck");
        assert_eq!(board.message(), "out of luck");
        board.fail(&"x".repeat(2 * MAX_MESSAGE));
        assert_eq!(board.message().len(), MAX_MESSAGE);
        assert_eq!(board.state.0.load(Ordering::Acquire), state::FAILED);
    }

    #[test]
    fn samples_beyond_the_room_are_dropped() {
        let board = Shared::new().unwrap();
        for sample in 0..MAX_SAMPLES as u64 + 10 {
            board.push(sample * 1000);
        }
        let samples = board.samples_us();
        assert_eq!(samples.len(), MAX_SAMPLES);
        assert!((samples[7] - 7.0).abs() < 1e-9);
    }
}
