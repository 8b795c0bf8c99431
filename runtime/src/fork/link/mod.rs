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

mod layout;

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::kvm::{VcpuState, VmState};
use crate::memory::PAGE;
use crate::sys::SysError;

pub use layout::{
    Base, ForkBlock, Header, Identity, MAX_RESERVE, MAX_VCPUS, MachineState, SLOTS, Slot, decision,
    word,
};

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

    /// Puts vCPU state of the fork under way into place. Only the parent calls this: before it
    /// publishes `state_ready`, and for debug and extended control registers alone before it publishes
    /// `rest_ready`.
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
        // by the module's rules nobody else uses what is written before it is published.
        save(unsafe { &mut *state })
    }

    /// The captured state. Only a child that takes part in the fork calls this, after
    /// `state_ready` and before it consents. It reads debug and extended control registers after
    /// `rest_ready` alone; the parent does not write the others meanwhile.
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

    /// Processes forked from now on do not have it.
    pub fn keep_from_children(&self) {
        // SAFETY: our own mapping, contents unchanged. Should it fail, it is mapped there too.
        unsafe {
            rustix::mm::madvise(self.start.as_ptr().cast(), self.bytes, Advice::LinuxDontFork)
        }
        .unwrap_or(());
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
