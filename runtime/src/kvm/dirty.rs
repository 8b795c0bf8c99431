//! Which pages the guest wrote: KVM's dirty ring, or its bitmap where there is no ring.
//!
//! ```text
//!   page written --KVM--> logged --harvest()--> returned once --reset()--> write-protected again
//! ```
//!
//! Between harvest and reset a page is writable without being logged again: whoever harvests keeps
//! such pages and copies them at every capture until the reset. A ring that is full can also be given
//! back without it ([`DirtyLog::release`]).
#![expect(
    unsafe_code,
    reason = "the ring is memory shared with the kernel; two ioctls are not wrapped"
)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

use super::KvmError;
use super::calls::timed;
use crate::memory::{PAGE, RamLayout};

/// `_IO(KVMIO, 0xc7)`.
const RESET_DIRTY_RINGS: libc::c_ulong = 0xaec7;
/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`.
const CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
/// `_IOW(KVMIO, 0x42, struct kvm_dirty_log)`.
const GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;

/// How dirty pages are tracked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtyMode {
    /// The ring if there is one: cost by pages written.
    #[default]
    Ring,
    /// The bitmap: cost by memory size.
    Bitmap,
}

/// One entry of a ring (`struct kvm_dirty_gfn`).
#[repr(C)]
struct Gfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: std::sync::atomic::AtomicU64,
}

const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// Calls that a reset may take: each is cut short by a signal, and a signal that comes is gone then.
const MOST_RESETS: u32 = 1000;
/// Names no page: KVM passes over such an entry when it resets, as it has to over whatever may stand
/// in memory that is shared (`kvm_reset_dirty_gfn`).
const NO_SLOT: u32 = u32::MAX;

/// One vCPU's ring, mapped.
#[derive(Debug)]
struct Ring {
    entries: NonNull<Gfn>,
    count: u32,
    next: u32,
    /// Entries before this one have been given back to the kernel.
    given_back: u32,
}

// SAFETY: the ring is shared with the kernel and accessed by atomics only.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, count: u32) -> Result<Self, KvmError> {
        let bytes = count as usize * size_of::<Gfn>();
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a fresh mapping of the vCPU's ring, at an address that the kernel picks.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                vcpu,
                u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as u64,
            )
        }
        .map_err(|errno| KvmError::Ioctl { name: "mmap of a dirty ring", source: errno.into() })?;
        let entries = NonNull::new(address.cast()).ok_or(KvmError::Ioctl {
            name: "mmap of a dirty ring",
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        Ok(Self { entries, count, next: 0, given_back: 0 })
    }

    /// Entries that were taken and not given back.
    fn held(&self) -> u32 {
        self.next.wrapping_sub(self.given_back)
    }

    /// Entries that the kernel can still write.
    fn free(&self) -> u32 {
        self.count.saturating_sub(self.held())
    }

    fn entry(&self, index: u32) -> &Gfn {
        // SAFETY: the index is below the number of mapped entries.
        let entry = unsafe { self.entries.add((index % self.count) as usize) };
        // SAFETY: mapped and aligned; the kernel shares it, so it has only atomics.
        unsafe { entry.as_ref() }
    }

    /// What was taken and not given back names no page any more.
    fn blank(&self) {
        let mut index = self.given_back;
        while index != self.next {
            self.entry(index).slot.store(NO_SLOT, Ordering::Relaxed);
            index = index.wrapping_add(1);
        }
    }

    /// Takes the next logged page.
    fn take(&mut self) -> Option<(u32, u64)> {
        let entry = self.entry(self.next);
        if entry.flags.load(Ordering::Acquire) & DIRTY == 0 {
            return None;
        }
        let page = (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
        // Release: KVM may reuse the entry once it sees the flag.
        entry.flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(page)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.count as usize * size_of::<Gfn>();
        // SAFETY: our own mapping, with no reference left.
        let result = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), bytes) };
        debug_assert!(result.is_ok());
    }
}

/// The dirty log of one machine.
#[derive(Debug)]
pub struct DirtyLog {
    layout: RamLayout,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Ring(Vec<Ring>),
    Bitmap { pending: Vec<Vec<u64>>, scratch: Vec<Vec<u64>> },
}

impl DirtyLog {
    pub(super) fn rings(
        layout: RamLayout,
        vcpus: &[&VcpuFd],
        count: u32,
    ) -> Result<Self, KvmError> {
        let rings = vcpus.iter().map(|vcpu| Ring::map(vcpu, count)).collect::<Result<_, _>>()?;
        Ok(Self { layout, source: Source::Ring(rings) })
    }

    pub(super) fn bitmap(layout: RamLayout) -> Self {
        let words = |len: u64| {
            let pages = usize::try_from(len).unwrap_or(usize::MAX) / PAGE;
            vec![0_u64; pages.div_ceil(64)]
        };
        let maps: Vec<_> = layout.ranges().map(|range| words(range.len)).collect();
        Self { layout, source: Source::Bitmap { scratch: maps.clone(), pending: maps } }
    }

    /// Calls `page` for every page logged since the last harvest, by its number in the image.
    ///
    /// Entries that name no page of the image are dropped: the ring is writable by this process
    /// alone, but its contents are input all the same.
    ///
    /// # Errors
    ///
    /// What `KVM_GET_DIRTY_LOG` says; a ring cannot fail.
    pub fn harvest(&mut self, vm: &VmFd, mut page: impl FnMut(u32)) -> Result<(), KvmError> {
        match &mut self.source {
            Source::Ring(rings) => {
                for ring in rings {
                    while let Some((slot, offset)) = ring.take() {
                        if let Some(number) = self.layout.image_page(slot, offset) {
                            page(number);
                        }
                    }
                }
            }
            Source::Bitmap { pending, scratch } => {
                for (slot, (pending, scratch)) in (0_u32..).zip(pending.iter_mut().zip(scratch)) {
                    get_dirty_log(vm, slot, scratch)?;
                    for (index, (known, new)) in pending.iter_mut().zip(scratch).enumerate() {
                        let mut fresh = *new & !*known;
                        *known |= fresh;
                        while fresh != 0 {
                            let offset = index as u64 * 64 + u64::from(fresh.trailing_zeros());
                            fresh &= fresh - 1;
                            if let Some(number) = self.layout.image_page(slot, offset) {
                                page(number);
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Most pages that vCPUs other than `own` can log before one of them is stopped by a full ring.
    /// The bitmap has no such limit: 0.
    #[must_use]
    pub fn still_to_come(&self, own: Option<usize>) -> usize {
        match &self.source {
            Source::Ring(rings) => {
                let others = rings.iter().enumerate().filter(|(index, _)| Some(*index) != own);
                others.map(|(_, ring)| ring.free() as usize).sum()
            }
            Source::Bitmap { .. } => 0,
        }
    }

    /// Makes room in the rings, and leaves all harvested pages writable and not logged: neither a later
    /// reset does anything about them. Only switching the log off and on again does
    /// ([`Machine::track`](super::Machine::track)). The bitmap is never full: nothing to be done.
    ///
    /// # Errors
    ///
    /// As [`DirtyLog::reset`].
    pub fn release(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        let Source::Ring(rings) = &self.source else { return Ok(()) };
        rings.iter().for_each(Ring::blank);
        self.reset(vm).map(drop)
    }

    /// Whether there is anything for [`DirtyLog::reset`] to give back to KVM.
    #[must_use]
    pub fn holds_entries(&self) -> bool {
        match &self.source {
            Source::Ring(rings) => rings.iter().any(|ring| ring.held() > 0),
            Source::Bitmap { .. } => false,
        }
    }

    /// Write-protects all harvested pages again. When it returns true, a write to any of them is
    /// logged. Otherwise a signal has come in between, and some of them may have stayed writable: KVM
    /// gives up what it has gathered then (since Linux 6.16).
    ///
    /// # Errors
    ///
    /// What `KVM_RESET_DIRTY_RINGS` or `KVM_CLEAR_DIRTY_LOG` says.
    pub fn reset(&mut self, vm: &VmFd) -> Result<bool, KvmError> {
        // The flags set by `take` must be visible before the kernel looks for them.
        fence(Ordering::SeqCst);
        match &mut self.source {
            Source::Ring(rings) => {
                let held: u64 = rings.iter().map(|ring| u64::from(ring.held())).sum();
                let (mut given_back, mut calls) = (0, 0);
                while calls == 0 || given_back < held && calls < MOST_RESETS {
                    // SAFETY: no argument.
                    let result =
                        timed(|| unsafe { libc::ioctl(vm.as_raw_fd(), RESET_DIRTY_RINGS, 0) });
                    if result < 0 {
                        return Err(last("KVM_RESET_DIRTY_RINGS"));
                    }
                    given_back += u64::from(result.unsigned_abs());
                    calls += 1;
                }
                if given_back < held {
                    let source = std::io::ErrorKind::Interrupted.into();
                    return Err(KvmError::Ioctl { name: "KVM_RESET_DIRTY_RINGS", source });
                }
                for ring in rings {
                    ring.given_back = ring.next;
                }
                Ok(calls == 1)
            }
            Source::Bitmap { pending, .. } => {
                for ((slot, range), map) in (0_u32..).zip(self.layout.ranges()).zip(pending) {
                    clear_dirty_log(vm, slot, range.len / PAGE as u64, map)?;
                    map.fill(0);
                }
                Ok(true)
            }
        }
    }
}

fn get_dirty_log(vm: &VmFd, slot: u32, map: &mut [u64]) -> Result<(), KvmError> {
    let log = kvm_bindings::kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_bindings::kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: map.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the map has one bit per page of the slot, rounded up to 64 as KVM asks.
    let result = timed(|| unsafe { libc::ioctl(vm.as_raw_fd(), GET_DIRTY_LOG, &raw const log) });
    if result < 0 { Err(last("KVM_GET_DIRTY_LOG")) } else { Ok(()) }
}

fn clear_dirty_log(vm: &VmFd, slot: u32, pages: u64, map: &mut [u64]) -> Result<(), KvmError> {
    let clear = kvm_bindings::kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
        first_page: 0,
        __bindgen_anon_1: kvm_bindings::kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: map.as_mut_ptr().cast(),
        },
    };
    // SAFETY: as in `get_dirty_log`.
    let result =
        timed(|| unsafe { libc::ioctl(vm.as_raw_fd(), CLEAR_DIRTY_LOG, &raw const clear) });
    if result < 0 { Err(last("KVM_CLEAR_DIRTY_LOG")) } else { Ok(()) }
}

fn last(name: &'static str) -> KvmError {
    KvmError::Ioctl { name, source: std::io::Error::last_os_error() }
}
