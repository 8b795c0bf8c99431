//! A mapped image.
#![expect(unsafe_code, reason = "mmap and access to memory that the guest writes at any time")]

use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

use super::{BackingKind, MemoryError, PAGE};
use crate::sys::SysError;

/// Guest RAM in this process. One contiguous mapping: page `n` of the image is at `n * PAGE`.
///
/// The guest writes to it while we read: access is by copying whole pages or through
/// [`super::GuestRam`], never by reference.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
    kind: BackingKind,
}

// SAFETY: the mapping is plain memory, valid in every thread until it is dropped, and no method
// hands out a reference into it.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies race with the guest anyway and are treated as such.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn shared(
        file: BorrowedFd<'_>,
        bytes: u64,
        kind: BackingKind,
    ) -> Result<Self, MemoryError> {
        Self::map(file, bytes, kind, MapFlags::SHARED)
    }

    pub(super) fn private(
        file: BorrowedFd<'_>,
        bytes: u64,
        kind: BackingKind,
    ) -> Result<Self, MemoryError> {
        Self::map(file, bytes, kind, MapFlags::PRIVATE)
    }

    fn map(
        file: BorrowedFd<'_>,
        bytes: u64,
        kind: BackingKind,
        flags: MapFlags,
    ) -> Result<Self, MemoryError> {
        let no_memory =
            || SysError { call: "mmap", source: std::io::ErrorKind::OutOfMemory.into() };
        let len = usize::try_from(bytes).map_err(|_| no_memory())?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks a free range.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }
                .map_err(SysError::new("mmap"))?;
        let address = NonNull::new(address.cast::<u8>()).ok_or_else(no_memory)?;
        let mapping = Self { address, bytes: len, kind };
        if kind.backing().advise_huge() {
            // Without it pages are small.
            mapping.advise(0, len, Advice::LinuxHugepage).unwrap_or(());
        }
        // What a guest knows is not for whoever reads cores, and nobody waits for gigabytes of it.
        mapping.advise(0, len, Advice::LinuxDontDump).unwrap_or(());
        Ok(mapping)
    }

    /// Replaces this shared mapping by a private one of the same file at the same address. KVM
    /// memslots over the range stay valid (KVM follows through the MMU notifier).
    ///
    /// No vCPU may run meanwhile: a guest write between the last shared and the first private
    /// moment would hit a hole.
    ///
    /// The private mapping is made elsewhere and then moved into place. Mapped over the old one at
    /// once it would leave a hole if it could not be had: for a file of huge pages, mmap(2) unmaps
    /// what is there before it asks the pool for the reservation (`__mmap_region` in mm/vma.c, then
    /// `hugetlbfs_file_mmap`, Linux 6.18). To move huge pages needs Linux 5.16.
    ///
    /// # Errors
    ///
    /// What mmap(2) says, `ENOMEM` for one if the pool has too few huge pages to reserve; or
    /// mremap(2). The old mapping then still stands.
    pub fn make_private(&self, file: BorrowedFd<'_>) -> Result<(), MemoryError> {
        let private = Self::map(file, self.bytes as u64, self.kind, MapFlags::PRIVATE)?;
        let (from, to) = (private.address.as_ptr().cast(), self.address.as_ptr().cast());
        // SAFETY: the source is a mapping of our own that nothing refers to yet. The target is
        // another one of the same size, page-aligned and apart from it, to whose contents nobody
        // holds references; what is there now has the same contents.
        let moved = unsafe {
            rustix::mm::mremap_fixed(from, self.bytes, self.bytes, MremapFlags::MAYMOVE, to)
        };
        moved.map_err(SysError::new("mremap"))?;
        // It lies where `self` does, which unmaps it.
        std::mem::forget(private);
        Ok(())
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<(), SysError> {
        assert!(offset + len <= self.bytes);
        // SAFETY: in bounds by the assertion, and none of the advice values used here changes the
        // contents of the range.
        let address = unsafe { self.address.as_ptr().add(offset) };
        // SAFETY: the range is mapped by us.
        unsafe { rustix::mm::madvise(address.cast(), len, advice) }
            .map_err(SysError::new("madvise"))
    }

    /// Copies pages `pages` of another mapping of the same size, where nobody uses this one. The
    /// page faults are taken all at once, which costs a fraction of one by one.
    ///
    /// # Errors
    ///
    /// `ENOMEM` above all.
    ///
    /// # Panics
    ///
    /// If the range is beyond either mapping.
    pub fn copy_range(&self, from: &Self, pages: std::ops::Range<u32>) -> Result<(), SysError> {
        let offset = pages.start as usize * PAGE;
        let len = pages.len() * PAGE;
        from.advise(offset, len, Advice::LinuxPopulateRead)?;
        self.advise(offset, len, Advice::LinuxPopulateWrite)?;
        for page in pages {
            // SAFETY: a page of each, both in bounds.
            unsafe { copy_page(from.page(page), self.page(page)) };
        }
        Ok(())
    }

    /// Host address of the first byte, for memslots.
    #[must_use]
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Backing of the mapped image.
    #[must_use]
    pub fn kind(&self) -> BackingKind {
        self.kind
    }

    /// Address of image page `page`.
    ///
    /// # Panics
    ///
    /// If the image has no such page; page numbers from the dirty log are checked before.
    #[must_use]
    pub fn page(&self, page: u32) -> NonNull<u8> {
        let offset = page as usize * PAGE;
        assert!(offset < self.bytes, "page {page} is beyond the image");
        // SAFETY: in bounds by the assertion (the length is a multiple of the page size).
        unsafe { self.address.add(offset) }
    }

    /// The same, for calls that take many.
    #[must_use]
    pub fn iovec(&self, page: u32) -> libc::iovec {
        libc::iovec { iov_base: self.page(page).as_ptr().cast(), iov_len: PAGE }
    }

    /// Copies page `page` to `to`, whatever the guest does to it meanwhile.
    ///
    /// # Safety
    ///
    /// `to` is valid for [`PAGE`] bytes of writes and does not overlap the mapping.
    pub unsafe fn copy_out(&self, page: u32, to: NonNull<u8>) {
        // SAFETY: the source is in bounds, the destination by this function's contract.
        unsafe { copy_page(self.page(page), to) };
    }

    /// Copies a page to page `page`.
    ///
    /// # Safety
    ///
    /// `from` is valid for [`PAGE`] bytes of reads and does not overlap the mapping.
    pub unsafe fn copy_in(&self, page: u32, from: NonNull<u8>) {
        // SAFETY: the destination is in bounds, the source by this function's contract.
        unsafe { copy_page(from, self.page(page)) };
    }

    /// Pages that are private to this process, or were when it was forked: all that differ from the
    /// image below. As /proc/self/pagemap tells: present and not of the file, or swapped out.
    ///
    /// # Errors
    ///
    /// If /proc is not there.
    pub fn private_pages(&self) -> Result<Vec<u32>, SysError> {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const OF_FILE: u64 = 1 << 61;
        let fail = |source| SysError { call: "reading /proc/self/pagemap", source };
        let file = std::fs::File::open("/proc/self/pagemap").map_err(fail)?;
        let first = self.address.as_ptr() as u64 / PAGE as u64;
        let mut pages = Vec::new();
        let mut buffer = vec![0_u8; 64 * 1024];
        let count = self.bytes / PAGE;
        let mut page = 0;
        while page < count {
            let part = (count - page).min(buffer.len() / 8) * 8;
            file.read_exact_at(&mut buffer[..part], (first + page as u64) * 8).map_err(fail)?;
            for entry in buffer[..part].chunks_exact(8) {
                let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
                if entry & SWAPPED != 0 || entry & PRESENT != 0 && entry & OF_FILE == 0 {
                    pages.push(u32::try_from(page).unwrap_or(u32::MAX));
                }
                page += 1;
            }
        }
        Ok(pages)
    }

    /// Maps page `page` for reading, and with it the page tables of its neighbourhood.
    pub fn look(&self, page: u32) {
        // SAFETY: in bounds, and a byte of whatever value may be read.
        unsafe { self.page(page).as_ptr().read_volatile() };
    }

    /// Makes page `page` private to this process, contents unchanged.
    pub fn touch(&self, page: u32) {
        // An atomic add of 0 is a write that changes nothing, whoever else writes. If the compiler
        // knew that it is 0, it would make a read of it.
        // SAFETY: mapped, and accessed atomically.
        let byte = unsafe { AtomicU8::from_ptr(self.page(page).as_ptr()) };
        byte.fetch_add(std::hint::black_box(0), Ordering::Relaxed);
    }
}

/// Brings a page into this processor's caches while it does something else. It was written by
/// another one: waiting for its lines takes longer than copying them.
pub fn prefetch_page(page: NonNull<u8>) {
    for line in (0..PAGE).step_by(64) {
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                page.as_ptr().wrapping_add(line).cast(),
            );
        }
    }
}

/// Copies a page. In assembly, because the guest or another process may write to either side
/// meanwhile: for the compiler's own copy that would be a data race.
///
/// # Safety
///
/// Both pointers are valid for [`PAGE`] bytes, and the ranges do not overlap.
unsafe fn copy_page(from: NonNull<u8>, to: NonNull<u8>) {
    // SAFETY: reads and writes exactly PAGE bytes at pointers that are valid for them; the
    // direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rsi") from.as_ptr() => _,
            inout("rdi") to.as_ptr() => _,
            inout("rcx") PAGE => _,
            options(nostack, preserves_flags),
        );
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we own the range, and nothing can still point into it: KVM holds no reference
        // (MMU notifier) and no method hands one out.
        let result = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}
