//! userfaultfd, used for one thing: to give a page of a private mapping new contents without
//! reading the old ones first.
//!
//! A plain write to a page that this process does not own yet takes a fault, in which the kernel
//! copies the stale page, and then ours. `UFFDIO_COPY` allocates, fills and maps in one step. The
//! range is registered for write protection alone and nothing is ever protected, so no fault is
//! ever delivered.
#![expect(unsafe_code, reason = "the ioctls of userfaultfd")]

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use crate::memory::{Mapping, PAGE};
use crate::sys::SysError;

/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`.
const REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOWR(0xaa, 0x03, struct uffdio_copy)`.
const COPY: libc::c_ulong = 0xc028_aa03;
const API_VERSION: u64 = 0xaa;
const REGISTER_MODE_WP: u64 = 1 << 1;
const COPY_MODE_DONTWAKE: u64 = 1;
/// `UFFD_USER_MODE_ONLY`: allowed without privileges (Linux 5.11).
const USER_MODE_ONLY: libc::c_int = 1;

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// A userfaultfd over a whole mapping.
///
/// It stays open until the process ends: closing it walks all page tables of the mapping with the
/// memory map locked, at the very moment when a child has come to life.
#[derive(Debug)]
pub struct Uffd {
    file: ManuallyDrop<OwnedFd>,
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
    /// Registers `mapping`.
    ///
    /// # Errors
    ///
    /// `EPERM`, `EINVAL`, `ENOSYS` where the kernel does not offer it: do without.
    pub fn new(mapping: &Mapping) -> Result<Self, SysError> {
        // SAFETY: takes flags and returns a new descriptor.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_userfaultfd,
                libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(|| SysError::last("userfaultfd"))?;
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = UffdApi { api: API_VERSION, features: 0, ioctls: 0 };
        // SAFETY: the structure that UFFDIO_API reads and writes.
        let result = unsafe { libc::ioctl(fd, API, &raw mut api) };
        if result < 0 {
            return Err(SysError::last("UFFDIO_API"));
        }
        let mut register = UffdRegister {
            start: mapping.address().as_ptr() as u64,
            len: mapping.bytes() as u64,
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: the structure that UFFDIO_REGISTER reads and writes, over our own mapping.
        let result = unsafe { libc::ioctl(fd, REGISTER, &raw mut register) };
        if result < 0 {
            return Err(SysError::last("UFFDIO_REGISTER"));
        }
        Ok(Self { file: ManuallyDrop::new(file) })
    }

    /// Fills the unmapped page at `to` from `from`.
    ///
    /// # Safety
    ///
    /// `to` is a page of the registered mapping, `from` is valid for [`PAGE`] bytes of reads.
    ///
    /// # Errors
    ///
    /// `ENOMEM` above all.
    pub unsafe fn copy(&self, to: NonNull<u8>, from: NonNull<u8>) -> Result<Copied, SysError> {
        let mut copy = UffdCopy {
            to: to.as_ptr() as u64,
            from: from.as_ptr() as u64,
            len: PAGE as u64,
            mode: COPY_MODE_DONTWAKE,
            copied: 0,
        };
        loop {
            // SAFETY: the structure that UFFDIO_COPY reads and writes; addresses by contract.
            let result = unsafe { libc::ioctl(self.file.as_raw_fd(), COPY, &raw mut copy) };
            if result == 0 {
                return Ok(Copied::Done);
            }
            let error = SysError::last("UFFDIO_COPY");
            match error.errno() {
                libc::EEXIST => return Ok(Copied::Mapped),
                // The memory map is being changed by another thread.
                libc::EAGAIN => {}
                _ => return Err(error),
            }
        }
    }
}
