//! What ends is counted here.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user, generated};
use ebpf_common::{Beacon, Cell, CellKey, Event, EventKind, Metric, Role, Tracked, lost};

use crate::maps::{CELLS, EVENTS, PROCESSES, lose};

/// A process of ours that is running on this processor.
pub struct Current {
    pub pid: u32,
    pub tid: u32,
    pub beacon: Beacon,
    pub role: u8,
    pub traced: bool,
}

/// Process and thread of this moment.
#[inline(always)]
pub fn ids() -> (u32, u32) {
    let both = bpf_get_current_pid_tgid();
    ((both >> 32) as u32, both as u32)
}

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: has no preconditions.
    unsafe { generated::bpf_ktime_get_ns() }
}

/// Whether a process is ours.
#[inline(always)]
pub fn is_ours(pid: u32) -> bool {
    PROCESSES.get_ptr(&pid).is_some()
}

/// The process of this moment, if it is ours, with what it says about itself.
#[inline(always)]
pub fn current() -> Option<Current> {
    let (pid, tid) = ids();
    let tracked: *mut Tracked = PROCESSES.get_ptr_mut(&pid)?;
    // SAFETY: an element of a map that is not freed while this program runs.
    let tracked = unsafe { &mut *tracked };
    let traced = tracked.traced != 0;
    let beacon = match tracked.beacon {
        0 => None,
        // SAFETY: the helper copes with every address.
        at => unsafe { bpf_probe_read_user(at as *const Beacon) }.ok(),
    };
    let beacon =
        beacon.unwrap_or(Beacon { role: 0, stage: 0, guest_start: 0, guest_len: 0, born_ns: 0 });
    let mut role = beacon.role as u8;
    if role == Role::Parent as u8 && beacon.born_ns != 0 && now() - beacon.born_ns < Role::YOUNG_NS
    {
        role = Role::Young as u8;
    }
    // For those who ask from outside.
    if tracked.role != u32::from(role) {
        tracked.role = u32::from(role);
    }
    Some(Current { pid, tid, beacon, role, traced })
}

/// Counts something that took `ns`, in the bucket given.
#[inline(always)]
pub fn count(pid: u32, role: u8, metric: Metric, bucket: u16, ns: u64) {
    let key = CellKey { pid, role, metric: metric as u8, bucket };
    if let Some(cell) = CELLS.get_ptr_mut(&key) {
        // SAFETY: this processor's own value of an element of the map.
        let cell = unsafe { &mut *cell };
        cell.count += 1;
        cell.sum += ns;
    } else if CELLS.insert(&key, &Cell { count: 1, sum: ns }, 0).is_err() {
        lose(lost::CELLS);
    }
}

/// Counts something that took `ns`, and sends it if the process is traced.
#[inline(always)]
pub fn took(current: &Current, metric: Metric, ns: u64, event: Event) {
    count(current.pid, current.role, metric, ebpf_common::bucket(ns), ns);
    send(current, ns, event);
}

/// Sends an event if the process is traced.
#[inline(always)]
pub fn send(current: &Current, took_ns: u64, event: Event) {
    if !current.traced {
        return;
    }
    let event = Event {
        ns: now(),
        took_ns,
        pid: current.pid,
        tid: current.tid,
        role: current.role,
        stage: current.beacon.stage as u16,
        ..event
    };
    if EVENTS.output::<Event>(&event, 0).is_err() {
        lose(lost::EVENTS);
    }
}

/// An event of that kind, about `what`.
#[inline(always)]
pub fn event(kind: EventKind, what: u64, detail: u64) -> Event {
    Event {
        kind: kind as u8,
        what,
        detail,
        ns: 0,
        took_ns: 0,
        pid: 0,
        tid: 0,
        role: 0,
        stage: 0,
        unused: 0,
    }
}
