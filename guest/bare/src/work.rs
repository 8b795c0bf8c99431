//! Work pages: the memory that programs may use.
#![expect(unsafe_code, reason = "makes pointers from the guest-physical addresses it was given")]

use core::ptr;

use guest_abi::{
    entry::{self, HOLE_END, HOLE_START, PAGE},
    param::Header,
    pattern::WORDS,
};

use crate::error::Bad;

/// Where RAM can end at most: 64 page directories map 1 GiB each.
const MAPPED_END: u64 = 64 << 30;

/// The work pages of this machine, numbered over the hole.
#[derive(Clone, Copy)]
pub(crate) struct WorkArea {
    start: u64,
    pages: u64,
}

impl WorkArea {
    /// The work area that `header` describes, if it lies outside this image and inside memory that
    /// the page tables can map.
    pub(crate) fn new(header: &Header) -> Result<Self, Bad> {
        let Header { work_start: start, work_pages: pages, .. } = *header;
        let in_place = start.is_multiple_of(PAGE)
            && (image_end()..HOLE_START).contains(&start)
            && pages <= MAPPED_END / PAGE
            && entry::ram_page(start, pages) <= MAPPED_END;
        if in_place { Ok(Self { start, pages }) } else { Err(Bad::WorkArea { start, pages }) }
    }

    /// Number of pages.
    pub(crate) fn pages(self) -> u64 {
        self.pages
    }

    /// Page `number`.
    ///
    /// # Panics
    /// If there is no such page; programs are checked before it comes to that.
    pub(crate) fn page(self, number: u64) -> Page {
        assert!(number < self.pages, "work page {number} of {}", self.pages);
        Page(ptr::with_exposed_provenance_mut(native(entry::ram_page(self.start, number))))
    }

    /// The word at guest-physical `address`, which must be aligned and lie in the work area.
    pub(crate) fn word(self, address: u64) -> Result<Word, Bad> {
        let number = flat(address).and_then(|flat| flat.checked_sub(self.start)).map(|o| o / PAGE);
        match number {
            Some(number) if number < self.pages && address.is_multiple_of(8) => {
                Ok(self.page(number).word(address % PAGE / 8))
            }
            _ => Err(Bad::Address { address }),
        }
    }

    /// Reads the word at guest-physical `address`, which must be aligned and lie in RAM: not above
    /// the work area, whose end is the last byte of RAM that a guest knows of.
    pub(crate) fn peek(self, address: u64) -> Result<u64, Bad> {
        let below_end = flat(address).is_some_and(|flat| flat < self.start + self.pages * PAGE);
        // Address 0 is RAM, but to Rust it is no address.
        if !below_end || address == 0 || !address.is_multiple_of(8) {
            return Err(Bad::Address { address });
        }
        let place = ptr::with_exposed_provenance::<u64>(native(address));
        // SAFETY: aligned, not null and in RAM (checked above), all of which is mapped readable; a
        // volatile load of one word has no effect on whatever object it may belong to.
        Ok(unsafe { place.read_volatile() })
    }
}

/// `address` counted over the hole; `None` in it.
fn flat(address: u64) -> Option<u64> {
    match address {
        ..HOLE_START => Some(address),
        HOLE_START..HOLE_END => None,
        HOLE_END.. => Some(address - HOLE_END + HOLE_START),
    }
}

/// One work page. Volatile throughout: other vCPUs may use the same page at the same time, and a
/// page that is only dirtied is never read again in this program.
#[derive(Clone, Copy)]
pub(crate) struct Page(*mut u64);

impl Page {
    /// Reads word `word`.
    pub(crate) fn get(self, word: u64) -> u64 {
        self.word(word).get()
    }

    /// Writes word `word`.
    pub(crate) fn set(self, word: u64, value: u64) {
        self.word(word).set(value);
    }

    fn word(self, word: u64) -> Word {
        assert!(word < WORDS, "word {word} of a page");
        Word(self.0.wrapping_add(native(word)))
    }
}

/// One word of a work page.
#[derive(Clone, Copy)]
pub(crate) struct Word(*mut u64);

impl Word {
    /// Reads it.
    pub(crate) fn get(self) -> u64 {
        // SAFETY: a `Word` is only made by `Page::word` and `WorkArea::word`, which check that it
        // is aligned and inside the work area; that area is mapped RAM that no Rust object lives
        // in, because `WorkArea::new` keeps it behind the image and stacks lie below the image.
        unsafe { self.0.read_volatile() }
    }

    /// Writes it.
    pub(crate) fn set(self, value: u64) {
        // SAFETY: as for `get`; the work area is mapped writable.
        unsafe { self.0.write_volatile(value) };
    }
}

/// A guest-physical address (or a length) as this machine's pointers have it.
#[expect(clippy::cast_possible_truncation, reason = "x86-64: both are 64 bits wide")]
const fn native(value: u64) -> usize {
    value as usize
}

/// First address behind this image (set by the linker script).
fn image_end() -> u64 {
    unsafe extern "C" {
        safe static __image_end: u8;
    }
    (&raw const __image_end).addr() as u64
}
