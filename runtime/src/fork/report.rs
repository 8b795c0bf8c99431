//! What is told of a fork when it is over.

use ebpf_loader::{Counted, Metric, Role};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::link::{ForkBlock, Slot};
use super::step::{Moment, Stamps};

/// One fork, as seen by its parent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ForkReport {
    /// 1 for the first fork of this instance.
    pub number: u32,
    /// Whether the guest asked for it (or the host).
    pub from_guest: bool,
    /// Pages captured while the vCPUs were stopped.
    pub captured_pages: u32,
    /// Moments of the parent.
    pub parent: ParentMoments,
    /// The children that came to life.
    pub children: Vec<ChildReport>,
    /// Children asked for.
    pub requested: u32,
    /// Step that failed and errno.
    pub failed: Option<(super::Step, i32)>,
}

/// Moments of the parent in nanoseconds after the doorbell.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ParentMoments {
    /// The doorbell itself, in nanoseconds of the monotonic clock.
    #[serde(default)]
    pub doorbell_ns: u64,
    /// Standbys woken.
    pub woken: u64,
    /// Other vCPUs stopped.
    pub quiesced: u64,
    /// Doorbell instruction finished.
    pub settled: u64,
    /// Pages in the journal.
    pub pages: u64,
    /// State captured.
    pub released: u64,
    /// About to enter the guest again.
    pub resumed: u64,
}

/// One child.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ChildReport {
    /// Its UUID.
    pub uuid: Uuid,
    /// 1 to n.
    pub index: u32,
    /// Awake, in nanoseconds after the parent's doorbell, as are the following.
    pub awake: u64,
    /// Pages in memory.
    pub applied: u64,
    /// State and identity set.
    pub restored: u64,
    /// About to enter the guest.
    pub entered: u64,
    /// Out of the guest for the first time.
    pub exited: u64,
    /// Pages applied after it woke up.
    pub applied_pages: u32,
    /// Of which were private before.
    pub private_pages: u32,
    /// Of which a second thread applied.
    pub helped_pages: u32,
    /// Minor page faults of its process from waking up to its first exit.
    pub faults: u32,
    /// CPU time of its process until its first exit, in nanoseconds.
    pub cpu_ns: u64,
    /// Time to make it, in nanoseconds.
    pub prewarm_ns: u64,
}

impl ForkReport {
    /// `branch` in nanoseconds: from the doorbell until the last child has left the guest once and
    /// the parent is back.
    #[must_use]
    pub fn branch_ns(&self) -> Option<u64> {
        let last = self.children.iter().map(|child| child.exited).max()?;
        (self.failed.is_none()).then_some(last.max(self.parent.resumed))
    }

    /// Adds the stages of a fork that was made: of the parent, and of each child.
    pub fn count_stages(&self, counted: &mut Counted) {
        if self.failed.is_some() {
            return;
        }
        let parent = &self.parent;
        let moments = [
            (Metric::StageTakeWake, parent.woken),
            (Metric::StageQuiesce, parent.quiesced),
            (Metric::StageSettle, parent.settled),
            (Metric::StageCapturePages, parent.pages),
            (Metric::StageCaptureState, parent.released),
            (Metric::StageResume, parent.resumed),
        ];
        count_stages(counted, Role::Parent, 0, &moments);
        for child in &self.children {
            let moments = [
                (Metric::StageApply, child.applied),
                (Metric::StageRestore, child.restored),
                (Metric::StageCommit, child.entered),
                (Metric::StageRun, child.exited),
            ];
            count_stages(counted, Role::Child, child.awake, &moments);
        }
    }

    pub(super) fn parent_moments(block: &ForkBlock) -> ParentMoments {
        let since = Since::new(&block.stamps);
        ParentMoments {
            doorbell_ns: since.doorbell_ns,
            woken: since.of(&block.stamps, Moment::Woken),
            quiesced: since.of(&block.stamps, Moment::Quiesced),
            settled: since.of(&block.stamps, Moment::Settled),
            pages: since.of(&block.stamps, Moment::Pages),
            released: since.of(&block.stamps, Moment::Released),
            resumed: since.of(&block.stamps, Moment::Resumed),
        }
    }
}

/// Each stage ends where the next begins.
fn count_stages(counted: &mut Counted, role: Role, begin: u64, moments: &[(Metric, u64)]) {
    let mut before = begin;
    for (metric, at) in moments {
        counted.entry((role, *metric)).or_default().record(at.saturating_sub(before));
        before = *at;
    }
}

impl ChildReport {
    pub(super) fn new(slot: &Slot, uuid: Uuid, doorbell_ns: u64) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let since = Since { doorbell_ns };
        let of = |moment| since.of(&slot.stamps, moment);
        Self {
            uuid,
            index: slot.index.load(Relaxed),
            awake: of(Moment::Awake),
            applied: of(Moment::Applied),
            restored: of(Moment::Restored),
            entered: of(Moment::Entered),
            exited: of(Moment::Exited),
            applied_pages: slot.applied.load(Relaxed),
            private_pages: slot.applied_private.load(Relaxed),
            helped_pages: slot.applied_helped.load(Relaxed),
            faults: slot.faults.load(Relaxed),
            cpu_ns: slot.cpu_ns.load(Relaxed),
            prewarm_ns: slot.prewarm_ns.load(Relaxed),
        }
    }
}

struct Since {
    doorbell_ns: u64,
}

impl Since {
    fn new(stamps: &Stamps) -> Self {
        Self { doorbell_ns: stamps.get(Moment::Doorbell) }
    }

    fn of(&self, stamps: &Stamps, moment: Moment) -> u64 {
        stamps.get(moment).saturating_sub(self.doorbell_ns)
    }
}
