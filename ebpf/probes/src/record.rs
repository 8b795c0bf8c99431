//! What ends is counted here.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user, generated};
use ebpf_common::{
    Beacon, Cell, CellKey, Event, EventKind, Metric, Role, SAMPLES, Sample, Tracked, bucket, lost,
};

use crate::maps::{CELLS, EVENTS, PROCESSES, THREADS, TRACED, lose};

/// A process of ours, at a moment.
pub struct Current {
    pub pid: u32,
    pub tid: u32,
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

/// Whether a process is ours.
#[inline(always)]
pub fn is_ours(pid: u32) -> bool {
    PROCESSES.get_ptr(&pid).is_some()
}

/// The process of this moment, if it is ours, with what it says about itself. That is noted, too, for
/// moments at which its memory is not at hand.
#[inline(always)]
pub fn current() -> Option<Current> {
    let (pid, tid) = ids();
    let tracked = PROCESSES.get_ptr_mut(&pid)?;
    // SAFETY: an element of a map that is not freed while this program runs.
    let known: &mut Tracked = unsafe { &mut *tracked };
    let beacon = match known.beacon {
        0 => None,
        // SAFETY: the helper copes with every address.
        at => unsafe { bpf_probe_read_user(at as *const Beacon) }.ok(),
    };
    // Its last thread has no memory any more when it leaves: then what was known holds.
    if let Some(beacon) = &beacon {
        let role = u64::from(beacon.role);
        if known.role != role || known.born_ns != beacon.born_ns {
            known.born_ns = beacon.born_ns;
            known.role = role;
        }
    }
    Some(Current { pid, tid, beacon: beacon.unwrap_or(SILENT), role: known.role_at(now()) })
}

/// Counts a value: what took so many ns, or the reason of an exit.
#[inline(always)]
pub fn count(current: &Current, metric: u8, value: u64) {
    let Current { pid, tid, role, .. } = *current;
    if !sampled(tid, role, metric, value) {
        let (bucket, ns) =
            if metric == Metric::Exits as u8 { (value as u16, 0) } else { (bucket(value), value) };
        add(CellKey { pid, role, metric, bucket }, ns);
    }
}

/// So many wake-ups of a standby's thread are kept as they are: the last of them belongs to a fork.
const WAKE_UPS: u64 = 16;

/// Whether a value has found room in the thread's entry.
#[inline(always)]
fn sampled(tid: u32, role: u8, metric: u8, value: u64) -> bool {
    let most = if role == Role::Child as u8 || role == Role::Young as u8 {
        SAMPLES as u64
    } else if role == Role::Standby as u8 && metric == Metric::OffCpu as u8 {
        WAKE_UPS
    } else {
        return false;
    };
    let Some(thread) = THREADS.get_ptr_mut(&tid) else { return false };
    // SAFETY: an element of a map that is not freed while this program runs, and that only this
    // thread's programs write.
    let thread = unsafe { &mut *thread };
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
pub fn took(current: &Current, metric: Metric, ns: u64, event: Event) {
    count(current, metric as u8, ns);
    send(current, ns, event);
}

/// Sends an event if that is asked for.
#[inline(always)]
pub fn send(current: &Current, took_ns: u64, event: Event) {
    if TRACED.get(0).is_none_or(|traced| *traced == 0) {
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
