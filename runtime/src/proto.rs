//! What an instance and its owner say to each other: JSON messages over a socket that keeps
//! message borders.
//!
//! The owner is the process that runs a tree of instances: `runtime run`, the bench, a test.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ebpf_loader::Row;
use guest_abi::param::{RESULTS, STEPS, Step as ProgramStep};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::fork::{ForkReport, Step};
use crate::kvm::DirtyMode;
use crate::memory::BackingKind;

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Exit code of an instance whose guest did what no guest may do.
pub const CRASHED: i32 = 125;

/// How an instance is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InstanceConfig {
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Pages below the image.
    pub backing: BackingKind,
    /// How dirty pages are tracked.
    pub dirty: DirtyMode,
    /// Entries of each vCPU's dirty ring.
    pub ring_entries: u32,
    /// The same in children.
    pub child_ring_entries: u32,
    /// Standbys kept ready.
    pub standbys: u32,
    /// The same in children.
    pub child_standbys: u32,
    /// Whether zygote and standbys are kept up to date while the guest runs.
    pub sync: bool,
    /// Whether standbys run ahead once.
    pub rehearse: bool,
    /// Pages that a zygote owns before they become a new image; 0: when it is worth it. For tests.
    pub consolidate_pages: u32,
    /// Whether standbys are put under `SCHED_FIFO` until their first exit, where allowed.
    pub realtime: bool,
    /// Processors for vCPU threads (bit n: processor n); 0 for all.
    pub vcpu_cpus: u64,
    /// Processors for standbys until their first exit; 0 for all.
    pub standby_cpus: u64,
    /// Where the owner listens for children.
    pub owner: PathBuf,
    /// Bare guest: a static ELF, see `guest/bare/ABI.md`.
    pub bare: PathBuf,
    /// Linux kernel, a bzImage or vmlinux; empty: a bare guest is run.
    pub kernel: PathBuf,
    /// Its initramfs; empty: none.
    pub initrd: PathBuf,
    /// A second archive behind it, in memory alone: what one image is to run this time.
    pub initrd_tail: Vec<u8>,
    /// Its command line.
    pub cmdline: String,
    /// Folder of the unix sockets that lead to its socket device and from there to the host; empty:
    /// it has none.
    pub vsock: PathBuf,
}

impl InstanceConfig {
    /// Whether the guest is Linux.
    #[must_use]
    pub fn is_linux(&self) -> bool {
        !self.kernel.as_os_str().is_empty()
    }

    /// Whether the guest has a socket device.
    #[must_use]
    pub fn has_vsock(&self) -> bool {
        self.is_linux() && !self.vsock.as_os_str().is_empty()
    }
}

impl Default for InstanceConfig {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            vcpus: 1,
            backing: BackingKind::default(),
            dirty: DirtyMode::default(),
            ring_entries: 16384,
            child_ring_entries: 4096,
            standbys: 1,
            child_standbys: 0,
            sync: true,
            rehearse: true,
            consolidate_pages: 0,
            realtime: true,
            vcpu_cpus: 0,
            standby_cpus: 0,
            owner: PathBuf::new(),
            bare: PathBuf::new(),
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            initrd_tail: Vec::new(),
            cmdline: String::new(),
            vsock: PathBuf::new(),
        }
    }
}

/// From the owner to an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// First message to a root instance.
    Start(Box<InstanceConfig>),
    /// Makes the instance forkable.
    Arm,
    /// Forks this many children.
    Branch {
        /// 1 to 128.
        children: u32,
    },
    /// Keeps this many standbys ready from now on, and answers once they are.
    Standbys {
        /// Number.
        count: u32,
    },
    /// Switches background sync.
    Sync {
        /// On or off.
        on: bool,
    },
    /// Runs a program on a vCPU of a bare guest.
    Program {
        /// The vCPU.
        vcpu: u32,
        /// At most [`STEPS`].
        steps: Vec<WireStep>,
    },
    /// Makes a step of the next fork fail.
    Fault {
        /// The step.
        step: Option<Step>,
        /// Errno, [`crate::fork::FAULT_KILL`] or [`crate::fork::FAULT_DELAY`].
        errno: u32,
        /// For a delay.
        delay_us: u32,
    },
    /// Kills the zygote, as a test.
    KillZygote,
    /// Stops all vCPUs.
    Pause,
    /// Lets them go on.
    Resume,
    /// Types on the console of a Linux guest.
    Type {
        /// What.
        bytes: Vec<u8>,
    },
    /// Counters.
    Stats,
    /// KVM's own statistics.
    KvmStats,
    /// Its calls to KVM.
    Calls,
    /// Ends the instance.
    Stop {
        /// Exit code.
        code: i32,
    },
}

/// A program step as sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireStep {
    /// See `guest_abi::param::op`.
    pub op: u32,
    /// See `guest_abi::param::who`.
    pub who: u16,
    /// First result word.
    pub result: u16,
    /// Arguments.
    pub args: [u64; 4],
}

impl From<WireStep> for ProgramStep {
    fn from(step: WireStep) -> Self {
        Self { op: step.op, who: step.who, result: step.result, args: step.args }
    }
}

/// A request with the number that its reply repeats.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    /// Chosen by the owner.
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// From an instance to its owner.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// First message of every instance.
    Hello {
        /// Its UUID.
        uuid: Uuid,
        /// Its parent's.
        parent: Option<Uuid>,
        /// Its process.
        pid: i32,
        /// vCPUs.
        vcpus: u32,
        /// Guest RAM.
        memory_mib: u32,
        /// Whether its guest is Linux.
        linux: bool,
    },
    /// Answer to the request with that number.
    Reply {
        /// The number.
        id: u64,
        /// What came of it.
        result: Result<Reply, Failure>,
    },
    /// A zygote was raised in place of one that was lost.
    Zygote {
        /// Its process.
        pid: i32,
    },
    /// A fork is over.
    Forked(Box<ForkReport>),
    /// Armed.
    Armed {
        /// How long it took, in microseconds.
        took_us: u64,
    },
    /// A program has ended.
    Done {
        /// The vCPU.
        vcpu: u32,
        /// Sequence number.
        seq: u64,
        /// The results.
        results: Vec<u64>,
    },
    /// Console output.
    Console {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// One line for the log.
    Note {
        /// The line.
        text: String,
    },
    /// Calls to KVM of an instance that ends.
    Calls {
        /// By what it was when it made them.
        rows: Vec<Row>,
    },
    /// The instance ends.
    Exited {
        /// Exit code.
        code: i32,
        /// Why, if it was not asked for.
        reason: Option<String>,
    },
}

/// A good answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// A program was started with that sequence number.
    Started {
        /// The sequence number.
        seq: u64,
    },
    /// So many bytes of what was typed found room.
    Typed {
        /// Number.
        count: usize,
    },
    /// A fork was made.
    Forked {
        /// The children.
        children: Vec<Uuid>,
    },
    /// Counters.
    Stats(Stats),
    /// KVM's own statistics.
    KvmStats(BTreeMap<String, u64>),
    /// Its calls to KVM, by what it was when it made them.
    Calls(Vec<Row>),
}

/// A bad answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// The step of a fork, if it was one.
    pub step: Option<Step>,
    /// Errno.
    pub errno: i32,
    /// The whole chain of reasons.
    pub message: String,
}

/// Counters of an instance.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Backing of its memory.
    pub backing: BackingKind,
    /// Forks made.
    pub forks: u64,
    /// Forks failed.
    pub failed: u64,
    /// Standbys ready.
    pub standbys: u32,
    /// Standbys being made.
    pub preparing: u32,
    /// Sync rounds.
    pub rounds: u64,
    /// Pages shipped by them.
    pub synced_pages: u64,
    /// Pages that a fork now would have to copy, as far as is known.
    pub pending_pages: u32,
    /// Process id of the zygote.
    pub zygote_pid: i32,
    /// CPU time of this process in nanoseconds.
    pub cpu_ns: u64,
    /// CPU time of the zygote in nanoseconds.
    pub zygote_cpu_ns: u64,
    /// Time that the last standby took to make, in nanoseconds.
    pub prewarm_ns: u64,
}

const _: () = assert!(STEPS * 256 + RESULTS * 24 < MAX_MESSAGE);
