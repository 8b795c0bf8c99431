//! What processes hold, as /proc tells it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A process of a tree of instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// That of its parent.
    pub parent: i32,
    /// Its name.
    pub name: String,
    /// Ended and not reaped.
    pub zombie: bool,
}

/// Processes of a process group: all that a root instance ever led to.
#[must_use]
pub fn group(leader: i32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| process(pid, leader))
        .collect()
}

fn process(pid: i32, leader: i32) -> Option<Process> {
    // pid (name) state parent group …; the name may contain anything.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let mut fields = tail.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let group: i32 = fields.next()?.parse().ok()?;
    (group == leader).then_some(Process { pid, parent, name, zombie: matches!(state, "Z" | "X") })
}

/// What a set of processes holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Processes that run.
    pub processes: usize,
    /// Ended processes whose parent, one of these, has not reaped them.
    pub zombies: usize,
    /// Open descriptors.
    pub fds: usize,
    /// Mappings.
    pub maps: usize,
    /// Different memfds, open or mapped.
    pub memfds: usize,
}

/// Counts what the processes of a group hold.
#[must_use]
pub fn count(leader: i32) -> Census {
    let mut census = Census::default();
    let mut memfds = BTreeSet::new();
    let all = group(leader);
    for Process { pid, parent, zombie, .. } in &all {
        if *zombie {
            // Orphans are the init process's to reap, in its own time.
            census.zombies += usize::from(all.iter().any(|other| other.pid == *parent));
            continue;
        }
        census.processes += 1;
        census.fds += fds(*pid);
        // address permissions offset device inode path
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        census.maps += maps.lines().count();
        for line in maps.lines().filter(|line| line.contains("/memfd:")) {
            memfds.extend(line.split_ascii_whitespace().nth(4).map(str::to_owned));
        }
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            memfds.extend(memfd(&entry.path()));
        }
    }
    census.memfds = memfds.len();
    census
}

/// Inodes of the memfds called `name` that a process has mapped.
#[must_use]
pub fn mapped_memfds(pid: i32, name: &str) -> BTreeSet<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let lines = maps.lines().filter(|line| line.contains(&format!("/memfd:{name}")));
    lines.filter_map(|line| line.split_ascii_whitespace().nth(4).map(str::to_owned)).collect()
}

/// The inode of a memfd behind a link in /proc/PID/fd.
fn memfd(link: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let name = fs::read_link(link).ok()?;
    if !name.to_str()?.starts_with("/memfd:") {
        return None;
    }
    Some(fs::metadata(link).ok()?.ino().to_string())
}

/// Open descriptors of a process.
#[must_use]
pub fn fds(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// CPU time of a process and its threads in clock ticks, as `/proc/PID/stat` counts them.
#[must_use]
pub fn cpu_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, tail)) = stat.rsplit_once(')') else { return 0 };
    // utime and stime are fields 14 and 15 of the whole line; the tail starts at field 3.
    tail.split_ascii_whitespace().skip(11).take(2).filter_map(|it| it.parse::<u64>().ok()).sum()
}

/// Threads of a process that the scheduler puts before all ordinary ones.
#[must_use]
pub fn realtime_threads(pid: i32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let policies = tasks.filter_map(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        // Field 41 of the whole line; the tail starts at field 3.
        let (_, tail) = stat.rsplit_once(')')?;
        tail.split_ascii_whitespace().nth(38)?.parse::<u32>().ok()
    });
    policies.filter(|policy| *policy != 0).count()
}

/// Looks again and again until `holds`; `false` if it did not within `time`.
pub fn eventually(time: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + time;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_counted() {
        let pid = std::process::id().cast_signed();
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let leader = stat
            .rsplit_once(')')
            .and_then(|(_, tail)| tail.split_ascii_whitespace().nth(2)?.parse().ok())
            .unwrap_or(0);
        assert!(group(leader).iter().any(|process| process.pid == pid && !process.zombie));
        let census = count(leader);
        assert!(census.processes >= 1 && census.fds >= 3 && census.maps >= 5, "{census:?}");
        assert_eq!(count(-1), Census::default());
    }
}
