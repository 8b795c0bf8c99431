//! What ends is counted here.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user, generated};
use ebpf_common::{
    Beacon, Cell, CellKey, Event, EventKind, Metric, Role, SAMPLES, Sample, Thread, bucket, lost,
};

use crate::maps::{CELLS, EVENTS, PROCESSES, THREADS, lose, settings};

/// What a thread of ours is at a moment.
pub struct Current {
    pub beacon: Beacon,
    pub role: u8,
}

/// A process that says nothing about itself.
pub const SILENT: Beacon = Beacon { role: 0, stage: 0, guest_start: 0, guest_len: 0, born_ns: 0 };

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

/// A thread of ours. One that has ended may have left its entry to the loader, and its number to
/// somebody else.
#[inline(always)]
pub fn known(pid: u32, tid: u32) -> Option<&'static mut Thread> {
    let thread = THREADS.get_ptr_mut(&tid)?;
    // SAFETY: an element of a map that is not freed while this program runs, and that only this thread's
    // programs write, and whoever wakes it.
    let thread = unsafe { &mut *thread };
    (thread.pid == pid && thread.tid == tid).then_some(thread)
}

/// The thread of this moment, if it is ours.
#[inline(always)]
pub fn this() -> Option<&'static mut Thread> {
    let (pid, tid) = ids();
    // Of the idle ones there is none.
    if tid == 0 { None } else { known(pid, tid) }
}

/// What its process says about itself, now: `thread` is [`this`]. That is noted, too, for moments at
/// which its memory is not at hand.
#[inline(always)]
pub fn look(thread: &mut Thread) -> Beacon {
    if thread.beacon == 0 {
        // SAFETY: an element of a map that is not freed while this program runs.
        thread.beacon = PROCESSES.get_ptr(&thread.pid).map_or(0, |at| unsafe { *at });
    }
    let beacon = match thread.beacon {
        0 => None,
        // SAFETY: the helper copes with every address.
        at => unsafe { bpf_probe_read_user(at as *const Beacon) }.ok(),
    };
    // Its last thread has no memory any more when it leaves: then what was known holds.
    let Some(beacon) = beacon else { return SILENT };
    thread.role = beacon.role.into();
    thread.born_ns = beacon.born_ns;
    beacon
}

/// What `thread`, which is [`this`], is at `now`.
#[inline(always)]
pub fn current(thread: &mut Thread, now: u64) -> Current {
    let beacon = look(thread);
    Current { beacon, role: thread.role_at(now) }
}

/// The same of this moment: the clock is read only where it matters.
#[inline(always)]
pub fn current_now(thread: &mut Thread) -> Current {
    let beacon = look(thread);
    let now = if thread.born_ns == 0 { 0 } else { now() };
    Current { beacon, role: thread.role_at(now) }
}

/// So many wake-ups of a standby's thread are kept as they are: the last of them belongs to a fork.
const WAKE_UPS: u64 = 16;

/// Whether a value has found room in the thread's entry.
#[inline(always)]
fn sampled(thread: &mut Thread, role: u8, metric: u8, value: u64) -> bool {
    let most = if role == Role::Child as u8 || role == Role::Young as u8 {
        SAMPLES as u64
    } else if role == Role::Standby as u8 && metric == Metric::OffCpu as u8 {
        WAKE_UPS
    } else {
        return false;
    };
    let at = thread.used;
    if at >= most {
        return false;
    }
    let Some(sample) = thread.samples.get_mut(at as usize) else { return false };
    *sample = Sample { role, metric, value }.word();
    thread.used = at + 1;
    true
}

#[inline(always)]
fn add(key: CellKey, ns: u64) {
    if let Some(cell) = CELLS.get_ptr_mut(&key) {
        // SAFETY: this processor's own value of an element of the map.
        let cell = unsafe { &mut *cell };
        cell.count += 1;
        cell.sum += ns;
    } else if CELLS.insert(&key, &Cell { count: 1, sum: ns }, 0).is_err() {
        lose(lost::CELLS);
    }
}

/// Counts something that took `ns`, and sends it if that is asked for.
#[inline(always)]
pub fn took(thread: &mut Thread, current: &Current, metric: Metric, ns: u64, event: Event) {
    let Current { role, .. } = *current;
    if !sampled(thread, role, metric as u8, ns) {
        add(CellKey { pid: thread.pid, role, metric: metric as u8, bucket: bucket(ns) }, ns);
    }
    send(thread, current, ns, event);
}

/// Whether what happens is sent.
#[inline(always)]
pub fn traced() -> bool {
    settings().is_some_and(|settings| settings.traced != 0)
}

/// Sends an event if that is asked for.
#[inline(always)]
pub fn send(thread: &Thread, current: &Current, took_ns: u64, event: Event) {
    if !traced() {
        return;
    }
    let event = Event {
        ns: now(),
        took_ns,
        pid: thread.pid,
        tid: thread.tid,
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
