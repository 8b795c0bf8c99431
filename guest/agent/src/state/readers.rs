//! Who forked whom: what `fork` shows to whoever reads it.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

/// Most threads that are remembered. The one that forked longest ago is forgotten first.
const RECORDS: usize = 4096;
/// Most ancestors that are looked at.
const ANCESTORS: usize = 128;
/// The agent, which forks for the host: nobody's ancestor in this.
const INIT: u32 = 1;

/// What is known of a thread or process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its thread group: the process it belongs to.
    pub tgid: u32,
    /// The process that started that one; 0 if none did.
    pub parent: u32,
    /// When it was started, since boot. Numbers are used again, and a process that was started
    /// after a fork has not asked for it.
    pub started: Duration,
}

/// Looks processes up.
pub trait Processes {
    /// The thread with this number.
    fn thread(&self, tid: u32) -> Option<Process>;
}

/// What reading `fork` gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkValue {
    /// Nothing was forked yet.
    Empty,
    /// This machine is a child, and the reader has not forked since: the zero UUID.
    Child,
    /// The reader's last child.
    Parent(Uuid),
}

#[derive(Clone, Copy, Debug)]
struct Record {
    tgid: u32,
    at: Duration,
    /// Nil: it is the fork that this machine came from.
    child: Uuid,
}

/// The last fork of every thread.
#[derive(Debug, Default)]
pub struct Readers {
    records: BTreeMap<u32, Record>,
    last: Option<Uuid>,
    is_child: bool,
}

impl Readers {
    /// The thread `tid` of the process `tgid` forked `child`.
    pub(super) fn record(&mut self, tid: u32, tgid: u32, at: Duration, child: Uuid) {
        // What the host forks concerns nobody in a child: who has not read yet what it is would take
        // itself for the parent.
        if !(self.is_child && tgid == INIT) {
            self.last = Some(child);
        }
        self.insert(tid, Record { tgid, at, child });
    }

    fn insert(&mut self, tid: u32, record: Record) {
        self.records.insert(tid, record);
        while self.records.len() > RECORDS {
            let oldest = self.records.iter().min_by_key(|(_, record)| record.at);
            let Some((&tid, _)) = oldest else { break };
            self.records.remove(&tid);
        }
    }

    /// This is the child of a fork that the thread `tid` of the process `tgid` asked for.
    pub(super) fn became_child(&mut self, tid: u32, tgid: u32, at: Duration) {
        *self = Self { is_child: true, ..Self::default() };
        self.insert(tid, Record { tgid, at, child: Uuid::nil() });
    }

    /// What the thread `tid` reads: the child of its own last fork, or of its process, or of the
    /// nearest ancestor that forked (a shell writes, and the `cat` that it starts reads); the zero
    /// UUID if that is the fork that this machine came from. Whoever has none of them reads the last
    /// fork of this machine, or the zero UUID in a child that has not forked.
    #[must_use]
    pub fn read(&self, tid: u32, processes: &impl Processes) -> ForkValue {
        let found = self.of_thread(tid, processes).or_else(|| self.of_ancestors(tid, processes));
        match (found, self.is_child, self.last) {
            (Some(child), ..) if child.is_nil() => ForkValue::Child,
            (Some(child), ..) | (None, _, Some(child)) => ForkValue::Parent(child),
            (None, true, None) => ForkValue::Child,
            (None, false, None) => ForkValue::Empty,
        }
    }

    fn of_thread(&self, tid: u32, processes: &impl Processes) -> Option<Uuid> {
        let record = self.records.get(&tid)?;
        let process = processes.thread(tid)?;
        (process.started <= record.at).then_some(record.child)
    }

    fn of_ancestors(&self, tid: u32, processes: &impl Processes) -> Option<Uuid> {
        if self.records.is_empty() {
            return None;
        }
        let mut process = processes.thread(tid)?;
        for generation in 0..ANCESTORS {
            if generation > 0 && process.tgid == INIT {
                return None;
            }
            if let Some(child) = self.of_group(&process, processes) {
                return Some(child);
            }
            if process.parent == 0 {
                return None;
            }
            process = processes.thread(process.parent)?;
        }
        None
    }

    fn of_group(&self, process: &Process, processes: &impl Processes) -> Option<Uuid> {
        let group = self.records.values().filter(|record| record.tgid == process.tgid);
        let newest = group.max_by_key(|record| record.at)?;
        // The process is as old as its first thread.
        let started = processes.thread(process.tgid).map_or(process.started, |first| first.started);
        (started <= newest.at).then_some(newest.child)
    }
}
