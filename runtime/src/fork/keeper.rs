//! Keeping standbys ready: the part of the engine that runs on the control thread, off the fork
//! path.
//!
//! ```text
//!   fork made --> collect children --> sync zygote --> spawn standby --> ready
//!                                         ^                                |
//!                       sync round: pages dirtied since, every few ms <----+
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use uuid::Uuid;

use super::capture::{Capture, Copying};
use super::engine::{Engine, Handle, dismiss, hung_up, kill_leader, slot_failure};
use super::link::{Identity, Link, SLOTS, word};
use super::report::ForkReport;
use super::step::{ForkCause, ForkError, Step};
use super::zygote::Zygote;
use crate::instance::Instance;
use crate::proto::Event;
use crate::sys::{self, SysError, now_ns};

/// Pages copied while the engine is held: about 30 µs, which is how long a fork can be kept waiting.
const CHUNK: usize = 64;
/// Dirty pages that a sync round aims at leaving to a fork.
const AIM: u128 = 16;
/// Shortest and longest time between two sync rounds.
const ROUND_MIN: Duration = Duration::from_millis(2);
const ROUND_MAX: Duration = Duration::from_millis(500);
/// A round comes at the earliest after so many times what the last one took: where everything takes
/// long, as below an emulator, a guest would do little else than be followed.
const ROUND_SHARE: u32 = 8;
/// The same where most pages were in the round before, too. They are written again before the next
/// fork, which a round cannot change; what it costs is a fault for each of them. At least three of
/// four are, so a fork finds at most 1.75 times the pages (1 + 3/4) for rounds that are 4 times rarer.
const ROUND_SHARE_HOT: u32 = 32;
const ROUND_MAX_HOT: Duration = Duration::from_secs(8);
/// The first one after a fork: a guest that has just forked is about to write.
const ROUND_AFTER_FORK: Duration = Duration::from_millis(4);
/// Pause after a standby could not be made, unless a fork waits for one.
const RETRY: Duration = Duration::from_millis(200);
/// How often forks under way are looked at when nothing is heard of them.
const UNTOLD: Duration = Duration::from_millis(20);
/// The same when only vCPUs are to enter the guest again.
const RESUMED: Duration = Duration::from_millis(1);
/// How long the readers of a full journal may take.
const CATCH_UP_MS: u64 = 10_000;
/// Standbys after which the list of regions where the guest is active begins anew.
const REGION_MEMORY: u32 = 16;
/// Standbys that are made at the same time.
const PARALLEL: usize = 2;
/// Most standbys that are kept.
pub const MOST: usize = SLOTS - PARALLEL;

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    zygote: Zygote,
    /// epoll of the lines to standbys: ready when one of them has ended.
    lines: OwnedFd,
    preparing: Vec<Handle>,
    /// Standbys made since the list of active regions was begun.
    since_regions: u32,
    /// Dismissed standbys whose processes are not gone yet.
    leaving: Vec<Handle>,
    next_round_ns: u64,
    round: Duration,
    retry_at_ns: u64,
    sync: bool,
    target: usize,
    /// Counters for [`crate::proto::Stats`].
    pub rounds: u64,
    /// Pages shipped by sync rounds.
    pub synced_pages: u64,
    /// Time that the last standby took, in nanoseconds.
    pub prewarm_ns: u64,
    previous_round: Vec<u32>,
    /// What came to its end while something else was waited for.
    unreported: Tick,
}

/// What came of one look at things.
#[derive(Debug, Default)]
pub struct Tick {
    /// Forks that are over.
    pub forks: Vec<ForkReport>,
    /// Standbys that could not be made.
    pub failures: Vec<ForkError>,
    /// Something has happened that a waiting fork waits for: a standby is ready, a sync round over.
    pub news: bool,
    /// Forks are under way.
    pub under_way: bool,
    /// When to look again at the latest; `None`: only when the bell rings.
    pub wait: Option<Duration>,
}

impl Keeper {
    /// A keeper that wants `target` standbys.
    ///
    /// # Errors
    ///
    /// `EMFILE`.
    pub fn new(zygote: Zygote, link: &Link, target: u32, sync: bool) -> Result<Self, SysError> {
        let lines =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(SysError::new("epoll_create1"))?;
        Ok(Self {
            zygote,
            lines,
            preparing: Vec::new(),
            leaving: Vec::new(),
            since_regions: 0,
            next_round_ns: 0,
            round: ROUND_MIN,
            retry_at_ns: 0,
            sync,
            target: target as usize,
            rounds: 0,
            synced_pages: 0,
            prewarm_ns: 0,
            previous_round: link.header().hot_pages().collect(),
            unreported: Tick::default(),
        })
    }

    /// Readable when a standby has ended, until [`Keeper::clear_lines`].
    #[must_use]
    pub fn lines(&self) -> &OwnedFd {
        &self.lines
    }

    /// Takes note that standbys have ended: the next look finds out which.
    pub fn clear_lines(&self) {
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 8];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        while epoll::wait(&self.lines, events.as_mut_slice(), Some(&now))
            .is_ok_and(|count| count == events.len())
        {}
    }

    /// The zygote.
    #[must_use]
    pub fn zygote(&mut self) -> &mut Zygote {
        &mut self.zygote
    }

    /// Standbys being made.
    #[must_use]
    pub fn preparing(&self) -> usize {
        self.preparing.len()
    }

    /// Wants `target` standbys from now on.
    pub fn set_target(&mut self, target: u32) {
        self.target = (target as usize).min(MOST);
    }

    /// Switches sync rounds.
    pub fn set_sync(&mut self, on: bool) {
        self.sync = on;
    }

    /// Looks at everything once.
    pub fn tick(&mut self, instance: &Instance) -> Tick {
        let mut tick = Tick::default();
        let link = instance.link();
        let mut engine = instance.engine();
        tick.forks = engine.collect(instance);
        if !tick.forks.is_empty() {
            self.round = self.round.min(ROUND_AFTER_FORK);
            self.schedule();
        }
        let armed = engine.start_capture(instance);
        self.receive(link, &mut engine, &mut tick);
        let lacking = self.lacking(&engine);
        engine.unattended = self.target == 0 && lacking == 0 && self.preparing.is_empty();
        let wanted_round = engine.wants_round;
        drop(engine);
        if armed && let Err(error) = self.keep_or_raise(instance, lacking) {
            tick.failures.push(error);
        }
        let mut before = std::mem::take(&mut self.unreported);
        tick.forks.append(&mut before.forks);
        tick.failures.append(&mut before.failures);
        tick.news |= before.news;
        tick.news |= wanted_round;
        tick.under_way = instance.engine().in_flight();
        if !tick.failures.is_empty() {
            self.retry_at_ns = now_ns() + u64::try_from(RETRY.as_nanos()).unwrap_or(0);
            let mut engine = instance.engine();
            for error in &tick.failures {
                engine.note_prewarm_failure(error);
            }
        }
        tick.wait = self.next_look(instance);
        tick
    }

    /// How many standbys are to be made now.
    fn lacking(&self, engine: &Engine) -> usize {
        // A waiting fork does not wait for the end of the pause after a failure: it is told.
        if now_ns() < self.retry_at_ns && engine.wanted == 0 {
            return 0;
        }
        // The children of a fork need the processors more, until they have applied its pages.
        if engine.undecided() {
            return 0;
        }
        let target = self.target.max(engine.wanted).min(MOST);
        target
            .saturating_sub(engine.ready.len() + self.preparing.len())
            .min(PARALLEL.saturating_sub(self.preparing.len()))
    }

    /// Takes over standbys that are ready or could not be made, and drops those that died.
    fn receive(&mut self, link: &Link, engine: &mut Engine, tick: &mut Tick) {
        let ready = &mut engine.ready;
        for handle in std::mem::take(&mut self.preparing) {
            let slot = link.slot(handle.slot);
            match slot.word.load(Ordering::Acquire) {
                word::PARKED | word::SYNC => {
                    self.prewarm_ns = slot.prewarm_ns.load(Ordering::Relaxed);
                    ready.push(handle);
                    tick.news = true;
                }
                _ if hung_up(&handle.line) => {
                    tick.failures.push(slot_failure(slot));
                    slot.word.store(word::EMPTY, Ordering::Release);
                }
                _ => self.preparing.push(handle),
            }
        }
        ready.retain(|handle| {
            let dead = hung_up(&handle.line);
            if dead {
                link.slot(handle.slot).word.store(word::EMPTY, Ordering::Release);
            }
            !dead
        });
        let excess = ready.len().saturating_sub(self.target.max(engine.wanted));
        for handle in ready.drain(..excess) {
            dismiss(&handle.line);
            self.leaving.push(handle);
        }
        // A slot is its process's until that is gone.
        self.leaving.retain(|handle| {
            let gone = hung_up(&handle.line);
            if gone {
                link.slot(handle.slot).word.store(word::EMPTY, Ordering::Release);
            }
            !gone
        });
    }

    /// As [`Keeper::keep`]; a zygote that is gone is replaced once.
    fn keep_or_raise(&mut self, instance: &Instance, lacking: usize) -> Result<(), ForkError> {
        match self.keep(instance, lacking) {
            Err(ForkError { cause: ForkCause::ZygoteGone, .. }) => {
                self.raise_zygote(instance).map_err(ForkError::at(Step::Prewarm))?;
                self.keep(instance, lacking)
            }
            result => result,
        }
    }

    /// Replaces the zygote: the new one gets the sealed image, and through the journal every page
    /// of ours that differs from it.
    fn raise_zygote(&mut self, instance: &Instance) -> Result<(), ForkCause> {
        let image = instance.sealed().ok_or(ForkCause::ZygoteGone)?;
        let link = instance.link();
        let mut engine = instance.engine();
        // Its standbys die with it; what they had not read is of no use to anybody.
        for handle in engine.ready.drain(..).chain(self.preparing.drain(..)) {
            dismiss(&handle.line);
            self.leaving.push(handle);
        }
        engine.tighten(instance)?;
        let Some(capture) = &mut engine.capture else { return Err(ForkCause::ZygoteGone) };
        // First the reset, then the list: a page that becomes private in between is logged.
        capture.begin_round(instance.machine(), instance.ram())?;
        capture.add_stale(instance.mapping().private_pages()?.into_iter());
        let head = capture.head();
        drop(engine);
        self.zygote = Zygote::raise(instance.config(), link, image, head)?;
        instance.set_zygote_pid(self.zygote.pid());
        instance.post(Event::Zygote { pid: self.zygote.pid().as_raw_nonzero().get() });
        Ok(())
    }

    fn keep(&mut self, instance: &Instance, lacking: usize) -> Result<(), ForkError> {
        let due = self.sync && now_ns() >= self.next_round_ns.max(self.retry_at_ns);
        let (standbys, wanted) = {
            let engine = instance.engine();
            (!engine.ready.is_empty(), engine.wants_round)
        };
        if lacking > 0 || wanted || due && standbys {
            self.round(instance).map_err(ForkError::at(Step::Prewarm))?;
        }
        self.since_regions += u32::try_from(lacking).unwrap_or(0);
        if self.since_regions > REGION_MEMORY && self.preparing.is_empty() {
            // Where the guest was active long ago, page tables would be a waste.
            instance.link().header().clear_regions();
            self.since_regions = 0;
        }
        for _ in 0..lacking {
            self.spawn(instance).map_err(ForkError::at(Step::Prewarm))?;
        }
        Ok(())
    }

    /// One sync round: everything that is dirty now goes to the zygote and the standbys.
    ///
    /// # Errors
    ///
    /// What the dirty log or the zygote says.
    pub fn round(&mut self, instance: &Instance) -> Result<(), ForkCause> {
        let link = instance.link();
        let begin = now_ns();
        let mut engine = instance.engine();
        engine.tighten(instance)?;
        let Some(capture) = &mut engine.capture else { return Ok(()) };
        let pages = capture.begin_round(instance.machine(), instance.ram())?;
        let hot = self.learn(link, capture.last_round(), pages);
        let head = loop {
            let Some(capture) = &mut engine.capture else { return Ok(()) };
            let copying = capture.copy_some(instance.mapping(), link, CHUNK);
            if copying == Copying::Done {
                break capture.head();
            }
            drop(engine);
            if copying == Copying::JournalFull {
                self.catch_up(instance)?;
            }
            engine = instance.engine();
        };
        let waited_for = engine.wants_round;
        drop(engine);
        self.rounds += 1;
        self.synced_pages += pages as u64;
        self.pace(pages, hot, Duration::from_nanos(now_ns().saturating_sub(begin)));
        link.header().journal_used.fetch_max(head, Ordering::Relaxed);
        self.zygote.sync(head)?;
        let mut engine = instance.engine();
        Self::sync_standbys(link, &engine, head);
        self.rewind(link, &mut engine);
        let fits = engine.capture.as_ref().is_none_or(|capture| capture.fits(link, None));
        drop(engine);
        if waited_for {
            // Until there is room in the journal, a vCPU whose ring is full stands still.
            if !fits {
                self.catch_up(instance)?;
            }
            instance.engine().wants_round = false;
        }
        Ok(())
    }

    /// Waits until every reader has passed the journal's end and it has started again at 0.
    fn catch_up(&mut self, instance: &Instance) -> Result<(), ForkCause> {
        let link = instance.link();
        let begin = now_ns();
        loop {
            // Asked for each time: a fork may have put something behind it. And an end from before the
            // journal last started again is none: readers sent there miss what is put there next.
            let Some(head) = instance.engine().capture.as_ref().map(Capture::head) else {
                return Ok(());
            };
            self.zygote.sync(head)?;
            let mut engine = instance.engine();
            let mut seen = std::mem::take(&mut self.unreported);
            seen.forks.append(&mut engine.collect(instance));
            self.receive(link, &mut engine, &mut seen);
            self.unreported = seen;
            Self::sync_standbys(link, &engine, head);
            self.rewind(link, &mut engine);
            let rewound = engine.capture.as_ref().is_none_or(|capture| capture.head() == 0);
            drop(engine);
            if rewound {
                return Ok(());
            }
            let waited_ms = (now_ns() - begin) / 1_000_000;
            if waited_ms > CATCH_UP_MS {
                self.drop_deaf(instance, head);
                return Err(ForkCause::Timeout { waited_ms });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Ends standbys that have not read as far as `head`, or have not become ready: who is stopped or
    /// frozen would hold up every round to come.
    fn drop_deaf(&mut self, instance: &Instance, head: u32) {
        let link = instance.link();
        let mut engine = instance.engine();
        let behind = |handle: &mut Handle| {
            let slot = link.slot(handle.slot);
            slot.word.load(Ordering::Acquire) != word::PARKED
                || slot.tail.load(Ordering::Acquire) != head
        };
        let deaf: Vec<_> = engine.ready.extract_if(.., behind).collect();
        for handle in &deaf {
            kill_leader(link.slot(handle.slot).tid.load(Ordering::Relaxed), &handle.line);
        }
        for handle in deaf.into_iter().chain(self.preparing.drain(..)) {
            dismiss(&handle.line);
            self.leaving.push(handle);
        }
    }

    /// Chooses when the next round is due: often enough that few pages are left to a fork, seldom
    /// when little happens. A guest that begins to write is followed at once, one that stops slowly, and
    /// one that writes the same pages again and again seldom: `hot` of the last round's `pages` were in
    /// the one before.
    fn pace(&mut self, pages: usize, hot: usize, took: Duration) {
        let elapsed = self.round.as_nanos();
        let aim = elapsed * AIM / pages.max(1) as u128;
        let aim = Duration::from_nanos(u64::try_from(aim).unwrap_or(u64::MAX));
        let (share, most) = if hot > 0 && hot >= pages / 4 * 3 {
            (ROUND_SHARE_HOT, ROUND_MAX_HOT)
        } else {
            (ROUND_SHARE, ROUND_MAX)
        };
        let least = took.saturating_mul(share).clamp(ROUND_MIN, most);
        self.round = aim.min(self.round * 2).min(ROUND_MAX).max(least);
        self.schedule();
    }

    fn schedule(&mut self) {
        self.next_round_ns = now_ns() + u64::try_from(self.round.as_nanos()).unwrap_or(0);
    }

    /// Pages that were dirty in this round and the one before are hot: the next standby makes them
    /// private ahead. Returns their number.
    fn learn(&mut self, link: &Link, last: &[u32], pages: usize) -> usize {
        if pages == 0 {
            return 0;
        }
        let mut now = last.to_vec();
        now.sort_unstable();
        let before = &self.previous_round;
        let hot: Vec<u32> =
            now.iter().copied().filter(|page| before.binary_search(page).is_ok()).collect();
        link.header().set_hot_pages(hot.iter().copied());
        self.previous_round = now;
        hot.len()
    }

    fn sync_standbys(link: &Link, engine: &Engine, head: u32) {
        link.header().head.store(head, Ordering::Release);
        for handle in &engine.ready {
            let slot = link.slot(handle.slot);
            let behind = slot.tail.load(Ordering::Acquire) < head;
            if behind && slot.turn(word::PARKED, word::SYNC) {
                sys::futex_wake(&slot.word);
            }
        }
    }

    /// Lets the journal start again at 0 if nobody has anything left to read in it.
    fn rewind(&mut self, link: &Link, engine: &mut Engine) {
        let idle = !engine.undecided() && self.preparing.is_empty();
        let Some(capture) = &mut engine.capture else { return };
        let head = capture.head();
        let passed = |handle: &Handle| {
            let slot = link.slot(handle.slot);
            slot.word.load(Ordering::Acquire) == word::PARKED
                && slot.tail.load(Ordering::Acquire) == head
        };
        if head > 0 && idle && self.zygote.tail() == head && engine.ready.iter().all(passed) {
            for handle in &engine.ready {
                link.slot(handle.slot).tail.store(0, Ordering::Release);
            }
            link.header().head.store(0, Ordering::Release);
            capture.rewind();
            self.zygote.rewind();
        }
    }

    /// Has the zygote fork a standby.
    fn spawn(&mut self, instance: &Instance) -> Result<(), ForkCause> {
        let link = instance.link();
        let mut slots = 0..SLOTS;
        let free = |slot: &usize| link.slot(*slot).word.load(Ordering::Acquire) == word::EMPTY;
        // The children of forks under way have them all: one of them tells when it needs its no more.
        let Some(slot) = slots.find(free) else { return Ok(()) };
        let identity = Identity::new()?;
        let base = {
            let mut engine = instance.engine();
            instance.machine().save_clock(&mut engine.base.vm)?;
            engine.base.clone()
        };
        link.write_slot(slot, &identity, &base);
        let (ours, theirs) = sys::socket_pair()?;
        // Edge-triggered: the end of a standby is told once. Closing the line takes it out.
        let ended = epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.lines, &ours, epoll::EventData::new_u64(slot as u64), ended)
            .map_err(SysError::new("epoll_ctl"))?;
        let shared = link.slot(slot);
        shared.tail.store(self.zygote.tail(), Ordering::Relaxed);
        shared.failure.store(0, Ordering::Relaxed);
        shared.word.store(word::PREPARING, Ordering::Release);
        let parent = Uuid::from_bytes(instance.identity().uuid);
        let number = u32::try_from(slot).unwrap_or(u32::MAX);
        match self.zygote.spawn(number, parent, theirs.as_fd()) {
            Ok(_) => {
                self.preparing.push(Handle { slot, line: ours, identity });
                Ok(())
            }
            Err(cause) => {
                shared.word.store(word::EMPTY, Ordering::Release);
                Err(cause)
            }
        }
    }

    fn next_look(&self, instance: &Instance) -> Option<Duration> {
        let engine = instance.engine();
        if engine.waits_for_vcpus() {
            // Which say nothing, as they have better things to do.
            return Some(RESUMED);
        }
        if engine.in_flight() || !self.leaving.is_empty() {
            // What they do is told by the bell and the lines; this is for what nobody tells.
            return Some(UNTOLD);
        }
        let now = now_ns();
        let until = |at: u64| Duration::from_nanos(at.saturating_sub(now));
        let mut wait = None;
        if self.sync && !engine.ready.is_empty() {
            wait = Some(until(self.next_round_ns.max(self.retry_at_ns)));
        }
        // While as many as possible are being made, their end rings the bell.
        let more = self.preparing.len() < PARALLEL;
        if more
            && engine.capture.is_some()
            && engine.ready.len() + self.preparing.len() < self.target
        {
            let retry = until(self.retry_at_ns);
            wait = Some(wait.map_or(retry, |wait| wait.min(retry)));
        }
        wait
    }
}

impl Identity {
    /// A new one.
    ///
    /// # Errors
    ///
    /// `ENOSYS` if the kernel gives no random bytes: then nobody is made unique, and no fork
    /// succeeds.
    pub fn new() -> Result<Self, ForkCause> {
        let mut bytes = [0_u8; 72];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(
                &mut bytes[filled..],
                rustix::rand::GetRandomFlags::empty(),
            )
            .map_err(sys::SysError::new("getrandom"))?;
        }
        let mut identity = Self::default();
        let (uuid, rest) = bytes.split_at(16);
        let (generation, rest) = rest.split_at(8);
        let (entropy, vm_generation) = rest.split_at(32);
        let mut builder = [0_u8; 16];
        builder.copy_from_slice(uuid);
        identity.uuid = *uuid::Builder::from_random_bytes(builder).into_uuid().as_bytes();
        for byte in generation {
            identity.generation = identity.generation << 8 | u64::from(*byte);
        }
        identity.entropy.copy_from_slice(entropy);
        identity.vm_generation.copy_from_slice(vm_generation);
        Ok(identity)
    }
}
