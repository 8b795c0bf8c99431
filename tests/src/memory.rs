//! What a machine's memory must hold: the model that the isolation tests compare with.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest_abi::pattern::{Pages, expected_sum};

/// Contents of a work page behind the fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Generation in words 0 and 511.
    pub generation: u64,
    /// The work counter.
    pub counter: u64,
}

/// Work pages of one machine. Cloning it is what a fork does.
#[derive(Clone, Debug)]
pub struct Memory {
    seed: u64,
    /// Checksums after the fill.
    filled: Arc<Vec<u64>>,
    changed: BTreeMap<u64, Page>,
}

impl Memory {
    /// `pages` pages filled with `seed`.
    #[must_use]
    pub fn filled(seed: u64, pages: u64) -> Self {
        let filled = (0..pages).map(|page| expected_sum(seed, page, 0, 0)).collect();
        Self { seed, filled: Arc::new(filled), changed: BTreeMap::new() }
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.filled.len() as u64
    }

    /// Pages that were written after the fill.
    pub fn changed(&self) -> impl Iterator<Item = (u64, Page)> + '_ {
        self.changed.iter().map(|(number, page)| (*number, *page))
    }

    /// Contents of a page.
    #[must_use]
    pub fn page(&self, number: u64) -> Page {
        self.changed.get(&number).copied().unwrap_or_default()
    }

    /// `generation` to one page.
    pub fn mark(&mut self, number: u64, generation: u64) {
        self.changed.entry(number).or_default().generation = generation;
    }

    /// As `DIRTY_RANDOM`, and as `RATE` did for its first `count` pages.
    pub fn dirty(&mut self, count: u64, generation: u64, seed: u64) {
        let pages = Pages::new(seed, self.pages());
        for (number, _) in pages.zip(0..count) {
            self.mark(number, generation);
        }
    }

    /// As `DIRTY_STRIDE` with stride 1.
    pub fn dirty_row(&mut self, count: u64, generation: u64, first: u64) {
        for number in first..first + count {
            self.mark(number % self.pages(), generation);
        }
    }

    /// As `WORK` with one pass.
    pub fn work(&mut self, first: u64, count: u64) {
        for number in first..first + count {
            self.changed.entry(number).or_default().counter += 1;
        }
    }

    /// What `CHECK` of all pages must give.
    #[must_use]
    pub fn sum(&self) -> u64 {
        let filled = self.filled.iter().fold(0_u64, |sum, page| sum.wrapping_add(*page));
        self.changed.iter().fold(filled, |sum, (number, page)| {
            let before = usize::try_from(*number).ok().and_then(|at| self.filled.get(at));
            let now = expected_sum(self.seed, *number, page.generation, page.counter);
            sum.wrapping_sub(before.copied().unwrap_or(0)).wrapping_add(now)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_all_pages() {
        let mut memory = Memory::filled(9, 100);
        memory.dirty(30, 5, 77);
        memory.dirty_row(10, 6, 95);
        memory.work(3, 4);
        let all = (0..100).fold(0_u64, |sum, number| {
            let page = memory.page(number);
            sum.wrapping_add(expected_sum(9, number, page.generation, page.counter))
        });
        assert_eq!(memory.sum(), all);
        let copy = memory.clone();
        memory.mark(50, 7);
        assert_ne!(memory.sum(), copy.sum());
        assert_eq!(copy.sum(), all, "a fork's memory is its own");
    }
}
