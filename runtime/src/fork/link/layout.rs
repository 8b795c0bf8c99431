//! What lies in a link. Everything is plain data or atomic: zeroes are valid.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::super::step::{Fault, Stamps};
use crate::device::{SerialRegisters, virtio};
use crate::kvm::{VcpuState, VmState};

/// Most vCPUs of an instance.
pub const MAX_VCPUS: usize = 16;
/// Standbys and children on their way that an instance can have at once.
pub const SLOTS: usize = 160;
/// Most pages that a standby makes private ahead of the fork.
pub const MAX_HOT: usize = 4096;
/// Most pages for which a standby has memory put aside.
pub const MAX_RESERVE: u32 = 1024;

/// States of a slot's futex word.
pub mod word {
    /// Nobody.
    pub const EMPTY: u32 = 0;
    /// The standby is being made.
    pub const PREPARING: u32 = 1;
    /// It sleeps.
    pub const PARKED: u32 = 2;
    /// It is to bring its memory up to the journal's head and sleep on.
    pub const SYNC: u32 = 3;
    /// A fork is expected: it is awake and spins.
    pub const ANNOUNCED: u32 = 4;
    /// Fork.
    pub const GO: u32 = 5;
    /// It is an instance and has left the guest once.
    pub const LIVE: u32 = 6;
    /// It could not be made, or the fork failed in it.
    pub const FAILED: u32 = 7;
}

/// Outcome of a fork, in one word: a failure carries its step and errno.
pub mod decision {
    /// Not all children are ready.
    pub const OPEN: u32 = 0;
    /// All run.
    pub const COMMITTED: u32 = 1;
    const FAILED: u32 = 2;

    /// None runs, because of `errno` at step number `step`.
    #[must_use]
    pub fn failed(step: u32, errno: i32) -> u32 {
        FAILED | (step & 0xff) << 8 | (errno.unsigned_abs() & 0xffff) << 16
    }

    /// Step number and errno, if the word is a failure.
    #[must_use]
    pub fn failure(word: u32) -> Option<(u32, i32)> {
        (word & 0xff == FAILED).then_some((word >> 8 & 0xff, (word >> 16).cast_signed()))
    }
}

/// Pages of a region that shares one page table of the last level (2 MiB).
pub const REGION_PAGES: u32 = 512;
/// Words of the bitmap of regions: enough for the largest guest.
const REGION_WORDS: usize = 512;

/// Who a machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Identity {
    /// UUID, version 4.
    pub uuid: [u8; 16],
    /// Generation id.
    pub generation: u64,
    /// Entropy for the guest's random number generator.
    pub entropy: [u8; 32],
    /// The generation id that ACPI tells of, see [`crate::device::generation`].
    pub vm_generation: [u8; 16],
}

/// State of a machine: what is outside the vCPUs, and each vCPU.
#[derive(Debug)]
#[repr(C)]
pub struct MachineState {
    /// Outside the vCPUs.
    pub vm: VmState,
    /// Devices of a Linux guest.
    pub serial: SerialRegisters,
    /// The same.
    pub virtio: virtio::Saved,
    /// Per vCPU.
    pub vcpus: [VcpuState; MAX_VCPUS],
}

/// State that a standby is made with, in a process's own memory.
#[derive(Clone, Debug, Default)]
pub struct Base {
    /// Outside the vCPUs.
    pub vm: VmState,
    /// Per vCPU.
    pub vcpus: Vec<VcpuState>,
}

/// First part of the link.
#[derive(Debug)]
#[repr(C)]
pub struct Header {
    /// Injected fault.
    pub fault: Fault,
    /// 1 + the processor on which a vCPU of the parent was last seen; 0: not seen yet.
    pub vcpu_cpu: AtomicU32,
    /// End of the journal for a standby that is asked to [`word::SYNC`].
    pub head: AtomicU32,
    /// Highest number of journal entries ever used, so that standbys map as many.
    pub journal_used: AtomicU32,
    /// Pages that the last child had to fill, which were not private to it.
    filled: AtomicU32,
    /// Regions in which pages were captured lately: standbys have page tables there.
    pub regions: [AtomicU64; REGION_WORDS],
    /// Pages that standbys make private ahead: their number …
    pub hot_count: AtomicU32,
    /// … and which.
    pub hot: [AtomicU32; MAX_HOT],
}

impl Header {
    /// Pages that standbys make private ahead.
    pub(in crate::fork) fn hot_pages(&self) -> impl Iterator<Item = u32> + '_ {
        let count = (self.hot_count.load(Ordering::Acquire) as usize).min(MAX_HOT);
        self.hot[..count].iter().map(|page| page.load(Ordering::Relaxed))
    }

    /// Pages for which a standby puts memory aside: as many as the last child had to fill.
    pub(in crate::fork) fn reserve(&self) -> usize {
        self.filled.load(Ordering::Relaxed).min(MAX_RESERVE) as usize
    }

    /// Notes how many pages a child had to fill, or that one like it will.
    pub(in crate::fork) fn note_filled(&self, pages: u32) {
        self.filled.store(pages, Ordering::Relaxed);
    }

    /// First page of every region in which pages were captured lately.
    pub(in crate::fork) fn active_regions(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.regions).flat_map(|(index, word)| {
            let word = word.load(Ordering::Relaxed);
            (0..64)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| (index * 64 + bit) * REGION_PAGES)
        })
    }

    /// Notes that `page` was captured.
    pub(in crate::fork) fn mark_region(&self, page: u32) {
        let region = page / REGION_PAGES;
        if let Some(word) = self.regions.get(region as usize / 64) {
            let bit = 1 << (region % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Forgets the regions.
    pub(in crate::fork) fn clear_regions(&self) {
        for word in &self.regions {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Replaces the pages that standbys make private ahead.
    pub(in crate::fork) fn set_hot_pages(&self, pages: impl Iterator<Item = u32>) {
        let mut count = 0;
        for (to, page) in self.hot.iter().zip(pages) {
            to.store(page, Ordering::Relaxed);
            count += 1;
        }
        self.hot_count.store(count, Ordering::Release);
    }
}

/// The last fork.
#[derive(Debug)]
#[repr(C)]
pub struct ForkBlock {
    /// Number of the fork under way or last made.
    pub number: AtomicU32,
    /// Number of the fork whose pages are in the journal; 0 before the first.
    pub pages_ready: AtomicU32,
    /// Number of the fork whose state is below.
    pub state_ready: AtomicU32,
    /// The same once debug and extended control registers have followed.
    pub rest_ready: AtomicU32,
    /// Readers that sleep on one of these.
    pub sleepers: AtomicU32,
    /// Its pages in the journal: the first …
    pub first: AtomicU32,
    /// … and the end so far.
    pub head: AtomicU32,
    /// Number of children.
    pub children: AtomicU32,
    /// 1 + the vCPU that rang the doorbell; 0: the host asked.
    pub vcpu: AtomicU32,
    /// vCPUs of all children that are ready to run.
    pub ready: AtomicU32,
    /// See [`decision`].
    pub decision: AtomicU32,
    /// The parent's moments.
    pub stamps: Stamps,
    /// Captured state.
    pub state: MachineState,
}

/// One standby.
#[derive(Debug)]
#[repr(C)]
pub struct Slot {
    /// Futex, see [`word`].
    pub word: AtomicU32,
    /// Number of the fork that it takes part in.
    pub fork: AtomicU32,
    /// 1 to n among the children of that fork.
    pub index: AtomicU32,
    /// Journal entries that it has applied.
    pub tail: AtomicU32,
    /// Number of the step that it is at.
    pub step: AtomicU32,
    /// Why its word is [`word::FAILED`], as in [`decision::failed`].
    pub failure: AtomicU32,
    /// Thread that wakes up at the fork.
    pub tid: AtomicU32,
    /// 1 + the processor that this thread keeps away from; 0: none.
    pub avoids: AtomicU32,
    /// End of the announced window, nanoseconds of the monotonic clock.
    pub spin_until_ns: AtomicU64,
    /// Pages applied at the fork …
    pub applied: AtomicU32,
    /// … of which were private already …
    pub applied_private: AtomicU32,
    /// … and of which the helper applied.
    pub applied_helped: AtomicU32,
    /// CPU time of the standby when it went live, in nanoseconds.
    pub cpu_ns: AtomicU64,
    /// Time from spawn to parked, in nanoseconds.
    pub prewarm_ns: AtomicU64,
    /// Page faults between wake-up and first exit (minor, all threads).
    pub faults: AtomicU32,
    /// The child's moments.
    pub stamps: Stamps,
    /// Chosen before the standby is made.
    pub identity: Identity,
    /// State that the standby rehearses and parks with.
    pub base: MachineState,
}

impl Slot {
    /// Turns its word from one state into another; tells whether it was in the first.
    pub(in crate::fork) fn turn(&self, from: u32, to: u32) -> bool {
        self.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}
