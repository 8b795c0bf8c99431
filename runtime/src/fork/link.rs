//! Memory shared by an instance, its zygote and its standbys.
//!
//! ```text
//!   +---------+-----------+--------+--------+-----+----------------+------------------+
//!   | header  | fork block| slot 0 | slot 1 | ... | journal: pages | journal: contents|
//!   +---------+-----------+--------+--------+-----+----------------+------------------+
//!     fault,    state of    one per standby: futex  numbers of the   their 4096 bytes,
//!     keeper    the last    word, identity, base    captured pages   same index
//!               fork        state, stamps
//! ```
//!
//! Plain data in it has one owner at a time:
//!
//! - the **fork block** belongs to the parent until it publishes `state_ready` (debug and extended
//!   control registers: `rest_ready`), then to the children until all of them are live or dead;
//! - a **slot** belongs to the parent while empty, and to its standby once that is being made;
//!   `identity` and `base` are written before and never after;
//! - the **journal** is appended by the parent alone; entries below the published head do not
//!   change until every reader has passed them and the parent starts again at 0.
#![expect(unsafe_code, reason = "memory shared between processes is reached by raw pointers")]

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::step::{Fault, Stamps};
use crate::kvm::{VcpuState, VmState};
use crate::memory::PAGE;
use crate::sys::SysError;

/// Most vCPUs of an instance.
pub const MAX_VCPUS: usize = 16;
/// Standbys and children on their way that an instance can have at once.
pub const SLOTS: usize = 160;
/// Most pages that a standby makes private ahead of the fork.
pub const MAX_HOT: usize = 4096;

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
}

/// State of a machine: what is outside the vCPUs, and each vCPU.
#[derive(Debug)]
#[repr(C)]
pub struct MachineState {
    /// Outside the vCPUs.
    pub vm: VmState,
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
    /// Regions in which pages were captured lately: standbys have page tables there.
    pub regions: [AtomicU64; REGION_WORDS],
    /// Pages that standbys make private ahead: their number …
    pub hot_count: AtomicU32,
    /// … and which.
    pub hot: [AtomicU32; MAX_HOT],
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
    /// Readers that sleep on one of the two.
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
    /// 1 while the standby sleeps on `word`.
    pub sleeping: AtomicU32,
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

/// The shared memory, mapped.
#[derive(Debug)]
pub struct Link {
    start: NonNull<u8>,
    bytes: usize,
    capacity: usize,
    file: OwnedFd,
    bell: OwnedFd,
}

// SAFETY: shared memory, reached by atomics or under the ownership rules above.
unsafe impl Send for Link {}
// SAFETY: as above.
unsafe impl Sync for Link {}

/// Room for pages in the journal of an instance with these dirty rings: twice what they can log,
/// so that a full ring always finds room.
#[must_use]
pub fn capacity(ring_entries: u32, vcpus: u32) -> usize {
    (2 * ring_entries as usize * vcpus as usize).next_multiple_of(1024)
}

/// Bytes of a link whose journal has room for `capacity` pages.
fn bytes_for(capacity: usize) -> usize {
    NUMBERS + (capacity * 4).next_multiple_of(PAGE) + capacity * PAGE
}

const FORK: usize = size_of::<Header>().next_multiple_of(PAGE);
const FIRST_SLOT: usize = FORK + size_of::<ForkBlock>().next_multiple_of(PAGE);
const SLOT_BYTES: usize = size_of::<Slot>().next_multiple_of(PAGE);
const NUMBERS: usize = FIRST_SLOT + SLOTS * SLOT_BYTES;

impl Link {
    /// A link whose journal has room for `capacity` pages (a multiple of 1024). Memory is used only
    /// for what is touched.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `EMFILE`.
    pub fn new(capacity: usize) -> Result<Self, SysError> {
        let file = rustix::fs::memfd_create("fork-link", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(SysError::new("memfd_create"))?;
        rustix::fs::ftruncate(&file, bytes_for(capacity) as u64)
            .map_err(SysError::new("ftruncate"))?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(SysError::new("eventfd"))?;
        Self::adopt(capacity, file, bell)
    }

    /// Maps the link of another process.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the file is too short for `capacity`, `ENOMEM`.
    pub fn adopt(capacity: usize, file: OwnedFd, bell: OwnedFd) -> Result<Self, SysError> {
        let bytes = bytes_for(capacity);
        let size = rustix::fs::fstat(&file).map_err(SysError::new("fstat"))?.st_size;
        if u64::try_from(size).unwrap_or(0) < bytes as u64 {
            return Err(SysError::new("adopting a link")(rustix::io::Errno::INVAL));
        }
        // SAFETY: a fresh mapping at an address that the kernel picks.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }
        .map_err(SysError::new("mmap"))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| SysError::last("mmap"))?;
        Ok(Self { start, bytes, capacity, file, bell })
    }

    /// The shared memory as a file.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Readable when [`Link::ring`] was called: the parent's control thread waits for it. Processes
    /// that inherit the mapping inherit the descriptor too.
    #[must_use]
    pub fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// Room for pages in the journal.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes);
        // SAFETY: in bounds by the assertion.
        unsafe { self.start.as_ptr().add(offset) }.cast()
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        // SAFETY: page-aligned, zero-initialised (valid for atomics), only atomics inside.
        unsafe { &*self.at(0) }
    }

    /// The fork block. Only its atomic fields may be used through this reference.
    #[must_use]
    pub fn fork(&self) -> &ForkBlock {
        // SAFETY: page-aligned, zero-initialised; callers keep to atomic fields, as documented.
        unsafe { &*self.at(FORK) }
    }

    /// Puts vCPU state of the fork under way into place. Only the parent calls this, before it
    /// publishes `state_ready`.
    ///
    /// # Errors
    ///
    /// What `save` says.
    pub(super) fn write_fork<E>(
        &self,
        save: impl FnOnce(&mut MachineState) -> Result<(), E>,
    ) -> Result<(), E> {
        let state = self.at::<MachineState>(FORK + std::mem::offset_of!(ForkBlock, state));
        // SAFETY: in bounds and aligned; zeroes and whatever a parent wrote are valid plain data;
        // by the module's rules nobody else uses it before `state_ready` is published.
        save(unsafe { &mut *state })
    }

    /// The captured state. Only a child that takes part in the fork calls this, after
    /// `state_ready` and before it consents: the parent does not write meanwhile.
    pub(super) fn read_fork(&self) -> &MachineState {
        let state = self.at::<MachineState>(FORK + std::mem::offset_of!(ForkBlock, state));
        // SAFETY: as in `write_fork`.
        unsafe { &*state }
    }

    /// A slot. Only its atomic fields may be used through this reference.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    #[must_use]
    pub fn slot(&self, index: usize) -> &Slot {
        assert!(index < SLOTS);
        // SAFETY: page-aligned, zero-initialised; callers keep to atomic fields, as documented.
        unsafe { &*self.at(FIRST_SLOT + index * SLOT_BYTES) }
    }

    /// Writes what a standby starts from. Only the parent calls this, while the slot is empty.
    pub(super) fn write_slot(&self, index: usize, identity: &Identity, base: &Base) {
        assert!(index < SLOTS && base.vcpus.len() <= MAX_VCPUS);
        // SAFETY: in bounds and aligned; an empty slot belongs to the parent.
        unsafe { self.slot_identity(index).write(*identity) };
        // SAFETY: as above.
        unsafe { self.slot_vm(index).write(base.vm) };
        for (number, vcpu) in base.vcpus.iter().enumerate() {
            // SAFETY: as above; the number is below MAX_VCPUS.
            unsafe { self.slot_vcpu(index, number).write(*vcpu) };
        }
    }

    /// Identity and base state of a slot. Only its standby calls this.
    pub(super) fn read_slot(&self, index: usize, vcpus: usize) -> (Identity, Base) {
        assert!(index < SLOTS && vcpus <= MAX_VCPUS);
        // SAFETY: in bounds and aligned, written before the standby was forked and never after.
        let identity = unsafe { self.slot_identity(index).read() };
        // SAFETY: as above.
        let vm = unsafe { self.slot_vm(index).read() };
        // SAFETY: as above; numbers are below MAX_VCPUS.
        let vcpu = |number| unsafe { self.slot_vcpu(index, number).read() };
        (identity, Base { vm, vcpus: (0..vcpus).map(vcpu).collect() })
    }

    fn slot_identity(&self, index: usize) -> *mut Identity {
        self.at(FIRST_SLOT + index * SLOT_BYTES + std::mem::offset_of!(Slot, identity))
    }

    fn slot_vm(&self, index: usize) -> *mut VmState {
        self.at(FIRST_SLOT + index * SLOT_BYTES + std::mem::offset_of!(Slot, base.vm))
    }

    fn slot_vcpu(&self, index: usize, number: usize) -> *mut VcpuState {
        let first = FIRST_SLOT + index * SLOT_BYTES + std::mem::offset_of!(Slot, base.vcpus);
        self.at(first + number * size_of::<VcpuState>())
    }

    /// Whether the standby of a slot takes part in a fork right now.
    #[must_use]
    pub fn is_going(&self, index: usize) -> bool {
        matches!(self.slot(index).word.load(Ordering::Acquire), word::GO | word::LIVE)
    }

    /// Pages that standbys make private ahead.
    pub(super) fn hot_pages(&self) -> impl Iterator<Item = u32> + '_ {
        let header = self.header();
        let count = (header.hot_count.load(Ordering::Acquire) as usize).min(MAX_HOT);
        header.hot[..count].iter().map(|page| page.load(Ordering::Relaxed))
    }

    /// First page of every region in which pages were captured lately.
    pub(super) fn active_regions(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.header().regions).flat_map(|(index, word)| {
            let word = word.load(Ordering::Relaxed);
            (0..64)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| (index * 64 + bit) * REGION_PAGES)
        })
    }

    /// Notes that `page` was captured.
    pub(super) fn mark_region(&self, page: u32) {
        let region = page / REGION_PAGES;
        if let Some(word) = self.header().regions.get(region as usize / 64) {
            let bit = 1 << (region % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Forgets the regions.
    pub(super) fn clear_regions(&self) {
        for word in &self.header().regions {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Replaces them.
    pub(super) fn set_hot_pages(&self, pages: impl Iterator<Item = u32>) {
        let header = self.header();
        let mut count = 0;
        for (to, page) in header.hot.iter().zip(pages) {
            to.store(page, Ordering::Relaxed);
            count += 1;
        }
        header.hot_count.store(count, Ordering::Release);
    }

    /// Number of the page in journal entry `entry`.
    ///
    /// # Panics
    ///
    /// If the journal has no such entry.
    #[must_use]
    pub fn number(&self, entry: usize) -> &AtomicU32 {
        assert!(entry < self.capacity);
        // SAFETY: 4-byte aligned, in bounds, zero-initialised.
        unsafe { &*self.at(NUMBERS + entry * 4) }
    }

    /// Contents of journal entry `entry`: [`PAGE`] bytes.
    ///
    /// # Panics
    ///
    /// If the journal has no such entry.
    #[must_use]
    pub fn contents(&self, entry: usize) -> NonNull<u8> {
        assert!(entry < self.capacity);
        let offset = NUMBERS + (self.capacity * 4).next_multiple_of(PAGE) + entry * PAGE;
        // SAFETY: in bounds: the mapping was made for `capacity` pages behind the numbers.
        unsafe { self.start.add(offset) }
    }

    /// Maps the first `entries` of the journal for good, so that using them takes no page fault.
    pub fn populate(&self, entries: usize) {
        let entries = entries.min(self.capacity);
        if entries > 0 {
            self.populate_at(self.contents(0).as_ptr(), entries * PAGE);
            let numbers = std::ptr::from_ref(self.number(0)).cast_mut().cast();
            self.populate_at(numbers, entries * 4);
        }
    }

    /// The same for the fork block of a machine with `vcpus` vCPUs.
    pub fn populate_fork(&self, vcpus: usize) {
        let vcpus = vcpus.min(MAX_VCPUS) * size_of::<VcpuState>();
        let bytes = std::mem::offset_of!(ForkBlock, state.vcpus) + vcpus;
        self.populate_at(self.at::<ForkBlock>(FORK).cast(), bytes);
    }

    /// Populates what begins at `start`, a page of ours.
    fn populate_at(&self, start: *mut u8, bytes: usize) {
        let end = self.start.as_ptr().wrapping_add(self.bytes);
        assert!(start.wrapping_add(bytes) <= end && start >= self.start.as_ptr());
        // SAFETY: inside our own mapping; populating does not change contents. It is an
        // optimisation: where the kernel lacks it (before 5.14) faults come one by one.
        unsafe { rustix::mm::madvise(start.cast(), bytes, Advice::LinuxPopulateWrite) }
            .unwrap_or(());
    }

    /// Tells the parent's control thread that there is something to look at.
    pub fn ring(&self) {
        // Fails only when the counter is full, and then the other side is about to look anyway.
        rustix::io::write(&self.bell, &1_u64.to_ne_bytes()).unwrap_or(0);
    }

    /// Takes all rings so far.
    pub fn clear_bell(&self) {
        // Fails only when nobody rang.
        rustix::io::read(&self.bell, &mut [0_u8; 8]).unwrap_or(0);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: our own mapping; references into it borrow `self`.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}
