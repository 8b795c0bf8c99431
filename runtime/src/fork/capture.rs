//! Collecting the pages that changed, and shipping them through the journal.
//!
//! ```text
//!            harvest                  reset                    copy
//!   logged ----------> open pages ------------> stale pages ---------> journal
//!                      (writable, not logged    (write-protected,
//!                       until the reset)         not copied yet)
//! ```
//!
//! - A **sync round** runs beside the guest: it harvests, resets, then copies. A page that is
//!   written while it is copied is logged again, because the reset came first.
//! - A **fork** runs with all vCPUs stopped: it harvests and copies everything that is open or
//!   stale. It does not reset, so its pages stay open and are copied by the next round again.
//! - A **full ring** that nobody is about to read on from does not write-protect either: its pages
//!   stay open, too, and the log is **loose**. Before the next round it is made tight.
#![expect(unsafe_code, reason = "copies guest memory to the journal")]

use std::sync::atomic::Ordering;

use vm_memory::{GuestMemoryBackend, MmapRegion};

use super::link::Link;
use super::step::ForkCause;
use crate::kvm::{DirtyLog, Machine};
use crate::memory::{DeviceDirty, GuestRam, Mapping, PAGE, prefetch_page};

/// Pages after which a fork shows its children what it has captured so far.
const PUBLISH: u32 = 16;

/// The dirty pages of an instance, and the writing end of its journal.
#[derive(Debug)]
pub struct Capture {
    log: DirtyLog,
    open: PageSet,
    stale: PageSet,
    head: u32,
    /// Open pages are writable until the log is switched off and on again.
    loose: bool,
    /// It could not be switched on again: the guest has written what nobody knows of.
    unlogged: bool,
    /// Pages of the last round, to tell which are written again and again.
    last: Vec<u32>,
}

/// How far a sync round has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copying {
    /// All listed pages are in the journal.
    Done,
    /// Some are left.
    More,
    /// Some are left, and the readers have to catch up first.
    JournalFull,
}

/// A set of pages that is listed and cleared by its size, not by the size of memory.
#[derive(Debug)]
struct PageSet {
    list: Vec<u32>,
    bits: Vec<u64>,
}

impl PageSet {
    fn new(pages: usize, room: usize) -> Self {
        Self { list: Vec::with_capacity(room), bits: vec![0; pages.div_ceil(64)] }
    }

    fn insert(&mut self, page: u32) {
        let Some(word) = self.bits.get_mut(page as usize / 64) else { return };
        let bit = 1 << (page % 64);
        if *word & bit == 0 {
            *word |= bit;
            self.list.push(page);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let page = self.list.pop()?;
        self.bits[page as usize / 64] &= !(1 << (page % 64));
        Some(page)
    }

    fn clear(&mut self) {
        for page in self.list.drain(..) {
            self.bits[page as usize / 64] = 0;
        }
    }
}

impl Capture {
    /// Dirty pages as told by `log`, of an image of `pages` pages; `open` are known to be dirty
    /// already.
    #[must_use]
    pub fn new(log: DirtyLog, pages: usize, link: &Link, open: &[u32]) -> Self {
        // Room for everything that fits into the journal: no allocation on the fork path.
        let mut set = PageSet::new(pages, link.capacity());
        for page in open {
            set.insert(*page);
        }
        let stale = PageSet::new(pages, link.capacity());
        Self { log, open: set, stale, head: 0, loose: false, unlogged: false, last: Vec::new() }
    }

    /// End of the journal.
    #[must_use]
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Pages that a fork at this moment would have to copy, as far as is known without a harvest.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.open.list.len() + self.stale.list.len()
    }

    /// Starts the journal again at 0: all readers have passed its head.
    pub fn rewind(&mut self) {
        self.head = 0;
    }

    /// Takes in what was logged since the last time.
    ///
    /// # Errors
    ///
    /// What [`DirtyLog::harvest`] says.
    pub fn harvest(&mut self, machine: &Machine, ram: &GuestRam) -> Result<(), ForkCause> {
        let open = &mut self.open;
        self.log.harvest(machine.vm(), |page| open.insert(page))?;
        let mut first = 0;
        for region in ram.iter() {
            // The region below vm-memory's wrapper owns the bitmap.
            let region: &MmapRegion<DeviceDirty> = region;
            region.bitmap().drain(|page| {
                open.insert(u32::try_from(first + page).unwrap_or(u32::MAX));
            });
            first += region.size() / PAGE;
        }
        Ok(())
    }

    /// Copies every open and stale page to the journal, whose end it publishes now and then: the
    /// children apply while this goes on. All vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`ForkCause::JournalFull`].
    pub fn all(
        &mut self,
        machine: &Machine,
        ram: &GuestRam,
        mapping: &Mapping,
        link: &Link,
    ) -> Result<u32, ForkCause> {
        self.harvest(machine, ram)?;
        self.room(link, self.pending())?;
        let from = self.head;
        while let Some(page) = self.stale.pop() {
            self.append(link, mapping, page);
            self.publish_some(link);
        }
        for index in 0..self.open.list.len() {
            if let Some(next) = self.open.list.get(index + 1) {
                prefetch_page(mapping.page(*next));
            }
            self.append(link, mapping, self.open.list[index]);
            self.publish_some(link);
        }
        self.publish(link);
        Ok(self.head - from)
    }

    /// First half of a sync round: write-protects all open pages and lists them for copying.
    /// Returns their number. If not all could be, they stay open and the log is loose.
    ///
    /// # Errors
    ///
    /// What the dirty log says.
    pub fn begin_round(&mut self, machine: &Machine, ram: &GuestRam) -> Result<usize, ForkCause> {
        self.harvest(machine, ram)?;
        let pages = self.open.list.len();
        if (pages > 0 || self.log.holds_entries()) && !self.log.reset(machine.vm())? {
            self.loose = true;
        } else if pages > 0 {
            self.last.clear();
            self.last.extend_from_slice(&self.open.list);
            for page in &self.open.list {
                self.stale.insert(*page);
            }
            self.open.clear();
        }
        Ok(pages)
    }

    /// Makes room in full rings, for a machine that nobody is about to fork. Following what it writes
    /// would make it pay for every page again each time its rings are full, 2 to 7 µs where a write that
    /// is not logged takes some ns; not to costs 1 to 10 ms at its next fork.
    ///
    /// # Errors
    ///
    /// What the dirty log says.
    pub fn loosen(&mut self, machine: &Machine, ram: &GuestRam) -> Result<(), ForkCause> {
        self.harvest(machine, ram)?;
        self.log.release(machine.vm())?;
        self.loose = true;
        Ok(())
    }

    /// Whether open pages are not what a round can write-protect, see [`Capture::tighten`].
    #[must_use]
    pub fn is_loose(&self) -> bool {
        self.loose
    }

    /// All vCPUs are stopped: every page is write-protected, so that what is written after the next
    /// round is logged. What is logged already stays so.
    ///
    /// # Errors
    ///
    /// What `KVM_SET_USER_MEMORY_REGION` says. The log is loose still, and may be off: the next time
    /// every page of this process is taken for changed.
    pub fn tighten(
        &mut self,
        machine: &Machine,
        ram: &GuestRam,
        mapping: &Mapping,
    ) -> Result<(), ForkCause> {
        // KVM forgets a bitmap.
        self.harvest(machine, ram)?;
        let before = self.unlogged;
        self.unlogged = true;
        machine.track(mapping, false)?;
        machine.track(mapping, true)?;
        if before {
            self.add_stale(mapping.private_pages()?.into_iter());
        }
        (self.loose, self.unlogged) = (false, false);
        Ok(())
    }

    /// Lists `pages` for copying too, whether they changed or not.
    pub fn add_stale(&mut self, pages: impl Iterator<Item = u32>) {
        for page in pages {
            self.stale.insert(page);
        }
    }

    /// Second half: copies up to `most` of the listed pages.
    pub fn copy_some(&mut self, mapping: &Mapping, link: &Link, most: usize) -> Copying {
        for _ in 0..most.min(self.stale.list.len()) {
            if self.room_left(link) == 0 {
                return Copying::JournalFull;
            }
            if let Some(page) = self.stale.pop() {
                self.append(link, mapping, page);
            }
        }
        if self.stale.list.is_empty() { Copying::Done } else { Copying::More }
    }

    /// Whether all that is known to be dirty fits into the journal, and what vCPUs other than `own`
    /// may write before they have stopped. After a round that was waited for it does, however small
    /// the rings are: the journal holds twice their entries.
    #[must_use]
    pub fn fits(&self, link: &Link, own: Option<usize>) -> bool {
        self.pending() + self.log.still_to_come(own) <= self.room_left(link)
    }

    fn room_left(&self, link: &Link) -> usize {
        link.capacity() - self.head as usize
    }

    /// Pages of the last sync round.
    #[must_use]
    pub fn last_round(&self) -> &[u32] {
        &self.last
    }

    /// Shows the children of the fork under way how far the journal goes.
    pub fn publish(&self, link: &Link) {
        link.fork().head.store(self.head, Ordering::Release);
    }

    fn publish_some(&self, link: &Link) {
        if self.head.is_multiple_of(PUBLISH) {
            self.publish(link);
        }
    }

    fn room(&self, link: &Link, needed: usize) -> Result<(), ForkCause> {
        let room = self.room_left(link);
        if needed > room { Err(ForkCause::JournalFull { needed, room }) } else { Ok(()) }
    }

    fn append(&mut self, link: &Link, mapping: &Mapping, page: u32) {
        let entry = self.head as usize;
        link.number(entry).store(page, Ordering::Relaxed);
        link.header().mark_region(page);
        // SAFETY: a page of the journal, which lies in another mapping.
        unsafe { mapping.copy_out(page, link.contents(entry)) };
        self.head += 1;
    }
}
