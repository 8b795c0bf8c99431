//! A root instance to test.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ebpf_loader::Level;
use guest_abi::entry::{PARAM, ram_page};
use guest_abi::param::RESULTS;
use runtime::fork::Step;
use runtime::owner::Owner;
use runtime::proto::{InstanceConfig, Request, WireStep};
use rustix::process::{Pid, Signal};
use uuid::Uuid;

use crate::census::{self, Census, Process};
use crate::memory::Memory;
use crate::program::{check, fill, peek};

/// How long a test may have its instances.
const LIMIT: Duration = Duration::from_mins(2);
/// How long an answer may take.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Seed of the fill.
pub const SEED: u64 = 0x5eed;

/// A root instance with filled memory, its owner, and what is known of it. Whatever runs over its
/// time is killed, and when this is dropped nothing may be left.
#[derive(Debug)]
pub struct Rig {
    /// Runs it.
    pub owner: Owner,
    /// The root.
    pub root: Uuid,
    /// First work page.
    pub work_start: u64,
    /// Work pages.
    pub work_pages: u64,
    /// Frequency of the guest's TSC.
    pub tsc_khz: u64,
    // Dropped after the owner.
    group: Group,
}

impl Rig {
    /// Starts a root, fills its memory, and makes it forkable with its standbys ready.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn new(config: InstanceConfig) -> Result<Self> {
        Self::with_limit(config, LIMIT)
    }

    /// The same, with another limit of time.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn with_limit(config: InstanceConfig, limit: Duration) -> Result<Self> {
        let standbys = config.standbys;
        let rig = Self::filled(Owner::new()?, config, limit)?;
        rig.owner.ask(rig.root, Request::Arm).context("arming")?;
        rig.standbys(standbys)?;
        Ok(rig)
    }

    /// The same with probes, which see it from the beginning.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn probed(config: InstanceConfig, level: Level) -> Result<Self> {
        let standbys = config.standbys;
        let owner = Owner::new()?;
        owner.probe(level)?;
        let rig = Self::filled(owner, config, LIMIT)?;
        rig.owner.ask(rig.root, Request::Arm).context("arming")?;
        rig.standbys(standbys)?;
        Ok(rig)
    }

    /// Starts a root and fills its memory.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn unarmed(config: InstanceConfig) -> Result<Self> {
        Self::filled(Owner::new()?, config, LIMIT)
    }

    /// Starts a root whose memory nobody has touched, and makes it forkable with its standbys ready.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn blank(config: InstanceConfig) -> Result<Self> {
        let standbys = config.standbys;
        let rig = Self::started(Owner::new()?, config, LIMIT)?;
        rig.owner.ask(rig.root, Request::Arm).context("arming")?;
        rig.standbys(standbys)?;
        Ok(rig)
    }

    fn filled(owner: Owner, config: InstanceConfig, limit: Duration) -> Result<Self> {
        let rig = Self::started(owner, config, limit)?;
        let filled = rig.run(rig.root, &[fill(SEED)])?[0];
        ensure!(filled == rig.work_pages, "not all pages were filled");
        Ok(rig)
    }

    fn started(owner: Owner, config: InstanceConfig, limit: Duration) -> Result<Self> {
        let root = owner.start(config)?;
        let group = Group::new(owner.with(root, |known| known.pid)?, limit);
        let mut rig = Self { owner, root, work_start: 0, work_pages: 0, tsc_khz: 0, group };
        let words =
            rig.run(root, &[peek(PARAM + 8, 1), peek(PARAM + 16, 2), peek(PARAM + 24, 3)])?;
        (rig.work_start, rig.work_pages, rig.tsc_khz) = (words[1], words[2], words[3]);
        Ok(rig)
    }

    /// What its memory holds after the fill.
    #[must_use]
    pub fn memory(&self) -> Memory {
        Memory::filled(SEED, self.work_pages)
    }

    /// Address of word `word` of work page `page`.
    #[must_use]
    pub fn address(&self, page: u64, word: u64) -> u64 {
        ram_page(self.work_start, page) + word * 8
    }

    /// TSC ticks of `ms` milliseconds.
    #[must_use]
    pub fn ticks(&self, ms: u64) -> u64 {
        self.tsc_khz * ms
    }

    /// Wants `count` standbys and returns when they are ready.
    ///
    /// # Errors
    ///
    /// Why they cannot be made.
    pub fn standbys(&self, count: u32) -> Result<()> {
        self.owner.ask(self.root, Request::Standbys { count }).context("making standbys")?;
        Ok(())
    }

    /// Forks from the host, and waits until the children have called.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn branch(&self, uuid: Uuid, children: u32) -> Result<Vec<Uuid>> {
        let made = self.owner.branch(uuid, children)?;
        ensure!(made.len() == children as usize, "{} children of {children}", made.len());
        for child in &made {
            self.owner.wait_for(*child, PATIENCE)?;
        }
        Ok(made)
    }

    /// Starts a program on a vCPU.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn begin(&self, uuid: Uuid, vcpu: u32, steps: &[WireStep]) -> Result<u64> {
        self.owner.wait_for(uuid, PATIENCE)?;
        self.owner.program(uuid, vcpu, steps).context("starting a program")
    }

    /// Results of a program, all of them, of a machine that was there when it began or was forked
    /// while it ran.
    ///
    /// # Errors
    ///
    /// Why there are none.
    pub fn results(&self, uuid: Uuid, vcpu: u32, seq: u64) -> Result<Vec<u64>> {
        let who = if uuid == self.root { "the root" } else { "a child" };
        let mut words = self
            .owner
            .results(uuid, vcpu, seq, PATIENCE)
            .with_context(|| format!("program {seq} of vCPU {vcpu} of {who}"))?;
        words.resize(RESULTS, 0);
        Ok(words)
    }

    /// Runs a program on the first vCPU.
    ///
    /// # Errors
    ///
    /// Why it did not end.
    pub fn run(&self, uuid: Uuid, steps: &[WireStep]) -> Result<Vec<u64>> {
        self.run_on(uuid, 0, steps)
    }

    /// Runs a program on a vCPU.
    ///
    /// # Errors
    ///
    /// Why it did not end.
    pub fn run_on(&self, uuid: Uuid, vcpu: u32, steps: &[WireStep]) -> Result<Vec<u64>> {
        let seq = self.begin(uuid, vcpu, steps)?;
        self.results(uuid, vcpu, seq)
    }

    /// Fails unless the memory of a machine is what the model says, and then tells which pages.
    ///
    /// # Errors
    ///
    /// The difference.
    pub fn compare(&self, uuid: Uuid, memory: &Memory, what: &str) -> Result<()> {
        let found = self.run(uuid, &[check(0)]).with_context(|| what.to_owned())?[0];
        ensure!(found == memory.sum(), "{what}: {}", self.differences(uuid, memory)?);
        Ok(())
    }

    /// Pages whose first word is not what it must be.
    fn differences(&self, uuid: Uuid, memory: &Memory) -> Result<String> {
        const AT_ONCE: u64 = 36;
        let mut wrong = Vec::new();
        for first in (0..memory.pages()).step_by(usize::try_from(AT_ONCE)?) {
            let pages: Vec<_> = (first..memory.pages().min(first + AT_ONCE)).collect();
            let steps: Vec<_> =
                (0_u16..).zip(&pages).map(|(at, page)| peek(self.address(*page, 0), at)).collect();
            let words = self.run(uuid, &steps)?;
            for (page, word) in pages.iter().zip(words) {
                let wanted = memory.page(*page).generation;
                if word != guest_abi::pattern::mark(*page, wanted) {
                    let is = (0..100_000).find(|it| word == guest_abi::pattern::mark(*page, *it));
                    wrong.push(format!("page {page} has generation {is:?}, not {wanted}"));
                }
            }
        }
        let count = wrong.len();
        wrong.truncate(8);
        Ok(format!("{count} of {} pages are wrong in word 0: {wrong:?}", memory.pages()))
    }

    /// Kills an instance and forgets it.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn kill(&self, uuid: Uuid) -> Result<()> {
        self.owner.wait_for(uuid, PATIENCE)?;
        self.owner.kill(uuid)?;
        self.owner.wait_exit(uuid, PATIENCE)?;
        self.owner.forget(uuid);
        Ok(())
    }

    /// Kills every instance but the root.
    ///
    /// # Errors
    ///
    /// If one does not end.
    pub fn kill_children(&self) -> Result<()> {
        self.owner
            .alive()
            .into_iter()
            .filter(|uuid| *uuid != self.root)
            .try_for_each(|uuid| self.kill(uuid))
    }

    /// Makes `step` fail once.
    ///
    /// # Errors
    ///
    /// If the root does not answer.
    pub fn fault(&self, step: Option<Step>, errno: u32) -> Result<()> {
        self.owner.ask(self.root, Request::Fault { step, errno, delay_us: 0 })?;
        Ok(())
    }

    /// Every instance and what became of it, for messages.
    pub fn everybody(&self) -> String {
        let lines = self.owner.each(|uuid, known| {
            let parent = known.parent.map_or("root".into(), |parent| parent.to_string());
            let (pid, gone, exit) = (known.pid, known.gone, &known.exit);
            let notes = &known.notes;
            format!("{uuid} of {parent}: pid {pid}, gone: {gone}, exit: {exit:?}, notes: {notes:?}")
        });
        lines.join("\n")
    }

    /// Process of an instance.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn pid(&self, uuid: Uuid) -> Result<i32> {
        Ok(self.owner.with(uuid, |known| known.pid)?)
    }

    /// Process of the root's zygote.
    ///
    /// # Errors
    ///
    /// If the root does not answer.
    pub fn zygote(&self) -> Result<i32> {
        Ok(self.owner.stats(self.root)?.zygote_pid)
    }

    /// Its processes.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        census::group(self.group.leader)
    }

    /// What its processes hold, once nothing comes or goes any more.
    ///
    /// # Errors
    ///
    /// If it does not come to that.
    pub fn census(&self) -> Result<Census> {
        let mut last = Census::default();
        let settled = census::eventually(PATIENCE, || {
            let before = census::count(self.group.leader);
            std::thread::sleep(Duration::from_millis(60));
            last = census::count(self.group.leader);
            before == last && last.zombies == 0
        });
        ensure!(settled, "processes come and go: {:?}", self.processes());
        Ok(last)
    }

    /// Waits until its processes hold what they held at `before`.
    ///
    /// # Errors
    ///
    /// What they hold instead.
    pub fn settles_at(&self, before: Census, what: &str) -> Result<()> {
        let now = || census::count(self.group.leader);
        let settled = census::eventually(Duration::from_secs(5), || now() == before);
        ensure!(settled, "{what}: {:?} instead of {before:?}; {:?}", now(), self.processes());
        Ok(())
    }
}

/// The processes that a root led to.
#[derive(Debug)]
struct Group {
    leader: i32,
    // Dropping it ends the guard.
    _guard: Sender<()>,
}

impl Group {
    fn new(leader: i32, limit: Duration) -> Self {
        let (guard, ended) = channel();
        std::thread::spawn(move || watch(leader, limit, &ended));
        Self { leader, _guard: guard }
    }
}

/// Kills everything when the time is over: what waits for it then hears of its end.
fn watch(leader: i32, limit: Duration, ended: &Receiver<()>) {
    if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
        eprintln!("instances of {leader} are killed after {} s", limit.as_secs());
        kill_group(leader);
    }
}

fn kill_group(leader: i32) {
    if let Some(leader) = Pid::from_raw(leader) {
        // ESRCH: nobody is left.
        rustix::process::kill_process_group(leader, Signal::KILL).unwrap_or(());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let gone = census::eventually(Duration::from_secs(2), || {
            census::group(self.leader).iter().all(|process| process.zombie)
        });
        if !gone {
            let left = census::group(self.leader);
            kill_group(self.leader);
            assert!(std::thread::panicking(), "left 2 s after the owner went: {left:?}");
        }
    }
}
