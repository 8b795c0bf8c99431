//! userfaultfd, used for one thing: to give a page of a private mapping new contents without
//! reading the old ones first.
//!
//! A plain write to a page that this process does not own yet takes a fault, in which the kernel
//! copies the stale page, and then ours. `UFFDIO_COPY` allocates, fills and maps in one step. The
//! range is registered for write protection alone and nothing is ever protected, so no fault is
//! ever delivered.
#![expect(unsafe_code, reason = "the ioctls of userfaultfd")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::{Mapping, PAGE};
use crate::sys::SysError;

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

/// A userfaultfd over a whole mapping.
#[derive(Debug)]
pub struct Uffd {
    file: OwnedFd,
}

/// What became of a copy.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    /// The page is there and private.
    Done,
    /// The page was mapped already; nothing was changed.
    Mapped,
}

impl Uffd {
    /// Registers `mapping`, none of which is a huge page.
    ///
    /// # Errors
    ///
    /// `EPERM`, `EINVAL`, `ENOSYS` where the kernel does not offer it: do without.
    pub fn new(mapping: &Mapping) -> Result<Self, SysError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: takes flags and returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(|| SysError::last("userfaultfd"))?;
        // SAFETY: a new descriptor that nobody else owns.
        let this = Self { file: unsafe { OwnedFd::from_raw_fd(fd) } };
        this.ioctl("UFFDIO_API", API, &mut [VERSION, 0, 0])?;
        let start = mapping.address().as_ptr() as u64;
        let mut register = [start, mapping.bytes() as u64, WRITE_PROTECT, 0];
        this.ioctl("UFFDIO_REGISTER", REGISTER, &mut register)?;
        Ok(this)
    }

    /// Fills the page at `to`, unless it is mapped, from `from`.
    ///
    /// # Safety
    ///
    /// `to` is a page of the registered mapping, `from` is valid for [`PAGE`] bytes of reads.
    ///
    /// # Errors
    ///
    /// `ENOMEM` above all.
    pub unsafe fn copy(&self, to: NonNull<u8>, from: NonNull<u8>) -> Result<Copied, SysError> {
        let (to, from) = (to.as_ptr() as u64, from.as_ptr() as u64);
        loop {
            let mut copy = [to, from, PAGE as u64, DONT_WAKE, 0];
            let Err(error) = self.ioctl("UFFDIO_COPY", COPY, &mut copy) else {
                return Ok(Copied::Done);
            };
            match error.errno() {
                libc::EEXIST => return Ok(Copied::Mapped),
                // The memory map is being changed by another thread.
                libc::EAGAIN => {}
                _ => return Err(error),
            }
        }
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
        // addresses in it are those of the registered mapping, and of pages that are valid by the
        // contract of `copy`.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) };
        if result < 0 { Err(SysError::last(call)) } else { Ok(()) }
    }
}
