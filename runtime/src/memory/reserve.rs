//! Memory put aside for pages that a fork will need.
//!
//! On a virtual machine whose free memory its own host takes back, a page that the kernel hands out
//! may have to be fetched from there first: 11 µs where one that was used lately costs 0.3. So what a
//! fork is likely to take is taken while there is time, and given back to this processor's list of
//! free pages just before: it is what the kernel hands out next.
#![expect(unsafe_code, reason = "maps memory, and gives it up")]

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::PAGE;

/// Pages of this process that nothing lies in.
#[derive(Debug)]
pub struct Reserve {
    area: Option<Area>,
    spent: AtomicBool,
}

#[derive(Debug)]
struct Area {
    start: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: whoever has the area has addresses alone; the calls on them are for all threads.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Reserve {
    /// Takes so many pages from the kernel, of at most `most`; none if it has too few.
    #[must_use]
    pub fn new(pages: usize, most: usize) -> Self {
        let area = Area::new(most * PAGE);
        let taken = area.as_ref().is_some_and(|area| area.take(pages.min(most) * PAGE));
        Self { area, spent: AtomicBool::new(!taken) }
    }

    /// Gives them back, the first time.
    pub fn spend(&self) {
        if let Some(area) = &self.area
            && !self.spent.swap(true, Ordering::Relaxed)
        {
            // SAFETY: our own mapping, in which nothing lies.
            unsafe { madvise(area.start, area.bytes, Advice::LinuxDontNeed) }.unwrap_or(());
        }
    }
}

impl Area {
    /// Addresses alone, as many as there can be pages: processes differ by what they hold, and not by
    /// their mappings.
    fn new(bytes: usize) -> Option<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
        let start = unsafe { mmap_anonymous(null_mut(), bytes, protection, flags) };
        let area = Self { start: start.ok()?, bytes };
        // Huge pages go to another list.
        // SAFETY: our own mapping; the advice does not change contents.
        unsafe { madvise(area.start, bytes, Advice::LinuxNoHugepage) }.unwrap_or(());
        Some(area)
    }

    /// Takes memory for the first `bytes`; tells whether there is any.
    fn take(&self, bytes: usize) -> bool {
        // SAFETY: part of our own mapping; the advice does not change contents.
        bytes > 0 && unsafe { madvise(self.start, bytes, Advice::LinuxPopulateWrite) }.is_ok()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing refers to any more.
        unsafe { munmap(self.start, self.bytes) }.unwrap_or(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of `reserve` that lie in memory.
    fn resident(reserve: &Reserve) -> usize {
        let Some(area) = &reserve.area else { return 0 };
        let mut seen = vec![0_u8; area.bytes / PAGE];
        // SAFETY: our own mapping, and a byte for each of its pages.
        let told = unsafe { libc::mincore(area.start, area.bytes, seen.as_mut_ptr()) };
        assert_eq!(told, 0);
        seen.iter().filter(|byte| **byte & 1 == 1).count()
    }

    #[test]
    fn it_has_its_pages_until_it_is_spent() {
        let reserve = Reserve::new(300, 1024);
        assert_eq!(resident(&reserve), 300);
        reserve.spend();
        assert_eq!(resident(&reserve), 0);
        reserve.spend();
        assert_eq!(resident(&Reserve::new(0, 1024)), 0);
        assert_eq!(resident(&Reserve::new(2000, 1024)), 1024);
    }
}
