//! Trees of instances, seen and handled from outside.

use libtest_mimic::Failed;
use serde_json::Value;

use super::tools::{Folder, Owner, holds, same, start, until};

pub fn nothing_runs_and_ps_says_so() -> Result<(), Failed> {
    let folder = Folder::new()?;
    same(&folder.json(&["ps", "--json"])?, &serde_json::json!([]), &"ps")?;
    let done = folder.done(&["branch", "00"])?;
    same(&done.code, &64, &done)?;
    holds(done.err.contains("none runs"), &done)
}

pub fn a_tree_is_seen_and_killed() -> Result<(), Failed> {
    let mut owner = Owner::start(&[])?;
    let root = owner.root.to_string();
    let folder = &owner.folder;
    let one = folder.done(&["branch", &root])?;
    same(&one.code, &0, &one)?;
    let child = one.out.trim().to_owned();
    let two = folder.json(&["branch", "-n", "2", "--json", &child[..18]])?;
    same(&two["parent"], &child, &two)?;
    same(&two["children"].as_array().map(Vec::len), &Some(2), &two)?;

    // A child calls its owner a moment after the fork is done.
    let listed = |count: usize| {
        until("instances", || {
            let listed = folder.json(&["ps", "--json"]).ok()?;
            (listed.as_array()?.len() == count).then_some(listed)
        })
    };
    let list = listed(4)?;
    let parents: Vec<_> = list.as_array().into_iter().flatten().map(|one| &one["parent"]).collect();
    same(&parents.iter().filter(|parent| ***parent == child).count(), &2, &list)?;
    same(&parents.iter().filter(|parent| ***parent == root).count(), &1, &list)?;
    let text = folder.done(&["ps"])?;
    same(&text.out.lines().count(), &5, &text)?;
    same(&text.out.lines().filter(|line| line.starts_with("   ├─ ")).count(), &1, &text)?;

    // The middle of the tree goes; its children stay, and are found all the same.
    let killed = folder.json(&["kill", "--json", &child])?;
    same(&killed["killed"], &1, &killed)?;
    listed(3)?;
    let ended = folder.done(&["wait", &child])?;
    same(&(ended.code, ended.out.as_str()), &(137, "137\n"), &ended)?;
    let again = folder.done(&["kill", &child])?;
    same(&again.code, &64, &again)?;
    let rest = folder.json(&["kill", "-r", "--json", &root])?;
    same(&rest["killed"], &3, &rest)?;
    same(&owner.end()?, &137, &"the root was killed")?;
    same(&owner.processes(), &Vec::<i32>::new(), &"processes were left")?;
    same(&owner.folder.owners(), &0, &"an owner's folder was left")
}

pub fn pause_stop_wait_and_stats() -> Result<(), Failed> {
    let mut owner = Owner::start(&["--standbys", "2"])?;
    let root = owner.root.to_string();
    let folder = &owner.folder;
    let state = |folder: &Folder| -> Result<Value, Failed> {
        Ok(folder.json(&["ps", "--json"])?[0]["state"].clone())
    };
    folder.json(&["pause", "--json", &root])?;
    same(&state(folder)?, &"Paused", &"pause")?;
    folder.json(&["resume", "--json", &root])?;
    same(&state(folder)?, &"Running", &"resume")?;
    folder.json(&["branch", "--json", &root])?;
    let stats = folder.json(&["stats", "--json", &root])?;
    same(&stats["stats"]["forks"], &1, &stats)?;
    let text = folder.done(&["stats", &root])?;
    holds(
        text.out.lines().any(|line| line.starts_with("forks made ") && line.ends_with(" 1")),
        &text,
    )?;
    let waiting = folder.runtime(&["wait", &root]).stdout(std::process::Stdio::piped()).spawn()?;
    folder.json(&["stop", "--json", "--code", "33", &root])?;
    let waited = super::tools::Done::of(waiting)?;
    same(&(waited.code, waited.out.as_str()), &(33, "33\n"), &waited)?;
    // The child still runs, and with it the owner.
    let left = folder.json(&["ps", "--json"])?;
    same(&left.as_array().map(Vec::len), &Some(1), &left)?;
    let child = left[0]["uuid"].as_str().ok_or("no UUID")?.to_owned();
    folder.json(&["stop", "--json", &child])?;
    same(&owner.end()?, &33, &"the root's code")
}

/// With probes, or with a line that says why there are none.
pub fn stats_and_trace_show_what_the_probes_saw() -> Result<(), Failed> {
    let owner = Owner::start(&["--probes", "all"])?;
    let (folder, root) = (&owner.folder, owner.root.to_string());
    folder.json(&["branch", "--json", &root])?;
    let stats = folder.json(&["stats", "--json", &root])?;
    let probes = &stats["probes"];
    let traced = folder.done(&["trace", "--branch", "--json", &root])?;
    let scrape = folder.done(&["stats", "--prometheus", &root])?;
    holds(
        scrape.out.contains("ukp_forks_total{instance=") && scrape.out.contains("# EOF"),
        &scrape,
    )?;
    let rows = probes["rows"].as_array().ok_or("no rows")?;
    holds(rows.iter().any(|row| row["role"] == "parent" && row["metric"] == "exits"), &stats)?;
    if let Some(why) = probes["off"].as_str() {
        eprintln!("without probes: {why}");
        return holds(traced.code != 0 && traced.err.contains("probes are off"), &traced);
    }
    holds(rows.iter().any(|row| row["metric"] == "guest_minor"), &stats)?;
    holds(scrape.out.contains("ukp_probe_seconds_bucket{le="), &scrape)?;
    let traced: Value = serde_json::from_str(&traced.out)?;
    let events = traced["trace"]["events"].as_array().ok_or("no events")?;
    // An ioctl of parent and child each: the levels that are off otherwise are on.
    let parent = &traced["trace"]["parent_pid"];
    holds(events.iter().any(|event| event["kind"] == 4 && event["pid"] == *parent), &traced)?;
    holds(events.iter().any(|event| event["kind"] == 4 && event["pid"] != *parent), &traced)?;
    let text = folder.done(&["trace", "-b", &root])?;
    holds(text.out.contains("── doorbell") && text.out.contains("ioctl: KVM_RUN"), &text)?;
    a_wait_is_shown(folder, &root)?;
    a_fault_is_shown(folder, &root)
}

/// So many forks are looked at, at most, for what most have.
const FORKS: usize = 20;

/// The child's wake-up is part of the fork. On a busy host its standby may not have fallen asleep yet.
fn a_wait_is_shown(folder: &Folder, root: &str) -> Result<(), Failed> {
    for _ in 0..FORKS {
        if folder.done(&["trace", "-b", root])?.out.contains("woken, not yet running") {
            return Ok(());
        }
    }
    Err(format!("no wait in {FORKS} forks").into())
}

/// With page, kind and cost. A quiet parent's child takes one, or none.
fn a_fault_is_shown(folder: &Folder, root: &str) -> Result<(), Failed> {
    let kinds = ["fault: own page", "fault: guest page", "fault of the guest, by KVM: guest page"];
    for _ in 0..FORKS {
        let text = folder.done(&["trace", "-b", root])?;
        let is_fault = |line: &&str| kinds.iter().any(|kind| line.contains(kind));
        let Some(line) = text.out.lines().find(is_fault) else { continue };
        // Time, who, cost, what, page.
        let fields: Vec<&str> = line.split_whitespace().collect();
        holds(fields[2].parse::<f64>().is_ok_and(|us| us > 0.0), &line)?;
        let page = fields.last().ok_or("an empty line")?;
        let number = page
            .strip_prefix("0x")
            .map_or_else(|| page.parse::<u64>(), |address| u64::from_str_radix(address, 16));
        return holds(number.is_ok(), &line);
    }
    Err(format!("no fault in {FORKS} forks").into())
}

/// A machine that was started without them says so.
pub fn probes_can_be_off() -> Result<(), Failed> {
    let owner = Owner::start(&["--probes", "off"])?;
    let (folder, root) = (&owner.folder, owner.root.to_string());
    let stats = folder.json(&["stats", "--json", &root])?;
    same(&stats["probes"]["off"], &"the machine was started with --probes off", &stats)?;
    let traced = folder.done(&["trace", "-b", &root])?;
    holds(traced.code != 0 && traced.err.contains("started with --probes off"), &traced)
}

pub fn names_must_be_clear() -> Result<(), Failed> {
    let owner = Owner::start(&[])?;
    let folder = &owner.folder;
    // A second owner in the same folder: names are looked up in all of them.
    let (mut other, second) = start(folder, &["--bare"])?;
    let root = owner.root.to_string();
    let outcome = (|| {
        // 17 instances: two begin with the same digit.
        folder.json(&["branch", "-n", "15", "--json", &root])?;
        let uuids: Vec<String> = until("instances", || {
            let done = folder.done(&["ps", "-q"]).ok()?;
            let lines: Vec<_> = done.out.lines().map(ToOwned::to_owned).collect();
            (lines.len() == 17).then_some(lines)
        })?;
        holds(uuids.contains(&second.to_string()), &uuids)?;
        let twice = |digit: &char| uuids.iter().filter(|uuid| uuid.starts_with(*digit)).count() > 1;
        let digit = "0123456789abcdef".chars().find(twice).ok_or("17 first digits differ")?;
        let done = folder.done(&["stats", &digit.to_string()])?;
        same(&done.code, &64, &done)?;
        same(&done.err.lines().count(), &1, &done)?;
        let candidates = uuids.iter().filter(|uuid| done.err.contains(*uuid)).count();
        holds(candidates > 1 && done.err.contains("is the beginning of"), &done)?;
        let nobody = "ffffffff-0000-1111-2222-333333333333";
        let done = folder.done(&["stats", nobody])?;
        same(&done.code, &64, &done)?;
        holds(done.err.starts_with(&format!("error: there is no instance {nobody}; ")), &done)?;
        holds(done.err.contains("; there are: "), &done)
    })();
    other.kill()?;
    other.wait()?;
    outcome
}

pub fn ctrl_c_leaves_nothing() -> Result<(), Failed> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut owner = Owner::start(&[])?;
        owner.folder.json(&["branch", "-n", "2", "--json", &owner.root.to_string()])?;
        holds(owner.processes().len() >= 3, &owner.processes())?;
        owner.signal(signal)?;
        same(&owner.end()?, &(128 + signal), &"the code of the signal")?;
        // At once, not some time later.
        same(&owner.processes(), &Vec::<i32>::new(), &"processes were left")?;
        same(&owner.folder.owners(), &0, &"an owner's folder was left")?;
    }
    Ok(())
}

pub fn a_killed_owner_leaves_no_process() -> Result<(), Failed> {
    let mut owner = Owner::start(&["--standbys", "2"])?;
    owner.folder.json(&["branch", "-n", "2", "--json", &owner.root.to_string()])?;
    owner.child.kill()?;
    owner.end()?;
    owner.wait_for_processes(0)?;
    // Its folder is still there, and the next one who looks removes it.
    same(&owner.folder.owners(), &1, &"the folder of the dead owner")?;
    same(&owner.folder.json(&["ps", "--json"])?, &serde_json::json!([]), &"ps")?;
    same(&owner.folder.owners(), &0, &"a dead owner's folder was left")
}
