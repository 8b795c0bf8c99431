//! Stages of a fork, where the engine marks them (`ukp:stage`).

use aya_ebpf::macros::uprobe;
use aya_ebpf::programs::ProbeContext;
use ebpf_common::{EventKind, Metric};

use crate::record::{count, current, event, send};

/// A mark ends the stage that the one before it began. Its time is the engine's: that of the kernel
/// comes 1 to 3 us later. A fork's first mark in parent and child, and
/// those of several vCPUs that go on one after the other, end none.
#[uprobe]
pub fn stage(_ctx: ProbeContext) -> u32 {
    if let Some(current) = current() {
        let (stage, ns) = (current.beacon.stage, current.beacon.stage_ns);
        // SAFETY: an element of a map that is not freed while this program runs. Marks of one
        // process may come from several of its threads, but in order.
        let before = unsafe {
            let tracked = &mut *current.tracked;
            let before = (tracked.stage, tracked.stage_ns);
            (tracked.stage, tracked.stage_ns) = (stage, ns);
            before
        };
        if before.0 != 0 && stage == before.0 + 1 {
            count(&current, Metric::STAGES + stage as u8, ns.saturating_sub(before.1));
        }
        send(&current, 0, event(EventKind::Stage, stage.into(), 0));
    }
    0
}
