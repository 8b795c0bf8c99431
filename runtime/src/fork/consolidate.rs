//! Consolidation: the memory of a zygote that owns many pages becomes a new sealed image.
//!
//! A page that the zygote owns costs more than one of the image wherever page tables are walked:
//! fork(2) of a standby copies its entry, a fork of the machine has to unmap it before it can give
//! it new contents, the end of every process takes it down again. Nothing of this depends on what
//! the fork at hand changed, so without consolidation a fork would cost more the longer its parent
//! has run.
//!
//! A process forked from the zygote writes the image; the zygote goes on meanwhile, and takes over
//! what was synced in between. That the image is sealed says that it is complete.
#![expect(unsafe_code, reason = "fork(2), and copies between two mappings")]

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::SeekFrom;

use super::apply::PageBits;
use super::zygote::Womb;
use crate::memory::{BackingKind, Image, Mapping, MemoryError, PAGE, Sealed, Writable};
use crate::sys::{self, Forked, SysError};

/// A consolidation is due when this many times as many entries were copied for standbys as the image
/// has pages: what it costs has been spent without it by then.
const WORTH: usize = 4;

/// Owned pages below which it is not worth the memory of a second image: an eighth of all, and a
/// number whose entries are copied in a fraction of a millisecond.
fn few(pages: usize) -> usize {
    (pages / 8).max(8192)
}

/// Bytes copied at once.
const CHUNK: usize = 2 << 20;

/// When a zygote consolidates, and how far that has come.
#[derive(Debug, Default)]
pub(super) struct Consolidation {
    /// Page table entries of owned pages copied for standbys since the last time.
    copied: usize,
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    image: Image<Writable>,
    /// The process that writes it.
    writer: OwnedFd,
    /// Pages that the zygote has taken in since then.
    since: PageBits,
}

impl Consolidation {
    /// Notes that the zygote has taken in `page`.
    pub(super) fn note(&mut self, page: u32) {
        if let Some(under_way) = &mut self.under_way {
            under_way.since.insert(page);
        }
    }

    /// Before a standby is forked: finishes what can be finished, begins what is due. It is an
    /// optimisation; when it fails, the zygote goes on with what it has.
    pub(super) fn step(&mut self, womb: &mut Womb) {
        match self.under_way.take() {
            Some(under_way) if !ended(&under_way.writer) => self.under_way = Some(under_way),
            Some(under_way) => take_over(womb, under_way).unwrap_or(()),
            None => {
                let (Some(mapping), Some(owned)) = (&womb.mapping, &womb.owned) else { return };
                self.copied += owned.len();
                let pages = mapping.bytes() / PAGE;
                let due = match womb.config.consolidate_pages {
                    0 => self.copied > WORTH * pages && owned.len() > few(pages),
                    asked => owned.len() > asked as usize,
                };
                if due {
                    self.copied = 0;
                    self.under_way = begin(womb).unwrap_or(None);
                }
            }
        }
    }
}

/// Whether a process has ended.
fn ended(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// How far the writer of an image stands back: a tenth of the share of others.
const NICE: i32 = 10;

/// Forks the process that writes the new image, if there is memory for it.
fn begin(womb: &Womb) -> Result<Option<UnderWay>, MemoryError> {
    let (Some(mapping), Some(old)) = (&womb.mapping, &womb.image) else { return Ok(None) };
    // Huge pages are few, and the pool has none to spare.
    let plain = matches!(old.kind(), BackingKind::Small | BackingKind::Thp);
    if !plain || sys::available_bytes() < 2 * old.bytes() {
        return Ok(None);
    }
    let image = Image::new(old.kind(), old.bytes())?;
    // SAFETY: a zygote never starts a thread.
    match unsafe { sys::fork() }? {
        Forked::Parent { child } => {
            let flags = rustix::process::PidfdFlags::empty();
            let writer =
                rustix::process::pidfd_open(child, flags).map_err(SysError::new("pidfd_open"))?;
            Ok(Some(UnderWay { image, writer, since: PageBits::new(mapping) }))
        }
        Forked::Child => {
            sys::die_with_parent(true);
            sys::set_process_name("ukp-image");
            let keep = [image.file().as_raw_fd(), old.file().as_raw_fd()];
            // SAFETY: only the two images are used from here on.
            unsafe { sys::close_all_but(&keep) };
            // Nobody waits for it, but for the locks of shared memory that it holds in the kernel:
            // under SCHED_IDLE a busy host would not let it give them back, nor end, for seconds.
            rustix::process::nice(NICE).unwrap_or(0);
            let written = write(&image, mapping, old, womb.owned.as_ref());
            let sealed = written.and_then(|()| image.seal().map_err(|unsealed| unsealed.error));
            std::process::exit(i32::from(sealed.is_err()))
        }
    }
}

/// Copies all memory that is not a hole to the new image.
fn write(
    image: &Image<Writable>,
    mapping: &Mapping,
    old: &Image<Sealed>,
    owned: Option<&PageBits>,
) -> Result<(), MemoryError> {
    let to = image.map_shared()?;
    let copy = |pages: Range<u32>| -> Result<(), MemoryError> {
        let begin = Instant::now();
        // Where this machine is virtual itself, the host has taken free memory back, and its first
        // touch costs 11 µs a page. Forks that are made meanwhile shall not meet it.
        sys::warm_free_memory(CHUNK);
        to.copy_range(mapping, pages)?;
        // Forks need processor, memory bandwidth and the kernel's warm free pages more.
        std::thread::sleep(begin.elapsed());
        Ok(())
    };
    let page = |offset: u64| u32::try_from(offset / PAGE as u64).unwrap_or(u32::MAX);
    let mut at = 0;
    while let Some((from, end)) = next_data(old, at)? {
        for start in (from..end).step_by(CHUNK) {
            copy(page(start)..page(end.min(start + CHUNK as u64)))?;
        }
        at = end;
    }
    // Pages where the old image has a hole.
    for page in owned.into_iter().flat_map(PageBits::iter) {
        to.copy_range(mapping, page..page + 1)?;
    }
    Ok(())
}

/// The next range of an image that is not a hole.
fn next_data(image: &Image<Sealed>, at: u64) -> Result<Option<(u64, u64)>, SysError> {
    let from = match rustix::fs::seek(image.file(), SeekFrom::Data(at)) {
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        from => from.map_err(SysError::new("lseek(SEEK_DATA)"))?,
    };
    let end = rustix::fs::seek(image.file(), SeekFrom::Hole(from))
        .map_err(SysError::new("lseek(SEEK_HOLE)"))?;
    Ok(Some((from, end)))
}

/// Puts a written image in the place of the zygote's memory.
fn take_over(womb: &mut Womb, under_way: UnderWay) -> Result<(), MemoryError> {
    let UnderWay { image, since, .. } = under_way;
    let Some(mapping) = &womb.mapping else { return Ok(()) };
    // Fails if the writer died before it was done.
    let image = image.adopt_sealed()?;
    let fresh = image.map_private()?;
    for page in since.iter() {
        // SAFETY: two mappings of the same size; this process has one thread.
        unsafe { mapping.copy_out(page, fresh.page(page)) };
    }
    womb.mapping = Some(fresh);
    womb.image = Some(image);
    womb.owned = Some(since);
    Ok(())
}
