//! The probes of this process.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::{
    Cell, CellKey, Metric, Role, SETTINGS_WORDS, Sample, Settings, THREAD_WORDS, Thread, bucket,
    lost,
};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::attach::{self, FAULTS_END, PARTS, Part, Way};
use crate::counted::{Counted, Lost};
use crate::error::ProbeError;
use crate::host;
use crate::offsets::Offsets;
use crate::trace::Trace;

/// How much is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing.
    Off,
    /// What costs next to nothing.
    #[default]
    On,
    /// Faults of guests, too.
    All,
    /// Calls to KVM, exits and moments of forks, too: for looking at single forks.
    Trace,
}

/// Something that is measured, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Attached {
    /// What is.
    pub what: &'static str,
    /// `raw_tp`, `fexit`, `perf_event`, `usdt`.
    pub how: &'static str,
    /// From which level on.
    pub level: Level,
}

/// A program that the kernel would not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// Its name.
    pub program: &'static str,
    /// How it was to be attached.
    pub how: &'static str,
    /// What the kernel said.
    pub reason: String,
    /// Whether it was for want of something that may be there another time.
    pub passing: bool,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} by {}: {}", self.program, self.how, self.reason)
    }
}

/// Something that this kernel does not let be measured the best way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shortfall {
    /// What is.
    pub what: &'static str,
    /// How it is measured; not at all, if there is nothing.
    pub instead: Option<&'static str>,
    /// What the kernel said to the better ways.
    pub reason: String,
}

impl std::fmt::Display for Shortfall {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.instead {
            Some(how) => write!(formatter, "{} by {how} ({})", self.what, self.reason),
            None => write!(formatter, "no {} ({})", self.what, self.reason),
        }
    }
}

/// A program by itself, with one combination of constants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// Its name.
    pub program: &'static str,
    /// How it was attached.
    pub how: &'static str,
    /// Whether page faults are timed.
    pub faults_end: bool,
    /// What the kernel said, if it would not have it.
    pub refused: Option<String>,
}

/// Probes that are loaded. They go with this value, and with its process.
#[derive(Debug)]
pub struct Probes {
    ebpf: Ebpf,
    attached: Vec<(Attached, Way)>,
    /// Whether page faults are timed.
    faults_end: bool,
    settings: Settings,
    level: Level,
    refused: Vec<Refused>,
    ended: Counted,
    trace: Option<Trace>,
}

#[cfg(probes)]
#[expect(clippy::unnecessary_wraps, reason = "without probes it fails")]
fn object() -> Result<&'static [u8], ProbeError> {
    Ok(aya::include_bytes_aligned!(env!("PROBES")))
}

#[cfg(not(probes))]
fn object() -> Result<&'static [u8], ProbeError> {
    Err(ProbeError::NotBuilt(env!("PROBES_MISSING")))
}

impl Probes {
    /// Loads and attaches what this kernel allows.
    ///
    /// # Errors
    ///
    /// Why there can be none here. That some cannot be had is no error: see [`Probes::refused`].
    pub fn load(level: Level) -> Result<Self, ProbeError> {
        let object = object()?;
        host::check()?;
        let offsets = Offsets::of_this_kernel()?;
        let probes = Self::load_with(object, offsets, level, true)?;
        if level == Level::Off || probes.attached().iter().any(|one| one.what == FAULTS_END) {
            return Ok(probes);
        }
        // Then they are counted when they begin.
        let refused = probes.refused;
        let probes = Self::load_with(object, offsets, level, false)?;
        Ok(Self { refused, ..probes })
    }

    /// Loads and attaches every program by itself, with every combination of constants, and leaves
    /// none.
    ///
    /// # Errors
    ///
    /// Why there can be none here.
    pub fn survey() -> Result<Vec<Surveyed>, ProbeError> {
        let object = object()?;
        host::check()?;
        let offsets = Offsets::of_this_kernel()?;
        let mut all = Vec::new();
        for faults_end in [false, true] {
            let mut probes = Self::load_with(object, offsets, Level::Off, faults_end)?;
            all.extend(attach::each(&mut probes.ebpf).into_iter().map(
                |((program, how), result)| Surveyed {
                    program,
                    how: how.name(),
                    faults_end,
                    refused: result.err().map(|no| no.reason),
                },
            ));
        }
        Ok(all)
    }

    fn load_with(
        object: &[u8],
        offsets: Offsets,
        level: Level,
        faults_end: bool,
    ) -> Result<Self, ProbeError> {
        let ebpf = EbpfLoader::new()
            .map_max_entries("CELLS", host::buckets())
            .override_global("TASK_PID", &offsets.task_pid, true)
            .override_global("TASK_TGID", &offsets.task_tgid, true)
            .override_global("FAULTS_END", &u32::from(faults_end), true)
            .load(object)
            .map_err(|error| ProbeError::Load(Box::new(error)))?;
        let mut probes = Self {
            ebpf,
            attached: Vec::new(),
            faults_end,
            settings: Settings::default(),
            level: Level::Off,
            refused: Vec::new(),
            ended: Counted::new(),
            trace: None,
        };
        probes.set_level(level)?;
        Ok(probes)
    }

    /// Attaches what belongs to `level` and is not, and takes off what does not belong to it. A process
    /// that is forked by one that is measured while nothing is attached is not measured later.
    ///
    /// # Errors
    ///
    /// If the kernel will not have what the rest is useless without.
    pub fn set_level(&mut self, level: Level) -> Result<(), ProbeError> {
        let (stay, go): (Vec<_>, Vec<_>) = std::mem::take(&mut self.attached)
            .into_iter()
            .partition(|(attached, _)| attached.level <= level);
        for (_, way) in go {
            attach::detach(&mut self.ebpf, way);
        }
        self.attached = stay;
        let nothing = self.attached.is_empty();
        for part in PARTS.iter().filter(|part| part.level <= level) {
            let there = self.attached.iter().any(|(attached, _)| attached.what == part.what);
            if there || part.what == FAULTS_END && !self.faults_end {
                continue;
            }
            if let Some(kind) = part.kind {
                // What begins from now on can end in these programs.
                self.settings.since[kind as usize] = now_ns();
                self.tell()?;
            }
            match attach::attach(&mut self.ebpf, part, &mut self.refused) {
                Some(attached) => self.attached.push(attached),
                None if part.required => {
                    let last = self.refused.pop();
                    return Err(last.map_or(ProbeError::NotBuilt(part.what), |last| {
                        ProbeError::Refused { program: last.program, reason: last.reason }
                    }));
                }
                None => {}
            }
        }
        self.level = level;
        if nothing && !self.attached.is_empty() {
            // What threads they have got meanwhile nobody saw.
            let pids: Result<Vec<u32>, _> = processes(&mut self.ebpf)?.keys().collect();
            for pid in pids.map_err(ProbeError::map("PROCESSES"))? {
                self.track_threads(pid)?;
            }
        }
        Ok(())
    }

    /// Says to all programs what holds.
    fn tell(&mut self) -> Result<(), ProbeError> {
        let mut settings: Array<&mut MapData, [u64; SETTINGS_WORDS]> =
            map(&mut self.ebpf, "SETTINGS")?.try_into().map_err(ProbeError::map("SETTINGS"))?;
        settings.set(0, self.settings.words(), 0).map_err(ProbeError::map("SETTINGS"))
    }

    /// How much is measured.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }

    /// What is measured, and how.
    #[must_use]
    pub fn attached(&self) -> Vec<Attached> {
        self.attached.iter().map(|(attached, _)| *attached).collect()
    }

    /// Programs that this kernel would not have. Something else may do what they were for.
    #[must_use]
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// What is measured by other means than the best, or not at all.
    #[must_use]
    pub fn shortfalls(&self) -> Vec<Shortfall> {
        let parts = PARTS.iter().filter(|part| part.level <= self.level);
        parts.filter_map(|part| self.shortfall(part)).collect()
    }

    fn shortfall(&self, part: &Part) -> Option<Shortfall> {
        let names = |way: Way| way.iter().map(|(name, _)| *name);
        let attached = self.attached.iter().find(|(attached, _)| attached.what == part.what);
        let is_it = |way| attached.is_some_and(|(_, attached)| names(attached).eq(names(way)));
        let better = part.ways.iter().take_while(|way| !is_it(way));
        let programs: Vec<_> = better.flat_map(|way| names(way)).collect();
        let refused = self.refused.iter().filter(|refused| programs.contains(&refused.program));
        let reason = refused.map(ToString::to_string).collect::<Vec<_>>().join("; ");
        let instead = attached.map(|(attached, _)| attached.how);
        (!programs.is_empty()).then_some(Shortfall { what: part.what, instead, reason })
    }

    /// Measures a process and everything that it forks from now on. `beacon` is the address of its
    /// [`Beacon`](ebpf_common::Beacon), 0 if it has none.
    ///
    /// # Errors
    ///
    /// If there is no room for it.
    pub fn track(&mut self, pid: u32, beacon: u64) -> Result<(), ProbeError> {
        if self.beacon_of(pid) != Some(beacon) {
            processes(&mut self.ebpf)?
                .insert(pid, beacon, 0)
                .map_err(ProbeError::map("PROCESSES"))?;
        }
        // Without a thread it would never be seen to end.
        self.track_threads(pid).inspect_err(|_| self.forget(pid))
    }

    /// Measures the threads that a process has; of those to come a program hears.
    fn track_threads(&mut self, pid: u32) -> Result<(), ProbeError> {
        let mut threads = threads(&mut self.ebpf)?;
        // A process that has ended has none.
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for tid in tasks.filter_map(|task| task.file_name().to_str()?.parse::<u32>().ok()) {
            let known = threads.get(&tid, 0);
            if known.is_ok_and(|it| Thread::from_words(&it).0 == pid && !Thread::has_ended(&it)) {
                continue;
            }
            threads
                .insert(tid, Thread::new_words(pid, tid), 0)
                .map_err(ProbeError::map("THREADS"))?;
        }
        Ok(())
    }

    /// Measures a process no longer. What was counted of it is added to [`Probes::ended`] when all is
    /// read the next time.
    pub fn forget(&mut self, pid: u32) {
        if let Ok(mut processes) = processes(&mut self.ebpf) {
            // An error: it was not measured.
            processes.remove(&pid).unwrap_or(());
        }
    }

    /// Whether a process is measured, because it was registered or descends from one that was.
    #[must_use]
    pub fn descends(&self, pid: u32) -> bool {
        self.beacon_of(pid).is_some()
    }

    /// Whether a process is measured, and it is known where it says who it is.
    #[must_use]
    pub fn knows(&self, pid: u32) -> bool {
        self.beacon_of(pid).is_some_and(|beacon| beacon != 0)
    }

    fn beacon_of(&self, pid: u32) -> Option<u64> {
        let map = self.ebpf.map("PROCESSES")?;
        HashMap::<&MapData, u32, u64>::try_from(map).ok()?.get(&pid, 0).ok()
    }

    /// Reads what was counted of processes that live. Those that have ended are added to
    /// [`Probes::ended`] and forgotten.
    ///
    /// # Errors
    ///
    /// If the maps cannot be read.
    pub fn read(&mut self) -> Result<BTreeMap<u32, Counted>, ProbeError> {
        let mut all = BTreeMap::<u32, Entries>::new();
        for entry in &threads(&mut self.ebpf)? {
            let (tid, words) = entry.map_err(ProbeError::map("THREADS"))?;
            let pid = Thread::from_words(&words).0;
            all.entry(pid).or_default().threads.insert(tid, words);
        }
        for entry in &cells(&mut self.ebpf)? {
            let (word, values) = entry.map_err(ProbeError::map("CELLS"))?;
            let key = CellKey::from_word(word);
            all.entry(key.pid).or_default().cells.insert(key, sum(&values));
        }
        // In this order: whoever is not among them now counts nothing any more.
        let live: Result<BTreeSet<u32>, _> = processes(&mut self.ebpf)?.keys().collect();
        let live = live.map_err(ProbeError::map("PROCESSES"))?;
        let (live, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(pid, _)| live.contains(pid));
        for (pid, entries) in gone {
            self.bury(pid, &entries)?;
        }
        Ok(live.into_iter().map(|(pid, entries)| (pid, entries.counted())).collect())
    }

    /// Takes what was counted of a process that has ended out of the kernel.
    fn bury(&mut self, pid: u32, entries: &Entries) -> Result<(), ProbeError> {
        // What it counted last may have come after the first look. An error: somebody was faster.
        let mut threads = threads(&mut self.ebpf)?;
        for tid in entries.threads.keys() {
            if let Ok(words) = threads.get(tid, 0)
                && Thread::from_words(&words).0 == pid
                && threads.remove(tid).is_ok()
            {
                add_samples(&mut self.ended, &words);
            }
        }
        let mut cells = cells(&mut self.ebpf)?;
        for key in entries.cells.keys() {
            if let Ok(values) = cells.get(&key.word(), 0)
                && cells.remove(&key.word()).is_ok()
            {
                add(&mut self.ended, *key, sum(&values));
            }
        }
        Ok(())
    }

    /// What was counted of processes that have ended, all together, as of the last
    /// [`Probes::read`].
    #[must_use]
    pub fn ended(&self) -> &Counted {
        &self.ended
    }

    /// Processes that are measured, and their threads: so many entries there are in the kernel.
    ///
    /// # Errors
    ///
    /// If the maps cannot be read.
    pub fn held(&mut self) -> Result<[usize; 2], ProbeError> {
        let processes = processes(&mut self.ebpf)?.keys().count();
        Ok([processes, threads(&mut self.ebpf)?.keys().count()])
    }

    /// What there was no room for so far.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn lost(&mut self) -> Result<Lost, ProbeError> {
        let counts: PerCpuArray<&mut MapData, u64> =
            map(&mut self.ebpf, "LOST")?.try_into().map_err(ProbeError::map("LOST"))?;
        let count = |slot: u32| {
            let values = counts.get(&slot, 0).map_err(ProbeError::map("LOST"))?;
            Ok::<u64, ProbeError>(values.iter().sum())
        };
        Ok(Lost {
            values: count(lost::CELLS)?,
            events: count(lost::EVENTS)?,
            processes: count(lost::PROCESSES)?,
            threads: count(lost::THREADS)?,
        })
    }

    /// Sends the events of all processes one by one, too, or stops that.
    ///
    /// # Errors
    ///
    /// If the maps cannot be used.
    pub fn trace(&mut self, on: bool) -> Result<(), ProbeError> {
        if self.trace.is_none() {
            let events = self.ebpf.take_map("EVENTS").ok_or(ProbeError::NotBuilt("EVENTS"))?;
            self.trace = Some(Trace::new(events)?);
        }
        self.settings.traced = on.into();
        self.tell()
    }

    /// The events since the last time.
    pub fn events(&mut self) -> Vec<ebpf_common::Event> {
        self.trace.as_mut().map(Trace::drain).unwrap_or_default()
    }
}

/// The clock of the programs, which began with the machine.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

fn map<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut aya::maps::Map, ProbeError> {
    ebpf.map_mut(name).ok_or(ProbeError::NotBuilt(name))
}

fn processes(ebpf: &mut Ebpf) -> Result<Processes<'_>, ProbeError> {
    map(ebpf, "PROCESSES")?.try_into().map_err(ProbeError::map("PROCESSES"))
}

fn threads(ebpf: &mut Ebpf) -> Result<Threads<'_>, ProbeError> {
    map(ebpf, "THREADS")?.try_into().map_err(ProbeError::map("THREADS"))
}

fn cells(ebpf: &mut Ebpf) -> Result<Cells<'_>, ProbeError> {
    map(ebpf, "CELLS")?.try_into().map_err(ProbeError::map("CELLS"))
}

/// To the address of its beacon.
type Processes<'a> = HashMap<&'a mut MapData, u32, u64>;
/// To what [`Thread::from_words`] reads.
type Threads<'a> = HashMap<&'a mut MapData, u32, [u64; THREAD_WORDS]>;
/// [`CellKey::word`] to count and sum.
type Cells<'a> = PerCpuHashMap<&'a mut MapData, u64, [u64; 2]>;

/// What lies in the kernel about one process. By key: where an entry goes while the map is read, the
/// kernel begins anew, and others are seen twice.
#[derive(Default)]
struct Entries {
    threads: BTreeMap<u32, [u64; THREAD_WORDS]>,
    cells: BTreeMap<CellKey, Cell>,
}

impl Entries {
    fn counted(&self) -> Counted {
        let mut counted = Counted::new();
        self.threads.values().for_each(|words| add_samples(&mut counted, words));
        self.cells.iter().for_each(|(key, cell)| add(&mut counted, *key, *cell));
        counted
    }
}

/// Over all processors.
fn sum(values: &PerCpuValues<[u64; 2]>) -> Cell {
    values.iter().fold(Cell::default(), |sum, [count, ns]| Cell {
        count: sum.count + count,
        sum: sum.sum + ns,
    })
}

fn add_samples(counted: &mut Counted, words: &[u64; THREAD_WORDS]) {
    let (pid, samples) = Thread::from_words(words);
    for Sample { role, metric, value } in samples {
        let key = CellKey { pid, role, metric, bucket: bucket(value) };
        add(counted, key, Cell { count: 1, sum: value });
    }
}

fn add(counted: &mut Counted, key: CellKey, cell: Cell) {
    let names = (Role::from_number(key.role), Metric::from_number(key.metric));
    if let (Some(role), Some(metric), 1..) = (names.0, names.1, cell.count) {
        counted.entry((role, metric)).or_default().add(key.bucket, cell);
    }
}

#[cfg(all(test, not(probes)))]
mod tests {
    use super::*;

    #[test]
    fn without_probes_it_is_said_what_is_missing() {
        let error = Probes::load(Level::On).expect_err("there are none").to_string();
        assert!(error.starts_with("this program was built without probes ("), "{error}");
        assert!(error.contains("no core library for bpfel-unknown-none"), "{error}");
        assert!(error.ends_with("./just build installs what that takes"), "{error}");
    }
}
