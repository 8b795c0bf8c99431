//! Bringing a process's memory up to date from the journal.
//!
//! Cost per page, measured (see ARCHITECTURE.md): 0.2 µs if the page is private to this process
//! already, about 2 µs by `UFFDIO_COPY` if it is not mapped, 3 µs and more by writing otherwise.
#![expect(unsafe_code, reason = "copies between the journal and guest memory")]

use super::link::Link;
use super::step::ForkCause;
use super::uffd::{Copied, Uffd};
use crate::memory::{BackingKind, Mapping, MemoryError, PAGE};
use crate::sys::SysError;

/// Writes journal entries to a mapping and knows which pages are private already.
#[derive(Debug)]
pub struct Applier {
    uffd: Option<Uffd>,
    private: Vec<u64>,
}

/// What was applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Pages written.
    pub pages: u32,
    /// Of which were private to this process before.
    pub private: u32,
}

impl Applier {
    /// An applier for `mapping`, of which no page is private to this process.
    #[must_use]
    pub fn new(mapping: &Mapping) -> Self {
        // A huge page is copied as a whole or not at all, so filling 4 KiB of it is no use there.
        let uffd = match mapping.kind() {
            BackingKind::Hugetlb => None,
            BackingKind::Small | BackingKind::Thp => Uffd::new(mapping).ok(),
        };
        Self { uffd, private: vec![0; (mapping.bytes() / PAGE).div_ceil(64)] }
    }

    /// An applier that writes plainly, for a process that is forked again and again: what is
    /// private in it does not stay so.
    #[must_use]
    pub fn plain(mapping: &Mapping) -> Self {
        Self { uffd: None, private: vec![0; (mapping.bytes() / PAGE).div_ceil(64)] }
    }

    /// Remembers that `page` is private; tells whether it was known.
    fn own(&mut self, page: u32) -> bool {
        let word = &mut self.private[page as usize / 64];
        let bit = 1 << (page % 64);
        let known = *word & bit != 0;
        *word |= bit;
        known
    }

    /// Makes `page` private ahead of the fork.
    pub fn touch(&mut self, mapping: &Mapping, page: u32) {
        mapping.touch(page);
        self.own(page);
    }

    /// Notes that `page` was written by the guest and so is private.
    pub fn note(&mut self, page: u32) {
        self.own(page);
    }

    /// Pages that are private to this process: all that may differ from what its zygote has.
    pub fn private_pages(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.private).flat_map(|(index, word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
        })
    }

    /// Applies journal entries `from..to`.
    ///
    /// # Errors
    ///
    /// A page number beyond the image, or what `UFFDIO_COPY` says.
    pub fn apply(
        &mut self,
        link: &Link,
        mapping: &Mapping,
        from: u32,
        to: u32,
    ) -> Result<Applied, ForkCause> {
        let mut applied = Applied::default();
        for entry in from..to {
            let entry = entry as usize;
            let page = link.number(entry).load(std::sync::atomic::Ordering::Relaxed);
            if page as usize >= mapping.bytes() / PAGE {
                return Err(MemoryError::Sys(SysError {
                    call: "applying a page beyond the image",
                    source: std::io::ErrorKind::InvalidData.into(),
                })
                .into());
            }
            let contents = link.contents(entry);
            applied.pages += 1;
            if self.own(page) {
                applied.private += 1;
            } else if let Some(uffd) = &self.uffd {
                // SAFETY: the page is part of the registered mapping (checked above), the
                // contents are a page of the journal.
                match unsafe { uffd.copy(mapping.page(page), contents) }? {
                    Copied::Done => continue,
                    Copied::Mapped => {}
                }
            }
            // SAFETY: a page of the journal, which lies in another mapping.
            unsafe { mapping.copy_in(page, contents) };
        }
        Ok(applied)
    }
}
