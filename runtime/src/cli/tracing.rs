//! The owner's side of `trace`.

use std::collections::HashMap;
use std::time::Duration;

use ebpf_loader::{Event, EventKind, Level, Lost, Metric, Probes, Role};
use runtime::fork::ForkReport;
use runtime::memory::RamLayout;
use runtime::owner::{Owner, OwnerError};
use uuid::Uuid;

use super::wire::{Answer, Traced, TracedEvent};

/// How often the events are fetched, so that there is room for new ones.
const FETCH: Duration = Duration::from_millis(20);
/// What a fork's children do this long after it belongs to it: a millisecond of work, and some.
const AFTER: Duration = Duration::from_millis(3);
/// Events kept while a fork is waited for: those of the last one are among them.
const KEPT: usize = 65536;
/// Events in one answer, so that it stays below `runtime::proto::MAX_MESSAGE`.
const EVENTS_AT_ONCE: usize = 400;
/// What happened this long before the doorbell is shown: the exit that brought it.
const BEFORE_NS: i64 = 20_000;
const AFTER_NS: i64 = 1_000_000;

/// Waits for a fork (or makes it), with every event in it.
pub fn trace(
    owner: &Owner,
    uuid: Uuid,
    branch: bool,
    hung_up: impl Fn() -> bool,
) -> Result<Vec<Answer>, OwnerError> {
    // Everything, for as long as it takes.
    let level = owner.probes(|probes| probes.level()).unwrap_or_default();
    let set = |level, on| {
        let level = owner.probes(|probes| probes.set_level(level));
        // Whatever came of the first.
        let traced = owner.probes(|probes| probes.trace(on));
        level.and_then(Result::err).or(traced.and_then(Result::err))
    };
    if let Some(error) = set(Level::Trace, true) {
        drop(set(level, false));
        return Ok(vec![Answer::Failed(runtime::sys::chain(&error))]);
    }
    let result = traced(owner, uuid, branch, hung_up);
    // It was possible a moment ago; if not now, the events are dropped when there is no room.
    drop(set(level, false));
    result
}

fn traced(
    owner: &Owner,
    uuid: Uuid,
    branch: bool,
    hung_up: impl Fn() -> bool,
) -> Result<Vec<Answer>, OwnerError> {
    let before = lost(owner);
    let number = |report: &ForkReport| report.number;
    let last = owner.with(uuid, |known| known.last_fork.as_ref().map(number))?;
    let mut events: Vec<Event> = Vec::new();
    let mut dropped_until_ns = 0;
    let mut fetch = || {
        events.extend(owner.probes(Probes::events).unwrap_or_default());
        let many = events.len().saturating_sub(KEPT);
        let dropped = events.drain(..many).map(|event| event.ns).max();
        dropped_until_ns = dropped_until_ns.max(dropped.unwrap_or(0));
    };
    fetch();
    if branch {
        owner.branch(uuid, 1)?;
    }
    let report = loop {
        fetch();
        let known = owner.with(uuid, |known| (known.last_fork.clone(), known.gone))?;
        match known {
            (Some(report), _) if Some(report.number) != last => break report,
            (_, true) => {
                let exit = owner.with(uuid, |known| known.exit.clone())?;
                let (code, why) = exit.unwrap_or((137, None));
                return Err(OwnerError::Ended { uuid, code, why });
            }
            _ if hung_up() => return Ok(vec![Answer::Done]),
            _ => std::thread::sleep(FETCH),
        }
    };
    std::thread::sleep(AFTER);
    fetch();
    let parent_pid = owner.with(uuid, |known| known.pid.cast_unsigned())?;
    let lost = lost(owner).since(&before);
    let cut = dropped_until_ns + BEFORE_NS.unsigned_abs() >= report.parent.doorbell_ns;
    let missing = |probes: &mut Probes| {
        let all = probes.shortfalls().into_iter().filter(|it| it.instead.is_none());
        all.map(|shortfall| shortfall.to_string()).collect()
    };
    let missing = owner.probes(missing).unwrap_or_default();
    let told = of_fork(owner, uuid, &report, &events)?;
    let traced = Traced { report, parent_pid, events: Vec::new(), missing, cut, lost };
    Ok(parts(traced, &told))
}

/// A trace in answers that fit a message each.
fn parts(traced: Traced, events: &[TracedEvent]) -> Vec<Answer> {
    let events = events.chunks(EVENTS_AT_ONCE).map(|part| Answer::Events(part.to_vec()));
    let first = Answer::Traced(Box::new(traced));
    std::iter::once(first).chain(events).chain([Answer::Done]).collect()
}

fn lost(owner: &Owner) -> Lost {
    owner.probes(|probes| probes.lost().unwrap_or_default()).unwrap_or_default()
}

/// The events of parent and children around a fork, in order.
fn of_fork(
    owner: &Owner,
    parent: Uuid,
    report: &ForkReport,
    events: &[Event],
) -> Result<Vec<TracedEvent>, OwnerError> {
    let ns = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
    let pid = |uuid| owner.with(uuid, |known| known.pid.cast_unsigned());
    let mut takers = HashMap::new();
    takers.insert(pid(parent)?, (parent, ns(report.parent.resumed)));
    for child in &report.children {
        // It may have ended, so long ago that it is forgotten.
        if let Ok(pid) = pid(child.uuid) {
            takers.insert(pid, (child.uuid, ns(child.exited)));
        }
    }
    let mut told: Vec<TracedEvent> = events
        .iter()
        .filter_map(|event| {
            let (instance, until) = *takers.get(&event.pid)?;
            let at_ns = ns(event.ns) - ns(report.parent.doorbell_ns);
            told(event, instance, at_ns).filter(|_| at_ns < until.saturating_add(AFTER_NS))
        })
        .collect();
    told.sort_by_key(|event| event.at_ns);
    Ok(told)
}

/// An event as it is told, unless it is no part of a fork.
fn told(event: &Event, instance: Uuid, at_ns: i64) -> Option<TracedEvent> {
    let Event { took_ns, detail, pid, .. } = *event;
    let (kind, role) = (EventKind::from_number(event.kind)?, Role::from_number(event.role)?);
    // Of a child's time as a standby its end is, which is its wake-up: the wait for a processor.
    let part = role != Role::Standby || kind == EventKind::OffCpu;
    let what = match kind {
        EventKind::Fault if is_of_guest(detail) => RamLayout::address(event.what),
        _ => event.what,
    };
    let (kind, stage) = (kind as u8, event.stage);
    let told = TracedEvent { at_ns, took_ns, pid, instance, kind, role, stage, what, detail };
    Some(told).filter(|_| part && at_ns >= -BEFORE_NS)
}

/// Whether a page fault was in guest memory, by its detail.
fn is_of_guest(detail: u64) -> bool {
    let metric = u8::try_from(detail >> 32).ok().and_then(Metric::from_number);
    metric.is_some_and(|metric| Metric::GUEST_FAULTS.contains(&metric))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind, role: Role, what: u64, detail: u64) -> Event {
        Event { kind: kind as u8, role: role as u8, what, detail, ..Event::default() }
    }

    #[test]
    fn a_child_s_wake_up_is_part_of_its_fork_and_the_rest_of_its_sleep_is_not() {
        let is_told =
            |kind, at_ns| told(&event(kind, Role::Standby, 0, 0), Uuid::nil(), at_ns).is_some();
        assert!(is_told(EventKind::OffCpu, 60_000));
        assert!(!is_told(EventKind::Fault, 60_000) && !is_told(EventKind::Ioctl, 60_000));
        assert!(!is_told(EventKind::OffCpu, -BEFORE_NS - 1));
    }

    #[test]
    fn faults_in_guest_memory_are_told_by_the_guest_s_address() {
        let what = |metric: Metric, at| {
            let event = event(EventKind::Fault, Role::Child, at, (metric as u64) << 32 | 7);
            told(&event, Uuid::nil(), 0).map(|told| told.what)
        };
        assert_eq!(what(Metric::GuestCow, 0x5000), Some(0x5000));
        assert_eq!(what(Metric::GuestMinor, (3 << 30) + 0x5000), Some((4 << 30) + 0x5000));
        assert_eq!(what(Metric::OwnCow, (3 << 30) + 0x5000), Some((3 << 30) + 0x5000));
        let of_kvm = event(EventKind::KvmFault, Role::Child, 4 << 30, 0);
        assert_eq!(told(&of_kvm, Uuid::nil(), 0).map(|told| told.what), Some(4 << 30));
    }

    #[test]
    fn a_part_fits_a_message() {
        let event = Event {
            took_ns: u64::MAX,
            what: u64::MAX,
            detail: u64::MAX,
            pid: u32::MAX,
            stage: u16::MAX,
            ..event(EventKind::OffCpu, Role::Unknown, 0, 0)
        };
        let event = told(&event, Uuid::max(), i64::MAX).expect("it is part of a fork");
        let part = Answer::Events(vec![event; EVENTS_AT_ONCE]);
        let bytes = serde_json::to_vec(&part).expect("it has no maps").len();
        assert!(bytes < runtime::proto::MAX_MESSAGE, "{bytes} bytes");
    }
}
