//! Applying the pages of a fork with two threads.
//!
//! Giving a page new contents takes the kernel 2 to 3 µs, whatever is done here, but two processors
//! do it side by side. So the leader takes the journal's entries in small portions while the parent
//! captures, and when many are left calls the control thread, which has nothing to do until the child
//! lives. It comes when there is a processor for it.
//!
//! ```text
//!   journal  ... |#####|#####|#####|-----|-----|.....          # taken, - captured, . to come
//!                 leader helper leader ^
//!                                      next
//! ```
//!
//! A page is at most twice among a fork's own entries, with the same contents; so it does not matter
//! in which order they are applied. Entries of sync rounds before are applied in order, by the leader.

use std::sync::atomic::{AtomicU32, Ordering};

use super::apply::{Applied, Applier, Hand};
use super::link::Link;
use super::shared::SPIN_NS;
use super::step::ForkCause;
use crate::memory::{Mapping, Reserve};
use crate::sys::{futex_wait, futex_wake, now_ns};

/// Entries taken at once.
const PORTION: u32 = 16;
/// Entries that are worth giving memory back for that was put aside for them.
const SOME: u32 = 8;
/// Entries left for which help is worth the call, which takes as long as ten of them.
const MANY: u32 = 64;
/// Value of `next` when nothing more can be taken.
const CLOSED: u32 = u32::MAX;

/// What the helper does.
mod helper {
    pub const AWAY: u32 = 0;
    pub const CALLED: u32 = 1;
    pub const AT_WORK: u32 = 2;
}

/// See the module.
#[derive(Debug)]
pub(super) struct Crew {
    applier: Applier,
    /// For the pages that will be filled.
    reserve: Reserve,
    /// First entry of the fork that nobody has taken.
    next: AtomicU32,
    /// See [`helper`].
    helper: AtomicU32,
    /// What both have applied, and how much of it the helper.
    pages: AtomicU32,
    private: AtomicU32,
    helped: AtomicU32,
}

impl Crew {
    pub(super) fn new(applier: Applier, reserve: Reserve) -> Self {
        Self {
            applier,
            reserve,
            next: AtomicU32::new(CLOSED),
            helper: AtomicU32::new(helper::AWAY),
            pages: AtomicU32::new(0),
            private: AtomicU32::new(0),
            helped: AtomicU32::new(0),
        }
    }

    pub(super) fn applier(&self) -> &Applier {
        &self.applier
    }

    /// The fork's own entries begin at `first`.
    pub(super) fn open(&self, first: u32) {
        self.next.store(first, Ordering::SeqCst);
    }

    /// Takes some of the captured entries and applies them; tells how many.
    pub(super) fn work(
        &self,
        hand: &mut Hand,
        link: &Link,
        mapping: &Mapping,
    ) -> Result<u32, ForkCause> {
        let head = link.fork().head.load(Ordering::Acquire);
        let portion = |next: u32| (next < head).then(|| head.min(next + PORTION));
        let Ok(from) = self.next.fetch_update(Ordering::SeqCst, Ordering::SeqCst, portion) else {
            return Ok(0);
        };
        let to = head.min(from + PORTION);
        if to - from >= SOME {
            self.reserve.spend();
        }
        let applied = self.applier.apply(hand, link, mapping, from..to)?;
        self.pages.fetch_add(applied.pages, Ordering::Relaxed);
        self.private.fetch_add(applied.private, Ordering::Relaxed);
        Ok(applied.pages)
    }

    /// Whether the leader should call the helper, who counts as called from now on.
    pub(super) fn wants_help(&self, link: &Link) -> bool {
        let head = link.fork().head.load(Ordering::Acquire);
        head.saturating_sub(self.next.load(Ordering::SeqCst)) >= MANY
            && self.changes(helper::AWAY, helper::CALLED)
    }

    /// The helper's part.
    pub(super) fn help(&self, link: &Link, mapping: &Mapping) -> Result<(), ForkCause> {
        if self.changes(helper::CALLED, helper::AT_WORK) {
            let mut hand = Hand::new();
            loop {
                match self.work(&mut hand, link, mapping)? {
                    0 => break,
                    pages => self.helped.fetch_add(pages, Ordering::Relaxed),
                };
            }
            self.applier.finish(&mut hand, link, mapping)?;
            self.helper.store(helper::AWAY, Ordering::SeqCst);
            // The leader may have waited for so long that it sleeps.
            futex_wake(&self.helper);
        }
        Ok(())
    }

    /// Ends the work: everything is in place when this returns.
    pub(super) fn close(
        &self,
        hand: &mut Hand,
        link: &Link,
        mapping: &Mapping,
    ) -> Result<Applied, ForkCause> {
        while self.work(hand, link, mapping)? > 0 {}
        self.applier.finish(hand, link, mapping)?;
        // A helper that comes after this finds nothing to take, not even of the parent's next fork.
        self.next.store(CLOSED, Ordering::SeqCst);
        let begin = now_ns();
        while self.helper.load(Ordering::SeqCst) == helper::AT_WORK {
            if now_ns() - begin > SPIN_NS {
                // It was put off its processor in the middle of a portion.
                futex_wait(&self.helper, helper::AT_WORK, None);
            }
            std::hint::spin_loop();
        }
        Ok(Applied {
            pages: self.pages.load(Ordering::Relaxed),
            private: self.private.load(Ordering::Relaxed),
            helped: self.helped.load(Ordering::Relaxed),
        })
    }

    fn changes(&self, from: u32, to: u32) -> bool {
        self.helper.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}
