//! Small runs whose forks are counted: a root of 64 MiB, one fork after the other.
//!
//! A run is a process of its own, because it runs under a tracer. It prints one line per fork.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use guest_abi::entry::param_page;
use guest_abi::param::{Header, op, who};
use runtime::kvm::DirtyMode;
use runtime::owner::Owner;
use runtime::proto::{InstanceConfig, Request, WireStep};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How long the guest spins before it forks, in µs: what its program's arrival set off in other
/// threads is over by then, also under a tracer.
const SETTLE_US: u64 = 2000;
/// How long the parent is left alone before a fork: its standbys have taken in by then what it wrote
/// while they were made.
const CALM: Duration = Duration::from_millis(60);
/// How long any answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name in the budgets.
    pub name: &'static str,
    /// vCPUs of the parent; all but the first are parked.
    pub vcpus: u32,
    /// Children of each fork.
    pub children: u32,
    /// Pages that the parent writes just before each fork, other ones each time. Few enough that a
    /// child does not ask a second thread for help.
    pub dirty: u64,
}

/// The workloads that have budgets.
pub const ALL: [Workload; 4] = [
    Workload { name: "quiet", vcpus: 1, children: 1, dirty: 0 },
    Workload { name: "dirty-32", vcpus: 1, children: 1, dirty: 32 },
    Workload { name: "vcpus-2", vcpus: 2, children: 1, dirty: 0 },
    Workload { name: "fanout-3", vcpus: 1, children: 3, dirty: 0 },
];

/// Pages between two that are written: each fork's begin one page further on.
const STRIDE: u64 = 97;

/// How it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Forks before those that count.
    pub warmup: u32,
    /// Forks that count.
    pub forks: u32,
    /// Dirty pages are read from the bitmap: one more ioctl per fork.
    pub bitmap: bool,
}

impl Default for Variant {
    fn default() -> Self {
        Self { warmup: 4, forks: 12, bitmap: false }
    }
}

/// One fork, as its owner saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forked {
    /// Process of the parent.
    pub parent: i32,
    /// Processes of the children.
    pub children: Vec<i32>,
    /// `branch` in µs.
    pub branch_us: f64,
    /// Pages captured.
    pub captured: u64,
    /// Pages applied by all children together.
    pub applied: u64,
    /// Of which were private before.
    pub private: u64,
}

/// Runs a workload and writes a line of JSON for each fork that counts.
///
/// # Errors
///
/// What the engine says, and a fork that failed.
pub fn run(workload: &Workload, variant: &Variant, out: &mut dyn Write) -> Result<()> {
    let [vcpu_cpus, standby_cpus] = processors();
    let owner = Owner::new()?;
    let config = InstanceConfig {
        memory_mib: 64,
        vcpus: workload.vcpus,
        standbys: workload.children,
        // What is written just before a fork is left to it, however slow the tracer makes it.
        sync: workload.dirty == 0,
        dirty: if variant.bitmap { DirtyMode::Bitmap } else { DirtyMode::Ring },
        vcpu_cpus,
        standby_cpus,
        ..InstanceConfig::default()
    };
    let root = owner.start(config).context("starting an instance")?;
    let parent = owner.with(root, |known| known.pid)?;
    let khz = param_page(0) + std::mem::offset_of!(Header, tsc_khz) as u64;
    let words = owner.run(root, &[all(op::PEEK, khz), all(op::FILL, 7)])?;
    let ticks = words.first().copied().unwrap_or(0) / 1000 * SETTLE_US;
    owner.ask(root, Request::Arm).context("arming")?;
    // The child gives its other vCPUs time for their first run.
    let mut program = [
        all(op::SPIN, ticks),
        all(op::DIRTY_STRIDE, workload.dirty),
        all(op::FORK, workload.children.into()),
        WireStep { who: who::CHILD, ..all(op::SPIN, 2 * ticks) },
    ];
    for number in 0..variant.warmup + variant.forks {
        let nth = u64::from(number) + 1;
        program[1].args = [workload.dirty, nth, nth % STRIDE, STRIDE];
        owner
            .ask(root, Request::Standbys { count: workload.children })
            .context("waiting for standbys")?;
        std::thread::sleep(CALM);
        let forked = fork(&owner, (root, parent), workload, &program)?;
        if number >= variant.warmup {
            writeln!(out, "{}", serde_json::to_string(&forked)?)?;
        }
    }
    Ok(())
}

fn fork(
    owner: &Owner,
    (root, parent): (Uuid, i32),
    workload: &Workload,
    program: &[WireStep],
) -> Result<Forked> {
    let seq = owner.program(root, 0, program)?;
    let report = owner.next_fork(root, PATIENCE)?;
    ensure!(report.failed.is_none(), "a fork failed: {:?}", report.failed);
    owner.results(root, 0, seq, PATIENCE)?;
    ensure!(report.children.len() == workload.children as usize, "children are missing");
    let mut children = Vec::new();
    for child in &report.children {
        owner.wait_for(child.uuid, PATIENCE)?;
        children.push(owner.with(child.uuid, |known| known.pid)?);
        owner.results(child.uuid, 0, seq, PATIENCE)?;
    }
    for child in &report.children {
        owner.kill(child.uuid)?;
        owner.wait_exit(child.uuid, PATIENCE)?;
        owner.forget(child.uuid);
    }
    #[expect(clippy::cast_precision_loss, reason = "a fork takes less than 2^53 ns")]
    let branch_us = report.branch_ns().context("a fork without an end")? as f64 / 1e3;
    Ok(Forked {
        parent,
        children,
        branch_us,
        captured: report.captured_pages.into(),
        applied: report.children.iter().map(|child| u64::from(child.applied_pages)).sum(),
        private: report.children.iter().map(|child| u64::from(child.private_pages)).sum(),
    })
}

/// A step of parent and children.
fn all(op: u32, a: u64) -> WireStep {
    WireStep { op, who: who::ALL, result: 0, args: [a, 0, 0, 0] }
}

/// One processor for vCPUs and the others for standbys: a vCPU that wanders from fork to fork makes
/// the parent move its standbys out of the way, one call each.
fn processors() -> [u64; 2] {
    let all = runtime::sys::affinity();
    let first = all & all.wrapping_neg();
    if all == first { [0, 0] } else { [first, all & !first] }
}
