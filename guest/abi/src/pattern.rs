//! Contents of work pages, so that guest and harness can each tell what a page must hold.
//!
//! A page filled with seed `s` and then dirtied with generation `g` holds
//!
//! - in words 0 and 511: [`mark`]`(page, g)` (`g` = 0 after the fill),
//! - in word [`WORK_WORD`]: a counter, 0 after the fill,
//! - in every other word `i`: [`base`]`(s, page, i)`.

/// Words of a page.
pub const WORDS: u64 = 512;
/// The word that [`crate::param::op::WORK`] counts in.
pub const WORK_WORD: u64 = 256;

/// A 64-bit mixing function (the finaliser of `SplitMix64`).
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Word `word` of page `page` after a fill with `seed`.
#[must_use]
pub const fn base(seed: u64, page: u64, word: u64) -> u64 {
    mix(seed ^ (page * WORDS + word).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// First and last word of page `page` at generation `generation`.
#[must_use]
pub const fn mark(page: u64, generation: u64) -> u64 {
    mix(page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation.rotate_left(32) ^ 0x00c0_ffee)
}

/// Checksum of a page from its 512 words: position-dependent, so swapped words show.
#[must_use]
pub fn page_sum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0, |sum: u64, word| sum.rotate_left(5).wrapping_mul(0x0000_0100_0000_01b3) ^ word)
}

/// What [`page_sum`] must give for a page, computed without reading it.
#[must_use]
pub fn expected_sum(seed: u64, page: u64, generation: u64, counter: u64) -> u64 {
    page_sum((0..WORDS).map(|word| match word {
        0 | 511 => mark(page, generation),
        WORK_WORD => counter,
        _ => base(seed, page, word),
    }))
}

/// An endless sequence of page numbers, the same in guest and harness.
#[derive(Clone, Debug)]
pub struct Pages {
    state: u64,
    pages: u64,
}

impl Pages {
    /// Page numbers below `pages` picked by `seed`.
    #[must_use]
    pub const fn new(seed: u64, pages: u64) -> Self {
        Self { state: mix(seed ^ 0x5eed), pages }
    }
}

impl Iterator for Pages {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // Multiply-shift instead of a remainder: no division in the guest's inner loop.
        Some(((u128::from(mix(self.state)) * u128::from(self.pages)) >> 64) as u64)
    }
}
