//! `UFFDIO_COPY`: contents for a page that is not mapped, without a fault and without a copy of
//! what the file has there.
//!
//! The range is registered for write protection alone and nothing is protected, so no fault is ever
//! delivered to anybody.
#![expect(unsafe_code, reason = "the ioctls of userfaultfd")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use runtime::memory::{Mapping, PAGE};
use runtime::sys::SysError;

/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`.
const REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOWR(0xaa, 0x03, struct uffdio_copy)`.
const COPY: libc::c_ulong = 0xc028_aa03;
/// `UFFD_API`.
const VERSION: u64 = 0xaa;
/// `UFFDIO_REGISTER_MODE_WP`.
const WRITE_PROTECT: u64 = 1 << 1;
/// `UFFDIO_COPY_MODE_DONTWAKE`.
const DONT_WAKE: u64 = 1;
/// `UFFD_USER_MODE_ONLY`: allowed without privileges (Linux 5.11).
const USER_MODE_ONLY: libc::c_int = 1;

/// A userfaultfd over one mapping.
#[derive(Debug)]
pub(super) struct Uffd<'a> {
    file: OwnedFd,
    mapping: &'a Mapping,
}

impl<'a> Uffd<'a> {
    /// Registers `mapping`, none of which is a huge page.
    ///
    /// # Errors
    ///
    /// Where the kernel does not offer it.
    pub(super) fn new(mapping: &'a Mapping) -> Result<Self, SysError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: takes flags and returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(|| SysError::last("userfaultfd"))?;
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let this = Self { file, mapping };
        this.ioctl("UFFDIO_API", API, &mut [VERSION, 0, 0])?;
        let start = mapping.address().as_ptr() as u64;
        let mut register = [start, mapping.bytes() as u64, WRITE_PROTECT, 0];
        this.ioctl("UFFDIO_REGISTER", REGISTER, &mut register)?;
        Ok(this)
    }

    /// Fills page `page`, which is not mapped, from `from`.
    ///
    /// # Safety
    ///
    /// `from` is valid for [`PAGE`] bytes of reads.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the page is mapped.
    pub(super) unsafe fn copy(&self, page: u32, from: NonNull<u8>) -> Result<(), SysError> {
        let to = self.mapping.page(page).as_ptr() as u64;
        let mut copy = [to, from.as_ptr() as u64, PAGE as u64, DONT_WAKE, 0];
        self.ioctl("UFFDIO_COPY", COPY, &mut copy)
    }

    /// All structures of userfaultfd are rows of 64-bit numbers.
    fn ioctl<const N: usize>(
        &self,
        call: &'static str,
        request: libc::c_ulong,
        argument: &mut [u64; N],
    ) -> Result<(), SysError> {
        // The size is part of the number of an ioctl.
        debug_assert_eq!(request >> 16 & 0x3fff, size_of_val(argument) as libc::c_ulong);
        let argument: *mut u64 = argument.as_mut_ptr();
        // SAFETY: the structure that the request reads and writes, of the size in its number;
        // addresses in it are those of the registered mapping, and of a page that is valid by the
        // contract of `copy`.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) };
        if result < 0 { Err(SysError::last(call)) } else { Ok(()) }
    }
}
