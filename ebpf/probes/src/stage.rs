//! Moments of a fork, where the engine marks them (`ukp:stage`), for who looks at a single fork: the
//! engine's report of each fork has the stages.

use aya_ebpf::macros::uprobe;
use aya_ebpf::programs::ProbeContext;
use ebpf_common::EventKind;

use crate::record::{current_now, event, send, this};

#[uprobe]
pub fn stage(_ctx: ProbeContext) -> u32 {
    if let Some(thread) = this() {
        let current = current_now(thread);
        send(thread, &current, 0, event(EventKind::Stage, current.beacon.stage.into(), 0));
    }
    0
}
