//! Bringing a process's memory up to date from the journal.
//!
//! What a page costs depends on whose it is (figures of one noisy run, see ARCHITECTURE.md):
//!
//! | the page is | way | µs |
//! | --- | --- | --- |
//! | private to this process | copy | 0.2 |
//! | only in the sealed image | `UFFDIO_COPY`: allocate, fill and map in one step | 2.6 |
//! | the same, no page table there yet | the same | 3.5 |
//! | shared with the zygote | unmap many at once, then `UFFDIO_COPY` | 3.3 |
//! | the same | plain write: fault, copy of the stale page, then ours | 5.1 |
#![expect(unsafe_code, reason = "copies between the journal and guest memory")]

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::link::Link;
use super::step::ForkCause;
use crate::memory::{BackingKind, Copied, Mapping, MemoryError, PAGE, Uffd, prefetch_page};
use crate::sys::{self, SysError};

/// Pages unmapped with one call.
const BATCH: usize = 128;

/// A set of pages, for several threads.
#[derive(Debug)]
pub struct PageBits {
    words: Box<[AtomicU64]>,
    len: AtomicUsize,
}

impl PageBits {
    /// The empty set of pages of `mapping`.
    #[must_use]
    pub fn new(mapping: &Mapping) -> Self {
        let words = Box::new_zeroed_slice((mapping.bytes() / PAGE).div_ceil(64));
        // SAFETY: zeroes are valid atomics. They come untouched from the kernel: a set takes memory
        // for its members, not for all there could be.
        Self { words: unsafe { words.assume_init() }, len: AtomicUsize::new(0) }
    }

    /// Takes the page faults of using it now, unless it is large.
    fn populate(&self) {
        const MOST: usize = 16 * PAGE / size_of::<u64>();
        for word in self.words.iter().take(MOST).step_by(PAGE / size_of::<u64>()) {
            word.fetch_or(0, Ordering::Relaxed);
        }
    }

    /// Adds `page`.
    pub fn insert(&self, page: u32) {
        let Some(word) = self.words.get(page as usize / 64) else { return };
        let bit = 1 << (page % 64);
        if word.load(Ordering::Relaxed) & bit == 0
            && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
        {
            self.len.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Number of its pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        let word = self.words.get(page as usize / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1)
    }

    /// Its pages in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let words = self.words.iter().map(|word| word.load(Ordering::Relaxed));
        (0_u32..).zip(words).filter(|(_, word)| *word != 0).flat_map(|(index, word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
        })
    }
}

/// What was applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Pages written.
    pub pages: u32,
    /// Of which were private to this process before.
    pub private: u32,
    /// Of which another thread than the leader's wrote.
    pub helped: u32,
}

/// Writes journal entries to the mapping of a zygote: plainly, because it is forked again and again
/// and nothing stays private in it. Calls `note` for every page.
///
/// # Errors
///
/// A page number beyond the image.
pub fn apply_plainly(
    link: &Link,
    mapping: &Mapping,
    from: u32,
    to: u32,
    mut note: impl FnMut(u32),
) -> Result<(), ForkCause> {
    for entry in from..to {
        let page = page_of(link, mapping, entry)?;
        note(page);
        // SAFETY: a page of the journal, which lies in another mapping.
        unsafe { mapping.copy_in(page, link.contents(entry as usize)) };
    }
    Ok(())
}

/// Writes journal entries to the mapping of a standby, and knows which pages are private to that.
/// Several threads may, each with a [`Hand`] of its own.
#[derive(Debug)]
pub struct Applier {
    /// Open until the process ends: closing it walks all page tables of the mapping with the memory
    /// map locked, at the very moment when a child has come to life.
    uffd: Option<ManuallyDrop<Uffd>>,
    private: PageBits,
    /// Pages that its zygote owned when the standby was forked: mapped, and shared with it.
    inherited: PageBits,
}

/// What one thread that applies has put aside.
#[derive(Debug)]
pub struct Hand {
    /// Entries and their pages, which are shared with the zygote still.
    shared: Vec<(u32, u32)>,
    ranges: Vec<libc::iovec>,
}

impl Hand {
    /// With nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self { shared: Vec::with_capacity(BATCH), ranges: Vec::with_capacity(BATCH) }
    }
}

impl Applier {
    /// An applier for `mapping`, of which no page is private to this process and `inherited` are
    /// shared with its zygote.
    #[must_use]
    pub fn new(mapping: &Mapping, inherited: PageBits) -> Self {
        let private = PageBits::new(mapping);
        private.populate();
        // A huge page is copied as a whole or not at all, so filling 4 KiB of it is no use there.
        let uffd = match mapping.kind() {
            BackingKind::Hugetlb => None,
            BackingKind::Small | BackingKind::Thp => Uffd::new(mapping).ok().map(ManuallyDrop::new),
        };
        Self { uffd, private, inherited }
    }

    /// Makes `page` private ahead of the fork.
    pub fn touch(&self, mapping: &Mapping, page: u32) {
        mapping.touch(page);
        self.private.insert(page);
    }

    /// Notes that `page` was written by the guest and so is private.
    pub fn note(&self, page: u32) {
        self.private.insert(page);
    }

    /// Pages that are private to this process: all that may differ from what its zygote has.
    pub fn private_pages(&self) -> impl Iterator<Item = u32> + '_ {
        self.private.iter()
    }

    /// Applies journal entries `from..to`, except for what it puts aside in `hand` until
    /// [`Applier::finish`].
    ///
    /// # Errors
    ///
    /// A page number beyond the image, or what `UFFDIO_COPY` says. The mapping is of no use then.
    pub fn apply(
        &self,
        hand: &mut Hand,
        link: &Link,
        mapping: &Mapping,
        entries: Range<u32>,
    ) -> Result<Applied, ForkCause> {
        let mut applied = Applied::default();
        for entry in entries.clone() {
            let page = page_of(link, mapping, entry)?;
            applied.pages += 1;
            if entry + 1 < entries.end {
                prefetch_page(link.contents(entry as usize + 1));
            }
            if self.private.contains(page) {
                applied.private += 1;
                // SAFETY: a page of the journal, which lies in another mapping.
                unsafe { mapping.copy_in(page, link.contents(entry as usize)) };
            } else if self.uffd.is_some() && self.inherited.contains(page) {
                hand.shared.push((entry, page));
                if hand.shared.len() == BATCH {
                    self.finish(hand, link, mapping)?;
                }
            } else {
                self.fill(link, mapping, entry, page)?;
            }
        }
        Ok(applied)
    }

    /// Gives the pages that were put aside new contents.
    ///
    /// # Errors
    ///
    /// As [`Applier::apply`].
    pub fn finish(&self, hand: &mut Hand, link: &Link, mapping: &Mapping) -> Result<(), ForkCause> {
        if hand.shared.is_empty() {
            return Ok(());
        }
        hand.ranges.clear();
        hand.ranges.extend(hand.shared.iter().map(|(_, page)| mapping.iovec(*page)));
        // Before Linux 6.13 it cannot be done: a plain write takes longer, but does as well.
        // SAFETY: pages of our own private mapping. Until they are filled below they show what the
        // image has, which nobody sees: no vCPU runs, and who applies the same page fills it too.
        unsafe { sys::unmap_pages(&hand.ranges) }.unwrap_or(());
        for (entry, page) in hand.shared.drain(..) {
            self.fill(link, mapping, entry, page)?;
        }
        Ok(())
    }

    /// Gives a page that is not private yet new contents.
    fn fill(&self, link: &Link, mapping: &Mapping, entry: u32, page: u32) -> Result<(), ForkCause> {
        let contents = link.contents(entry as usize);
        self.private.insert(page);
        if let Some(uffd) = &self.uffd {
            // SAFETY: the page is part of the registered mapping (`page_of` checked), the contents
            // are a page of the journal.
            match unsafe { uffd.copy(mapping.page(page), contents) }? {
                Copied::Done => return Ok(()),
                Copied::Mapped => {}
            }
        }
        // SAFETY: a page of the journal, which lies in another mapping.
        unsafe { mapping.copy_in(page, contents) };
        Ok(())
    }
}

/// The page that a journal entry is about.
fn page_of(link: &Link, mapping: &Mapping, entry: u32) -> Result<u32, ForkCause> {
    let page = link.number(entry as usize).load(Ordering::Relaxed);
    if (page as usize) < mapping.bytes() / PAGE {
        return Ok(page);
    }
    Err(MemoryError::Sys(SysError {
        call: "applying a page beyond the image",
        source: std::io::ErrorKind::InvalidData.into(),
    })
    .into())
}
