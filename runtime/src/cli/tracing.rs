//! The owner's side of `trace`.

use std::collections::HashMap;
use std::time::Duration;

use ebpf_loader::{Event, EventKind, Level, Lost, Role};
use runtime::fork::ForkReport;
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
const TOLD: usize = 800;
/// Events that take as much room as what the report says of a child.
const REPORTED: usize = 3;
/// What happened this long before the doorbell is shown: the exit that brought it.
const BEFORE_NS: i64 = 20_000;
const AFTER_NS: i64 = 1_000_000;

/// Waits for a fork (or makes it), with every event in it.
pub fn trace(
    owner: &Owner,
    uuid: Uuid,
    branch: bool,
    hung_up: impl Fn() -> bool,
) -> Result<Answer, OwnerError> {
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
        return Ok(Answer::Failed(runtime::sys::chain(&error)));
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
) -> Result<Answer, OwnerError> {
    let before = lost(owner);
    let number = |report: &ForkReport| report.number;
    let last = owner.with(uuid, |known| known.last_fork.as_ref().map(number))?;
    let mut events: Vec<Event> = Vec::new();
    let mut fetch = || {
        events.extend(owner.probes(ebpf_loader::Probes::events).unwrap_or_default());
        let many = events.len().saturating_sub(KEPT);
        events.drain(..many);
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
            _ if hung_up() => return Ok(Answer::Done),
            _ => std::thread::sleep(FETCH),
        }
    };
    std::thread::sleep(AFTER);
    fetch();
    let parent_pid = owner.with(uuid, |known| known.pid.cast_unsigned())?;
    let lost = lost(owner).since(&before);
    let mut told = of_fork(owner, &report, parent_pid, &events);
    let room = TOLD.saturating_sub(report.children.len() * REPORTED);
    let left_out = told.len().saturating_sub(room);
    told.truncate(room);
    Ok(Answer::Traced(Box::new(Traced { report, parent_pid, events: told, left_out, lost })))
}

fn lost(owner: &Owner) -> Lost {
    owner.probes(|probes| probes.lost().unwrap_or_default()).unwrap_or_default()
}

/// The events of parent and children around a fork, in order.
fn of_fork(
    owner: &Owner,
    report: &ForkReport,
    parent_pid: u32,
    events: &[Event],
) -> Vec<TracedEvent> {
    let mut until: HashMap<u32, i64> = HashMap::new();
    let ns = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
    until.insert(parent_pid, ns(report.parent.resumed) + AFTER_NS);
    for child in &report.children {
        if let Ok(pid) = owner.with(child.uuid, |known| known.pid.cast_unsigned()) {
            until.insert(pid, ns(child.exited) + AFTER_NS);
        }
    }
    let mut told: Vec<TracedEvent> = events
        .iter()
        .filter_map(|event| {
            let at_ns = ns(event.ns) - ns(report.parent.doorbell_ns);
            let until = until.get(&event.pid)?;
            let role = Role::from_number(event.role)?;
            // A child's time as a standby is not part of the fork.
            let within = (-BEFORE_NS..*until).contains(&at_ns) && role != Role::Standby;
            EventKind::from_number(event.kind).filter(|_| within)?;
            let Event { took_ns, what, detail, pid, kind, stage, .. } = *event;
            Some(TracedEvent { at_ns, took_ns, pid, kind, role, stage, what, detail })
        })
        .collect();
    told.sort_by_key(|event| event.at_ns);
    told
}
