//! What a scenario must satisfy besides its types.

use guest_abi::port;
use runtime::fork::MAX_VCPUS;

use super::{Backing, Kind, PAGE_BYTES, Scenario, ScenarioError};

/// Checks one scenario.
///
/// # Errors
///
/// [`ScenarioError::Invalid`] with the first field at fault.
pub(super) fn check(scenario: &Scenario) -> Result<(), ScenarioError> {
    check_name(scenario)?;
    check_machine(scenario)?;
    check_pages(scenario)?;
    check_kind(scenario)
}

fn invalid(scenario: &Scenario, field: &'static str, problem: impl Into<String>) -> ScenarioError {
    ScenarioError::Invalid { name: scenario.name.clone(), field, problem: problem.into() }
}

fn within(
    scenario: &Scenario,
    field: &'static str,
    value: u32,
    (low, high): (u32, u32),
) -> Result<(), ScenarioError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(invalid(scenario, field, format!("is {value}, must be {low} to {high}")))
}

fn check_name(scenario: &Scenario) -> Result<(), ScenarioError> {
    // The name becomes part of file names, so nothing that a path could be made of.
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let name = &scenario.name;
    if name.is_empty() || name.len() > 40 || !name.chars().all(legal) || name.starts_with('-') {
        return Err(invalid(
            scenario,
            "name",
            "must be 1 to 40 of a-z, 0-9 and `-`, and not start with `-`",
        ));
    }
    Ok(())
}

fn check_machine(scenario: &Scenario) -> Result<(), ScenarioError> {
    let most_vcpus = u32::try_from(MAX_VCPUS).unwrap_or(u32::MAX);
    within(scenario, "memory_mib", scenario.memory_mib, (16, 1 << 16))?;
    within(scenario, "vcpus", scenario.vcpus, (1, most_vcpus))?;
    within(scenario, "forks", scenario.forks, (1, 1_000_000))?;
    within(scenario, "warmup", scenario.warmup, (0, 100_000))?;
    within(scenario, "announce_us", scenario.announce_us, (0, port::MAX_ANNOUNCE_US))?;
    within(scenario, "children_per_fork", scenario.children_per_fork, (1, port::MAX_CHILDREN))?;
    within(scenario, "depth", scenario.depth, (1, 10_000))?;
    within(scenario, "keep_children", scenario.keep_children, (0, 100_000))?;
    within(scenario, "cycles", scenario.cycles, (1, 1000))?;
    if scenario.reference_mib > 0 {
        within(scenario, "reference_mib", scenario.reference_mib, (16, 1 << 16))?;
    }
    if scenario.backing == Backing::Hugetlb && !scenario.memory_mib.is_multiple_of(2) {
        let problem = format!("is {}, must be even with 2 MiB pages", scenario.memory_mib);
        return Err(invalid(scenario, "memory_mib", problem));
    }
    Ok(())
}

fn check_pages(scenario: &Scenario) -> Result<(), ScenarioError> {
    // Half of the memory: the guest itself and its tables need room, and random pages must be
    // distinct without the guest searching for the last free ones.
    let room = scenario.memory_bytes() / PAGE_BYTES / 2;
    let fits = |field, pages: u64| {
        if pages <= room {
            return Ok(());
        }
        let problem = format!("needs {pages} pages, half of the memory is {room}");
        Err(invalid(scenario, field, problem))
    };
    if scenario.dirty.is_some_and(|dirty| dirty.pages == 0) {
        return Err(invalid(scenario, "dirty", "has 0 pages: leave it out"));
    }
    fits("dirty", u64::from(scenario.dirty_pages()))?;
    fits("check_pages", u64::from(scenario.check_pages))?;
    fits("work_mib", (u64::from(scenario.work_mib) << 20) / PAGE_BYTES)?;
    within(scenario, "rate_pages_per_second", scenario.rate_pages_per_second, (0, 10_000_000))
}

fn check_kind(scenario: &Scenario) -> Result<(), ScenarioError> {
    // A field that the kind does not look at would be a scenario that measures something else
    // than its text says.
    let only = |field, kind: Kind, is_set: bool, needed: &str| {
        if (scenario.kind == kind) == is_set {
            return Ok(());
        }
        let problem = if is_set {
            format!("is only for kind {kind:?}, this is {:?}", scenario.kind)
        } else {
            format!("{needed} for kind {kind:?}")
        };
        Err(invalid(scenario, field, problem.to_lowercase()))
    };
    only("depth", Kind::Depth, scenario.depth > 1, "must be 2 or more")?;
    only("keep_children", Kind::Children, scenario.keep_children > 0, "must be 1 or more")?;
    only("children_per_fork", Kind::Fanout, scenario.children_per_fork > 1, "must be 2 or more")?;
    if scenario.kind != Kind::Probes {
        only("work_mib", Kind::Tax, scenario.work_mib > 0, "must be 1 or more")?;
    }
    if scenario.cycles > 1 && scenario.kind != Kind::Children {
        return Err(invalid(scenario, "cycles", "is only for kind children"));
    }
    if scenario.is_open_loop() && scenario.kind != Kind::Fork {
        return Err(invalid(scenario, "interval_us", "is only for kind fork"));
    }
    if scenario.kind.is_linux() {
        check_linux(scenario)?;
    }
    check_reference(scenario)
}

/// A Linux guest is not told what to write.
fn check_linux(scenario: &Scenario) -> Result<(), ScenarioError> {
    let refused = [
        ("dirty", scenario.dirty.is_some()),
        ("rate_pages_per_second", scenario.rate_pages_per_second > 0),
        ("announce_us", scenario.announce_us > 0),
        ("delay_us", scenario.delay_us > 0),
        ("backing", scenario.backing != Backing::Default),
        ("vcpus", scenario.vcpus > 1),
        ("sync", !scenario.sync),
    ];
    match refused.into_iter().find(|(_, is_set)| *is_set) {
        Some((field, _)) => Err(invalid(scenario, field, "is not for Linux guests")),
        None => Ok(()),
    }
}

fn check_reference(scenario: &Scenario) -> Result<(), ScenarioError> {
    // What makes a machine different from `quiet` besides its memory would be in both.
    if scenario.reference_mib > 0 && !scenario.is_plain() {
        let problem = "is only for kind fork, closed loop, of a parent that writes nothing";
        return Err(invalid(scenario, "reference_mib", problem));
    }
    if scenario.reference_forks > 0 && scenario.reference_mib == 0 {
        return Err(invalid(scenario, "reference_forks", "is only with reference_mib"));
    }
    if scenario.reference_forks > scenario.forks {
        let problem = format!("is {}, of {} forks", scenario.reference_forks, scenario.forks);
        return Err(invalid(scenario, "reference_forks", problem));
    }
    Ok(())
}
