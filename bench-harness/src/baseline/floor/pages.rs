//! Capture and apply of pages, each alone, in random order.
#![expect(unsafe_code, reason = "copies between a mapped image and a buffer")]

use std::collections::HashSet;
use std::ptr::NonNull;

use runtime::memory::{BackingKind, Image, Mapping, PAGE, Sealed, Uffd};
use runtime::sys::{SysError, now_ns};
use rustix::mm::{MapFlags, ProtFlags};

use super::super::{BaselineError, Figure, us_since};
use crate::stats::rng::Rng;

/// Pages that are captured and applied: more than the caches next to a core hold.
const PAGES: usize = 2048;
/// Huge pages that are copied.
const HUGE_PAGES: usize = 64;
/// Pages per sample: one is shorter than reading the clock twice.
const BATCH: usize = 16;
/// The same where there are few pages because each is the only one of a huge page.
const HUGE_BATCH: usize = 4;
/// Pages of 4 KiB below one page table or one huge page.
const REGION: u32 = 512;

/// What a page costs.
#[derive(Clone, Debug)]
pub(super) struct PageCosts {
    pub(super) capture: Figure,
    pub(super) apply: Figure,
    pub(super) apply_hot: Figure,
}

/// Measures in a private mapping of `image` in this process, without a machine on it.
pub(super) fn measure(
    image: &Image<Sealed>,
    notes: &mut Vec<String>,
) -> Result<PageCosts, BaselineError> {
    let huge = image.kind() == BackingKind::Hugetlb;
    let mapping = image.map_private()?;
    let pages = if huge { one_per_region(&mapping) } else { random_pages(&mapping) };
    let buffer = Buffer::new(pages.len())?;
    // Once for nothing: memory that the machine never used costs ten times as much, and the pages
    // that this round gives back are those that the next one gets.
    apply_missing(&mapping, &pages, &buffer, &mut Vec::new())?;
    drop(mapping);
    let mapping = image.map_private()?;
    let apply = apply_missing(&mapping, &pages, &buffer, notes)?;
    let batch = if huge { HUGE_BATCH } else { BATCH };
    let apply_hot = timed(&pages, batch, |index, page| {
        // SAFETY: `buffer` has a page for each index.
        unsafe { copy(buffer.page(index), mapping.page(page)) };
        Ok(())
    })?;
    // As after the guest: a line of each page written lately, in another order.
    let mut order = pages;
    shuffle(&mut order);
    for page in &order {
        mapping.touch(*page);
    }
    shuffle(&mut order);
    let capture = timed(&order, batch, |index, page| {
        // SAFETY: `buffer` has a page for each index.
        unsafe { copy(mapping.page(page), buffer.page(index)) };
        Ok(())
    })?;
    Ok(PageCosts {
        capture: Figure::of("capture", &capture)?,
        apply: Figure::of("apply", &apply)?,
        apply_hot: Figure::of("apply to private pages", &apply_hot)?,
    })
}

/// Contents for pages that are not mapped: by `UFFDIO_COPY`, by writing where there is none.
fn apply_missing(
    mapping: &Mapping,
    pages: &[u32],
    buffer: &Buffer,
    notes: &mut Vec<String>,
) -> Result<Vec<f64>, BaselineError> {
    let write = |index, page| {
        // SAFETY: `buffer` has a page for each index.
        unsafe { copy(buffer.page(index), mapping.page(page)) };
        Ok(())
    };
    if mapping.kind() == BackingKind::Hugetlb {
        // A part of a huge page cannot be given alone: the write copies all of it.
        return timed(pages, 1, write);
    }
    // Page tables first: a standby has them, and whoever has not can make them ahead.
    for region in 0..total(mapping) / REGION {
        mapping.touch(region * REGION);
    }
    match Uffd::new(mapping) {
        Ok(uffd) => timed(pages, BATCH, |index, page| {
            // SAFETY: a page of the mapping, and `buffer` has one for each index.
            unsafe { uffd.copy(mapping.page(page), buffer.page(index)) }.map(|_| ())
        }),
        Err(error) => {
            notes.push(format!("apply was timed by plain writes, because {error}"));
            timed(pages, BATCH, write)
        }
    }
}

/// Carries out `step` for each page and returns the time per page in µs, batch by batch.
fn timed(
    pages: &[u32],
    batch: usize,
    mut step: impl FnMut(usize, u32) -> Result<(), SysError>,
) -> Result<Vec<f64>, BaselineError> {
    let mut samples = Vec::with_capacity(pages.len() / batch);
    let mut next = 0;
    for batch in pages.chunks_exact(batch.min(pages.len()).max(1)) {
        let start = now_ns();
        for page in batch {
            step(next, *page)?;
            next += 1;
        }
        #[expect(clippy::cast_precision_loss, reason = "a few pages")]
        samples.push(us_since(start) / batch.len() as f64);
    }
    Ok(samples)
}

fn total(mapping: &Mapping) -> u32 {
    u32::try_from(mapping.bytes() / PAGE).unwrap_or(u32::MAX)
}

/// Distinct pages in random order, none of them the first of its region.
fn random_pages(mapping: &Mapping) -> Vec<u32> {
    let total = total(mapping);
    let wanted = PAGES.min(total as usize / 4);
    let mut rng = Rng::new(u64::from(total));
    let mut seen = HashSet::with_capacity(wanted);
    let mut pages = Vec::with_capacity(wanted);
    while pages.len() < wanted {
        let page = below(&mut rng, total);
        if !page.is_multiple_of(REGION) && seen.insert(page) {
            pages.push(page);
        }
    }
    pages
}

/// One page of each huge page.
fn one_per_region(mapping: &Mapping) -> Vec<u32> {
    let mut pages: Vec<u32> =
        (0..total(mapping) / REGION).map(|region| region * REGION + 7).collect();
    shuffle(&mut pages);
    pages.truncate(HUGE_PAGES);
    pages
}

/// Fisher–Yates.
fn shuffle(pages: &mut [u32]) {
    let mut rng = Rng::new(pages.len() as u64);
    for last in (1..pages.len()).rev() {
        let other = below(&mut rng, u32::try_from(last + 1).unwrap_or(u32::MAX));
        pages.swap(last, other as usize);
    }
}

/// Uniform in `0..limit`.
fn below(rng: &mut Rng, limit: u32) -> u32 {
    // The high half of 32 random bits times the limit, which is below the limit.
    u32::try_from(((rng.bits() >> 32) * u64::from(limit)) >> 32).unwrap_or(0)
}

/// Copies a page.
///
/// # Safety
///
/// Both are valid for [`PAGE`] bytes, do not overlap, and nobody else uses them.
unsafe fn copy(from: NonNull<u8>, to: NonNull<u8>) {
    // SAFETY: by this function's contract.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), PAGE) };
}

/// Shared memory as a journal has it, every page there.
#[derive(Debug)]
struct Buffer {
    start: NonNull<u8>,
    pages: usize,
}

impl Buffer {
    fn new(pages: usize) -> Result<Self, SysError> {
        // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                pages * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
            )
        }
        .map_err(SysError::new("mmap"))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| SysError::last("mmap"))?;
        let buffer = Self { start, pages };
        for page in 0..pages {
            // SAFETY: inside the buffer, which nobody else uses.
            unsafe { buffer.page(page).as_ptr().write_bytes(0x5a, PAGE) };
        }
        Ok(buffer)
    }

    fn page(&self, page: usize) -> NonNull<u8> {
        assert!(page < self.pages);
        // SAFETY: inside the buffer by the assertion.
        unsafe { self.start.add(page * PAGE) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no pointer is left.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.pages * PAGE) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::memory::RamLayout;

    fn image(mib: u32) -> Image<Sealed> {
        Image::new(BackingKind::Small, RamLayout::new(mib).bytes()).unwrap().seal().unwrap()
    }

    #[test]
    fn pages_are_distinct_and_leave_the_first_of_each_region() {
        let mapping = image(64).map_private().unwrap();
        let pages = random_pages(&mapping);
        assert_eq!(pages.len(), PAGES);
        assert_eq!(pages.iter().collect::<HashSet<_>>().len(), PAGES);
        assert!(pages.iter().all(|page| page % REGION != 0 && *page < 64 * 256));
    }

    #[test]
    fn contents_arrive_by_uffd_and_a_mapped_page_is_refused() {
        let mapping = image(8).map_private().unwrap();
        let buffer = Buffer::new(1).unwrap();
        let uffd = Uffd::new(&mapping).unwrap();
        // SAFETY: the mapping and the buffer have such a page.
        let copy_it = || unsafe { uffd.copy(mapping.page(3), buffer.page(0)) }.unwrap();
        assert_eq!(copy_it(), runtime::memory::Copied::Done);
        let mut page = [0_u8; PAGE];
        // SAFETY: both are a page long, and the one is not the other.
        unsafe { copy(mapping.page(3), NonNull::from(&mut page).cast()) };
        assert_eq!(page, [0x5a; PAGE]);
        assert_eq!(copy_it(), runtime::memory::Copied::Mapped);
    }

    #[test]
    fn a_private_page_is_cheaper_than_a_missing_one() {
        // Whoever else runs here may take the processor for as long as one measurement takes.
        let all: Vec<_> = (0..10).map(|_| measure(&image(64), &mut Vec::new()).unwrap()).collect();
        for costs in &all {
            assert!(costs.apply_hot.p50_us > 0.0 && costs.capture.p50_us > 0.0);
        }
        let cheaper = all.iter().filter(|costs| costs.apply.p50_us > costs.apply_hot.p50_us);
        assert!(cheaper.count() > 5, "{all:?}");
    }
}
