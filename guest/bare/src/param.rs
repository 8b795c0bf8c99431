//! The parameter page, seen from the guest.
#![expect(unsafe_code, reason = "the runtime writes this page: only volatile accesses are allowed")]

use core::mem::offset_of;

use guest_abi::param::{Header, ParamPage, RESULTS, STEPS, Step};

const WORDS: usize = size_of::<ParamPage>() / 8;
const FIRST_STEP: usize = offset_of!(ParamPage, steps) / 8;
const STEP_WORDS: usize = size_of::<Step>() / 8;
const FIRST_RESULT: usize = offset_of!(ParamPage, results) / 8;

/// One vCPU's parameter page, accessed word by word and only by volatile loads and stores: the
/// runtime changes it while the vCPU is parked, behind the compiler's back.
pub(crate) struct Param {
    words: *mut u64,
}

impl Param {
    /// The parameter page at `page`.
    ///
    /// # Safety
    /// `page` is page-aligned and valid for reads and writes of a whole page for the rest of the
    /// machine's life, no reference into it exists, and no other vCPU of this machine uses it.
    pub(crate) unsafe fn new(page: *mut ParamPage) -> Self {
        Self { words: page.cast() }
    }

    /// The sequence number of the program that is there now.
    pub(crate) fn seq(&self) -> u64 {
        self.word(offset_of!(Header, seq) / 8)
    }

    /// The first part of the page.
    pub(crate) fn header(&self) -> Header {
        Header {
            seq: self.seq(),
            work_start: self.word(offset_of!(Header, work_start) / 8),
            work_pages: self.word(offset_of!(Header, work_pages) / 8),
            tsc_khz: self.word(offset_of!(Header, tsc_khz) / 8),
            vcpus: self.word(offset_of!(Header, vcpus) / 8),
            reserved: [0; 3],
        }
    }

    /// The `index`-th step of the program.
    ///
    /// # Panics
    /// If there is no such step.
    pub(crate) fn step(&self, index: usize) -> Step {
        assert!(index < STEPS, "step {index} of {STEPS}");
        let first = FIRST_STEP + index * STEP_WORDS;
        let [op0, op1, op2, op3, who0, who1, result0, result1] = self.word(first).to_le_bytes();
        Step {
            op: u32::from_le_bytes([op0, op1, op2, op3]),
            who: u16::from_le_bytes([who0, who1]),
            result: u16::from_le_bytes([result0, result1]),
            args: [1, 2, 3, 4].map(|word| self.word(first + word)),
        }
    }

    /// Stores a result word.
    ///
    /// # Panics
    /// If there is no such word.
    pub(crate) fn set_result(&self, index: usize, value: u64) {
        assert!(index < RESULTS, "result {index} of {RESULTS}");
        let place = self.words.wrapping_add(FIRST_RESULT + index);
        // SAFETY: the results lie inside the page (checked above), which is valid for writes, and
        // `place` is aligned because the page is.
        unsafe { place.write_volatile(value) };
    }

    fn word(&self, index: usize) -> u64 {
        assert!(index < WORDS, "word {index} of {WORDS}");
        let place = self.words.wrapping_add(index);
        // SAFETY: the word lies inside the page (checked above), which is valid for reads, and
        // `place` is aligned because the page is.
        unsafe { place.read_volatile() }
    }
}
