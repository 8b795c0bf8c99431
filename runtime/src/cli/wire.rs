//! What the other verbs and the owner say to each other: one JSON message each way over a socket
//! that keeps message borders. A list comes in several answers, closed by [`Answer::Done`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use ebpf_loader::{Lost, Role, Row};
use runtime::fork::ForkReport;
use runtime::proto::Stats;

/// Name of the socket in the owner's folder.
pub const SOCKET: &str = "control";
/// Instances in one answer, so that it stays below `runtime::proto::MAX_MESSAGE`.
pub const LISTED_AT_ONCE: usize = 128;
/// Longest reason in a list, in characters.
pub const REASON_CHARS: usize = 120;

/// To the owner.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// All instances, also those that have ended lately.
    List,
    /// Forks; a guest that cannot be told as well, if that is wanted.
    Branch { instance: Uuid, children: u32, unaware: bool },
    /// Answers once the instance has ended.
    Wait { instance: Uuid },
    /// Ends an instance with a code.
    Stop { instance: Uuid, code: u8, drain_s: u32 },
    /// Kills.
    Kill { instance: Uuid, recursive: bool },
    /// Stops the vCPUs.
    Pause { instance: Uuid },
    /// Lets them go on.
    Resume { instance: Uuid },
    /// Counters.
    Stats { instance: Uuid },
    /// What was counted of an instance, and of all that have ended: in parts, then
    /// [`Answer::Done`].
    Probes { instance: Uuid },
    /// What an instance has said on its console: in parts, then [`Answer::Done`], which comes when
    /// it has ended if somebody wants to `follow`.
    Logs { instance: Uuid, follow: bool },
    /// Types on its console.
    Type { instance: Uuid, bytes: Vec<u8> },
    /// The next fork with everything in it, in parts, then [`Answer::Done`]; `branch` makes it.
    Trace { instance: Uuid, branch: bool },
}

/// From the owner.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Part of a list.
    Instances(Vec<Listed>),
    /// A fork was made.
    Children(Vec<Uuid>),
    /// The instance has ended.
    Exited { code: i32, why: Option<String> },
    /// Counters, and KVM's own statistics.
    Stats { stats: Stats, kvm: BTreeMap<String, u64> },
    /// What was counted of the instance, or a part of it.
    Probes(Probed),
    /// And of all instances that have ended.
    Ended(Vec<Row>),
    /// A fork.
    Traced(Box<Traced>),
    /// Console output, and its place in all that was said.
    Output { at: u64, bytes: Vec<u8> },
    /// The guest had room for so many bytes.
    Typed(usize),
    /// A part of what happened in it.
    Events(Vec<TracedEvent>),
    /// So many were killed.
    Killed(usize),
    /// Done, or the end of a list.
    Done,
    /// Why it cannot be.
    Failed(String),
}

/// What was counted of an instance: by probes in the kernel, and by itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Probed {
    /// Why there are no probes.
    pub off: Option<String>,
    /// What is measured, and how.
    pub measured: Vec<String>,
    /// Programs that this kernel would not have, and why.
    pub refused: Vec<String>,
    /// The histograms.
    pub rows: Vec<Row>,
    /// What there was no room for, of all instances of this owner.
    pub lost: Lost,
    /// Why there will be no room soon: what was counted cannot be taken out of the kernel.
    pub unread: Option<String>,
}

/// A fork with everything in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Traced {
    /// What the engine says of it.
    pub report: ForkReport,
    /// The parent's process.
    pub parent_pid: u32,
    /// What happened, in order.
    pub events: Vec<TracedEvent>,
    /// What could not be measured on this kernel, and why.
    pub missing: Vec<String>,
    /// Whether so much happened that the beginning is missing.
    pub cut: bool,
    /// What there was no room for.
    pub lost: Lost,
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TracedEvent {
    /// When it ended, in ns after the doorbell.
    pub at_ns: i64,
    /// How long it took, in ns.
    pub took_ns: u64,
    /// Its process.
    pub pid: u32,
    /// The instance that this process is, or was about to become.
    pub instance: Uuid,
    /// An `ebpf_loader::EventKind`.
    pub kind: u8,
    /// Who the process was.
    #[serde(with = "ebpf_loader::names::role")]
    pub role: Role,
    /// The moment of the fork that was reached last, from 1; 0: none.
    pub stage: u16,
    /// See `ebpf_loader::EventKind`; of faults in guest memory the guest physical address.
    pub what: u64,
    /// See `ebpf_loader::EventKind`.
    pub detail: u64,
}

/// What an instance does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// They are stopped.
    Paused,
    /// It has ended.
    Stopped,
}

/// An instance in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// Who it is.
    pub uuid: Uuid,
    /// Whose child it is.
    pub parent: Option<Uuid>,
    /// Its process.
    pub pid: i32,
    /// What it does.
    pub state: State,
    /// Exit code, once it has ended.
    pub code: Option<i32>,
    /// Why it ended, if not by itself.
    pub why: Option<String>,
    /// Milliseconds since it came to life.
    pub age_ms: u64,
    /// Guest RAM.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory of its process that is in RAM, what it shares with others included.
    pub resident_kib: u64,
}

impl Listed {
    /// Whether it has not ended.
    pub fn lives(&self) -> bool {
        self.state != State::Stopped
    }
}

/// The first digits of a UUID, as shown before console output.
pub fn short(uuid: Uuid) -> String {
    let mut text = uuid.simple().to_string();
    text.truncate(8);
    text
}
