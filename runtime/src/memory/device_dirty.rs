//! Pages that our own devices wrote. KVM's dirty tracking sees only what the guest writes.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::PAGE;

/// A bitmap of pages with one summary bit per 64, so that draining costs by what is set.
#[derive(Debug, Default)]
pub struct DeviceDirty {
    pages: Vec<AtomicU64>,
    summary: Vec<AtomicU64>,
    any: AtomicU64,
}

impl DeviceDirty {
    /// A clean bitmap for `bytes` of memory.
    #[must_use]
    pub fn for_bytes(bytes: usize) -> Self {
        let words = bytes.div_ceil(PAGE).div_ceil(64);
        let zeroes = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self { pages: zeroes(words), summary: zeroes(words.div_ceil(64)), any: AtomicU64::new(0) }
    }

    fn set(&self, page: usize) {
        let word = page / 64;
        let Some(bits) = self.pages.get(word) else { return };
        bits.fetch_or(1 << (page % 64), Ordering::Release);
        self.summary[word / 64].fetch_or(1 << (word % 64), Ordering::Release);
        self.any.store(1, Ordering::Release);
    }

    /// Calls `f` for every page that was written since the last call, and forgets them.
    pub fn drain(&self, mut f: impl FnMut(usize)) {
        if self.any.swap(0, Ordering::Acquire) == 0 {
            return;
        }
        for (index, summary) in self.summary.iter().enumerate() {
            let mut words = summary.swap(0, Ordering::Acquire);
            while words != 0 {
                let word = index * 64 + words.trailing_zeros() as usize;
                words &= words - 1;
                let mut bits = self.pages[word].swap(0, Ordering::Acquire);
                while bits != 0 {
                    f(word * 64 + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DeviceDirty {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DeviceDirty {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            for page in offset / PAGE..=(offset + len - 1) / PAGE {
                self.set(page);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        self.pages
            .get(page / 64)
            .is_some_and(|bits| bits.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DeviceDirty {
    fn with_len(len: usize) -> Self {
        Self::for_bytes(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drains_each_written_page_once() {
        let dirty = DeviceDirty::for_bytes(1 << 30);
        dirty.mark_dirty(5 * PAGE + 100, 1);
        dirty.mark_dirty(200_000 * PAGE - 1, 2);
        dirty.mark_dirty(0, 0);
        let mut pages = Vec::new();
        dirty.drain(|page| pages.push(page));
        assert_eq!(pages, [5, 199_999, 200_000]);
        dirty.drain(|page| panic!("page {page} drained twice"));
    }
}
