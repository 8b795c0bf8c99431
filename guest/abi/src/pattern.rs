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

/// One step of [`page_sum`]. Apart, because the guest sums several pages side by side: the
/// multiplications of one page depend on each other.
#[must_use]
pub const fn sum_word(sum: u64, word: u64) -> u64 {
    sum.rotate_left(5).wrapping_mul(0x0000_0100_0000_01b3) ^ word
}

/// Checksum of a page from its 512 words: position-dependent, so swapped words show.
#[must_use]
pub fn page_sum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0, sum_word)
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

/// An endless sequence of page numbers, the same in guest and harness. No page comes again before
/// all have come: a permutation of the next power of two, in which numbers that are no pages are
/// left out.
#[derive(Clone, Debug)]
pub struct Pages {
    state: u64,
    key: u64,
    bound: u64,
    mask: u64,
    half: u32,
}

impl Pages {
    /// Page numbers below `pages` (1 or more) picked by `seed`.
    #[must_use]
    pub const fn new(seed: u64, pages: u64) -> Self {
        let state = mix(seed ^ 0x5eed);
        let bits = u64::BITS - pages.saturating_sub(1).leading_zeros();
        let mask = if bits == 0 { 0 } else { u64::MAX >> (u64::BITS - bits) };
        let half = if bits < 2 { 1 } else { bits.div_ceil(2) };
        Self { state, key: mix(state), bound: pages, mask, half }
    }

    /// Each step maps the numbers up to `mask` onto themselves: a sum, a product with an odd
    /// number, a shift to the right added without carry.
    const fn permute(&self, x: u64) -> u64 {
        let x = x.wrapping_add(self.key) & self.mask;
        let x = x ^ (x >> self.half);
        let x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add(self.key >> 32) & self.mask;
        let x = x ^ (x >> self.half);
        let x = x.wrapping_mul(0x94d0_49bb_1331_11eb) & self.mask;
        x ^ (x >> self.half)
    }
}

impl Iterator for Pages {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        loop {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let page = self.permute(self.state & self.mask);
            // Of two numbers one is a page, at least.
            if page < self.bound {
                return Some(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::{collections::HashSet, vec::Vec};

    fn page(seed: u64, page: u64, generation: u64, counter: u64) -> Vec<u64> {
        let mut words: Vec<u64> = (0..WORDS).map(|word| base(seed, page, word)).collect();
        words[0] = mark(page, generation);
        words[511] = mark(page, generation);
        words[256] = counter;
        words
    }

    #[test]
    fn pages_stay_below_their_bound() {
        for pages in [1, 2, 3, 511, 512, 1 << 20, u64::MAX] {
            assert!(Pages::new(7, pages).take(10_000).all(|page| page < pages), "{pages}");
        }
        assert!(Pages::new(7, 1).take(100).all(|page| page == 0));
    }

    #[test]
    fn pages_are_the_same_for_a_seed_and_differ_between_seeds() {
        let of = |seed| Pages::new(seed, 1 << 30).take(64).collect::<Vec<_>>();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert_ne!(of(0), of(1));
    }

    #[test]
    fn no_page_comes_again_before_all_have_come() {
        for pages in [1_u16, 2, 3, 5, 64, 100, 1000, 4097] {
            for seed in 0..8 {
                let drawn = Pages::new(seed, pages.into()).take(pages.into());
                let all: HashSet<u64> = drawn.collect();
                assert_eq!(all.len(), usize::from(pages), "seed {seed}");
            }
        }
    }

    /// Chi-squared over 256 cells: 255 degrees of freedom, so mean 255, deviation about 22.6. Of so
    /// many pages few are drawn: what is left then hardly differs from what was there.
    #[test]
    fn pages_are_uniform() {
        const CELLS: usize = 256;
        const DRAWS: u64 = 256_000;
        for seed in 0..8 {
            let mut cells = [0_u64; CELLS];
            for page in Pages::new(seed, CELLS as u64 * 100_000).take(256_000) {
                cells[usize::try_from(page / 100_000).expect("below 256")] += 1;
            }
            let mean = DRAWS / CELLS as u64;
            let chi_squared = cells.iter().map(|&n| n.abs_diff(mean).pow(2)).sum::<u64>() / mean;
            assert!((150..360).contains(&chi_squared), "seed {seed}: {chi_squared}");
        }
    }

    #[test]
    fn expected_sum_is_the_sum_of_the_page() {
        for (seed, number, generation, counter) in
            [(0, 0, 0, 0), (1, 2, 3, 4), (u64::MAX, 1 << 30, u64::MAX, u64::MAX)]
        {
            let words = page(seed, number, generation, counter);
            assert_eq!(
                page_sum(words.into_iter()),
                expected_sum(seed, number, generation, counter)
            );
        }
    }

    #[test]
    fn every_word_and_its_place_count_in_the_sum() {
        let clean = page(1, 2, 3, 4);
        let sum = page_sum(clean.iter().copied());
        for word in 0..clean.len() {
            let mut flipped = clean.clone();
            flipped[word] ^= 1 << (word % 64);
            assert_ne!(page_sum(flipped.into_iter()), sum, "word {word}");
        }
        for word in 1..clean.len() {
            let mut swapped = clean.clone();
            swapped.swap(word - 1, word);
            assert_ne!(page_sum(swapped.into_iter()), sum, "words {} and {word}", word - 1);
        }
    }

    #[test]
    fn pages_seeds_and_generations_have_different_sums() {
        let mut sums = HashSet::new();
        for seed in 0..4 {
            for number in 0..4 {
                for generation in 0..4 {
                    for counter in 0..4 {
                        assert!(sums.insert(expected_sum(seed, number, generation, counter)));
                    }
                }
            }
        }
    }

    #[test]
    fn words_of_neighbouring_pages_do_not_repeat() {
        let mut words = HashSet::new();
        for number in 0..64 {
            for word in 0..WORDS {
                assert!(words.insert(base(42, number, word)), "page {number}, word {word}");
            }
        }
    }
}
