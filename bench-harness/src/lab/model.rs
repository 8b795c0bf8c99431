//! What guest memory must hold, computed without reading it.

use std::collections::HashMap;
use std::ops::Range;

use guest_abi::pattern::{Pages, expected_sum};

/// Seeds that are tried.
const TRIES: u64 = 1 << 16;

/// The work pages of one machine. A fork copies it, as it copies the machine.
#[derive(Clone, Debug)]
pub(super) struct Model {
    seed: u64,
    pages: u64,
    /// Pages that were dirtied since the fill, with their last generation.
    generations: HashMap<u64, u64>,
    /// Pages that WORK counts in.
    worked: Range<u64>,
    passes: u64,
    /// Pages that hold words nobody knows: other vCPUs write there all the time.
    unknown: Range<u64>,
}

impl Model {
    /// Pages as FILL leaves them; the first `unknown` of them are not to be looked at.
    pub(super) fn new(seed: u64, pages: u64, unknown: u64) -> Self {
        Self {
            seed,
            pages,
            generations: HashMap::new(),
            worked: 0..0,
            passes: 0,
            unknown: 0..unknown,
        }
    }

    /// The first seed from `seed` on whose first `count` random pages are all known.
    pub(super) fn known_seed(&self, seed: u64, count: u64) -> u64 {
        let known = |seed: &u64| self.pick(*seed, count).all(|page| !self.unknown.contains(&page));
        // A count so large that no seed avoids them does not occur: scenarios are checked.
        (seed..seed + TRIES).find(known).unwrap_or(seed)
    }

    /// After `DIRTY_RANDOM`, or RATE that came as far as `count` pages.
    pub(super) fn dirty(&mut self, count: u64, generation: u64, seed: u64) {
        for page in Pages::new(seed, self.pages).take(take(count)) {
            self.generations.insert(page, generation);
        }
    }

    /// After WORK.
    pub(super) fn work(&mut self, pages: Range<u64>, passes: u64) {
        debug_assert!(self.worked.is_empty() || self.worked == pages);
        self.worked = pages;
        self.passes += passes;
    }

    /// The word that WORK counts in.
    pub(super) fn counter(&self, page: u64) -> u64 {
        if self.worked.contains(&page) { self.passes } else { 0 }
    }

    /// Whether all pages are known.
    pub(super) fn is_known(&self) -> bool {
        self.unknown.is_empty()
    }

    /// What CHECK of `count` random pages must give; of all pages if `count` is 0.
    pub(super) fn check(&self, count: u64, seed: u64) -> u64 {
        let sum = |page| {
            let generation = self.generations.get(&page).copied().unwrap_or(0);
            expected_sum(self.seed, page, generation, self.counter(page))
        };
        match count {
            0 => (0..self.pages).map(sum).fold(0, u64::wrapping_add),
            count => self.pick(seed, count).map(sum).fold(0, u64::wrapping_add),
        }
    }

    fn pick(&self, seed: u64, count: u64) -> impl Iterator<Item = u64> + use<> {
        Pages::new(seed, self.pages).take(take(count))
    }
}

fn take(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_last_counts() {
        let mut model = Model::new(7, 1000, 0);
        let clean = model.check(50, 3);
        model.dirty(50, 1, 3);
        let once = model.check(50, 3);
        model.dirty(50, 2, 3);
        assert_ne!(clean, once);
        assert_ne!(once, model.check(50, 3));
        model.dirty(50, 1, 3);
        assert_eq!(once, model.check(50, 3));
        let all = model.check(0, 0);
        model.dirty(1, 3, 5);
        assert_ne!(all, model.check(0, 0));
    }

    #[test]
    fn a_child_has_the_history_of_its_fork() {
        let mut parent = Model::new(7, 1000, 0);
        parent.dirty(200, 1, 1);
        let child = parent.clone();
        parent.dirty(200, 2, 1);
        parent.work(0..1000, 16);
        assert_ne!(parent.check(1000, 9), child.check(1000, 9));
        assert_eq!((parent.counter(999), child.counter(999)), (16, 0));
    }

    #[test]
    fn unknown_pages_are_not_looked_at() {
        let model = Model::new(7, 100, 3);
        for start in 0..50 {
            let seed = model.known_seed(start, 20);
            assert!(Pages::new(seed, 100).take(20).all(|page| page >= 3));
        }
    }
}
