//! Stages of a fork, where the engine marks them (`ukp:stage`).

use aya_ebpf::macros::uprobe;
use aya_ebpf::programs::ProbeContext;
use ebpf_common::EventKind;

use crate::record::{current, event, send};

#[uprobe]
pub fn stage(_ctx: ProbeContext) -> u32 {
    if let Some(current) = current() {
        let stage = current.beacon.stage;
        send(&current, 0, event(EventKind::Stage, stage.into(), 0));
    }
    0
}
