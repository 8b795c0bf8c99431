//! Memory of this process and of its twins.
#![expect(unsafe_code, reason = "reads another process's memory, and gives pages up")]

use std::io;
use std::path::Path;

use super::SysError;

/// Memory that can be had without swapping, as the kernel estimates it, within the limits of this
/// process's control groups (version 2); 0 if /proc is not there.
#[must_use]
pub fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    available.min(left_in_groups(Path::new("/sys/fs/cgroup"), Path::new(path)))
}

/// What the tightest of a control group and those above it leaves.
fn left_in_groups(root: &Path, group: &Path) -> u64 {
    let left = |group: &Path| -> Option<u64> {
        let read = |file| std::fs::read_to_string(root.join(group).join(file)).ok();
        // `max` where there is no limit.
        let most: u64 = read("memory.max")?.trim().parse().ok()?;
        let used: u64 = read("memory.current")?.trim().parse().ok()?;
        Some(most.saturating_sub(used))
    };
    group.ancestors().filter_map(left).min().unwrap_or(u64::MAX)
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

/// Maps this program's code, as far as it lies in memory: what runs for the first time when it counts
/// takes no page fault then. A forked process has none of it mapped.
pub fn populate_program() {
    unsafe extern "C" {
        // Set by the linker.
        static __executable_start: u8;
        static etext: u8;
    }
    let (start, end) = (&raw const __executable_start, &raw const etext);
    let length = (end as usize).saturating_sub(start as usize);
    // SAFETY: the program's own image, which is mapped for as long as it runs; the advice does not
    // change contents. An error costs the page faults that would have been.
    unsafe {
        rustix::mm::madvise(start.cast_mut().cast(), length, rustix::mm::Advice::LinuxPopulateRead)
    }
    .unwrap_or(());
}

/// Writes to the part of this thread's stack that deeper calls are going to use: a page that is touched
/// for the first time when it counts costs a fault then.
#[inline(never)]
pub fn populate_stack() {
    /// The deepest call of a fork, with room.
    const BYTES: usize = 32 * 1024;
    let mut room = std::mem::MaybeUninit::<[u8; BYTES]>::uninit();
    for offset in (0..BYTES).step_by(crate::memory::PAGE) {
        let byte = room.as_mut_ptr().cast::<u8>().wrapping_add(offset);
        // SAFETY: inside the array, which nothing else uses, and which nobody reads.
        unsafe { byte.write_volatile(0) };
    }
}

/// Reads another process's memory, at the same addresses as in this one, into place.
///
/// # Safety
///
/// The ranges are mapped and writable here, and nothing else uses them meanwhile.
///
/// # Errors
///
/// `ESRCH` if the process is gone, `EPERM` if it may not be read, `EFAULT` if it has less mapped.
pub unsafe fn copy_from_twin(
    pid: rustix::process::Pid,
    ranges: &[libc::iovec],
) -> Result<(), SysError> {
    /// `IOV_MAX`.
    const MOST: usize = 1024;
    for part in ranges.chunks(MOST) {
        // SAFETY: the local side is writable by this function's contract; the remote side is
        // checked by the kernel.
        let read = unsafe {
            libc::process_vm_readv(
                pid.as_raw_nonzero().get(),
                part.as_ptr(),
                part.len() as libc::c_ulong,
                part.as_ptr(),
                part.len() as libc::c_ulong,
                0,
            )
        };
        all_of(part, read, "process_vm_readv")?;
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
/// `EINVAL` before Linux 6.13, which allows this only for hints, or for more than 1,024 ranges.
pub unsafe fn unmap_pages(ranges: &[libc::iovec]) -> Result<(), SysError> {
    /// `PIDFD_SELF_THREAD_GROUP` (Linux 6.15; before that a pidfd has to be opened).
    const PIDFD_SELF: libc::c_int = -10_001;
    // SAFETY: the ranges are valid; giving up the contents is allowed by this function's contract.
    let advised = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            PIDFD_SELF,
            ranges.as_ptr(),
            ranges.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    all_of(ranges, advised, "process_madvise")
}

/// Whether a call that tells how many bytes it did has done all of them.
fn all_of(
    ranges: &[libc::iovec],
    done: impl TryInto<usize>,
    call: &'static str,
) -> Result<(), SysError> {
    let bytes: usize = ranges.iter().map(|range| range.iov_len).sum();
    match done.try_into() {
        Ok(done) if done == bytes => Ok(()),
        Ok(_) => Err(SysError { call, source: io::ErrorKind::UnexpectedEof.into() }),
        Err(_) => Err(SysError::last(call)),
    }
}

#[cfg(test)]
mod tests {
    use super::left_in_groups;
    use std::fs;
    use std::path::Path;

    #[test]
    fn the_tightest_group_counts() -> std::io::Result<()> {
        let root = std::env::temp_dir().join(format!("ukp-test-{}", uuid::Uuid::new_v4().simple()));
        let group = |path: &str, most: &str, used: &str| {
            let path = root.join(path);
            fs::create_dir_all(&path)?;
            fs::write(path.join("memory.max"), most)?;
            fs::write(path.join("memory.current"), used)
        };
        group("outer", "5000\n", "1000\n")?;
        group("outer/middle", "max\n", "900\n")?;
        group("outer/middle/inner", "4500\n", "100\n")?;
        let left = |path| left_in_groups(&root, Path::new(path));
        assert_eq!(left("outer/middle/inner"), 4000);
        assert_eq!(left("outer"), 4000);
        group("outer/middle/inner", "500\n", "900\n")?;
        assert_eq!(left("outer/middle/inner"), 0);
        assert_eq!(left("elsewhere"), u64::MAX);
        fs::remove_dir_all(&root)
    }
}
