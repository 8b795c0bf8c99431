//! Memory of this process and of its twins.
#![expect(unsafe_code, reason = "reads another process's memory, and gives pages up")]

use std::io;

use super::SysError;

/// Memory that can be had without swapping, as the kernel estimates it; 0 if /proc is not there.
#[must_use]
pub fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// Touches `bytes` of free memory and gives it back: what is allocated next is likely to be that.
pub fn warm_free_memory(bytes: usize) {
    use rustix::mm::{Advice, MapFlags, ProtFlags};
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // Twice, so that a whole huge page lies in it.
    let room = 2 * bytes;
    // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
    let start =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, protection, flags) };
    let Ok(start) = start else { return };
    // SAFETY: our own mapping; the advice is one, and does not change contents.
    unsafe { rustix::mm::madvise(start, room, Advice::LinuxHugepage) }.unwrap_or(());
    let aligned = start.wrapping_byte_add(start.align_offset(bytes));
    // SAFETY: inside our own mapping, by its size. Without memory nothing is touched.
    unsafe { rustix::mm::madvise(aligned, bytes, Advice::LinuxPopulateWrite) }.unwrap_or(());
    // SAFETY: our own mapping, which nothing refers to.
    unsafe { rustix::mm::munmap(start, room) }.unwrap_or(());
}

/// Reads `bytes` of another process's memory, at the same addresses as in this one, into place.
///
/// # Safety
///
/// The range is mapped and writable here, and nothing else uses it meanwhile.
///
/// # Errors
///
/// `ESRCH` if the process is gone, `EPERM` if it may not be read, `EFAULT` if it has less mapped.
pub unsafe fn copy_from_twin(
    pid: rustix::process::Pid,
    ranges: &[(std::ptr::NonNull<u8>, usize)],
) -> Result<(), SysError> {
    for part in ranges.chunks(512) {
        let vectors: Vec<libc::iovec> = part
            .iter()
            .map(|(start, bytes)| libc::iovec { iov_base: start.as_ptr().cast(), iov_len: *bytes })
            .collect();
        let expected: usize = part.iter().map(|(_, bytes)| bytes).sum();
        // SAFETY: the local side is writable by this function's contract; the remote side is
        // checked by the kernel.
        let read = unsafe {
            libc::process_vm_readv(
                pid.as_raw_nonzero().get(),
                vectors.as_ptr(),
                vectors.len() as libc::c_ulong,
                vectors.as_ptr(),
                vectors.len() as libc::c_ulong,
                0,
            )
        };
        match usize::try_from(read) {
            Ok(read) if read == expected => {}
            Ok(_) => {
                return Err(SysError {
                    call: "process_vm_readv",
                    source: io::ErrorKind::UnexpectedEof.into(),
                });
            }
            Err(_) => return Err(SysError::last("process_vm_readv")),
        }
    }
    Ok(())
}

/// Unmaps pages of this process's private mappings: they show what is below them again.
///
/// # Safety
///
/// Nothing that was written to the ranges is needed any more.
///
/// # Errors
///
/// `EINVAL` before Linux 6.13, which allows this only for hints.
pub unsafe fn unmap_pages(ranges: &[(std::ptr::NonNull<u8>, usize)]) -> Result<(), SysError> {
    /// `PIDFD_SELF_THREAD_GROUP` (Linux 6.15; before that a pidfd has to be opened).
    const PIDFD_SELF: libc::c_int = -10_001;
    let bytes: usize = ranges.iter().map(|(_, bytes)| bytes).sum();
    // A pointer and a length, in this order: the layout of an iovec.
    let vectors: Vec<libc::iovec> = ranges
        .iter()
        .map(|(start, bytes)| libc::iovec { iov_base: start.as_ptr().cast(), iov_len: *bytes })
        .collect();
    // SAFETY: the vectors are valid; giving up the contents is allowed by this function's contract.
    let advised = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            PIDFD_SELF,
            vectors.as_ptr(),
            vectors.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    match usize::try_from(advised) {
        Ok(advised) if advised == bytes => Ok(()),
        Ok(_) => {
            Err(SysError { call: "process_madvise", source: io::ErrorKind::UnexpectedEof.into() })
        }
        Err(_) => Err(SysError::last("process_madvise")),
    }
}
