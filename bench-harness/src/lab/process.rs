//! Processes of instances, as /proc shows them.

use std::fs;

/// A line of `/proc/<pid>/stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) name: String,
    pub(super) state: char,
    pub(super) parent: i32,
    pub(super) group: i32,
}

impl Process {
    fn parse(stat: &str) -> Option<Self> {
        // The name may hold anything, blanks and brackets too: it ends at the last bracket.
        let (pid, rest) = stat.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        Some(Self {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }

    /// Whether only its exit status is left.
    fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// All processes that are not dead.
fn living() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            entry.file_name().to_string_lossy().starts_with(|c: char| c.is_ascii_digit())
        })
        .filter_map(|entry| Process::parse(&fs::read_to_string(entry.path().join("stat")).ok()?))
        .filter(|process| !process.is_dead())
        .collect()
}

/// Living processes of a process group.
pub(super) fn group(group: i32) -> Vec<Process> {
    living().into_iter().filter(|process| process.group == group).collect()
}

/// A process and everything that descends from it.
pub(super) fn tree(root: i32) -> Vec<i32> {
    let all = living();
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&parent) = tree.get(next) {
        tree.extend(all.iter().filter(|process| process.parent == parent).map(|it| it.pid));
        next += 1;
    }
    tree
}

/// CPU time of all threads of a process, in ns; `None` if the kernel does not tell.
pub(super) fn cpu_ns(pid: i32) -> Option<u64> {
    let ns = |text: String| text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok());
    fs::read_dir(format!("/proc/{pid}/task"))
        .ok()?
        .flatten()
        .map(|task| ns(fs::read_to_string(task.path().join("schedstat")).ok()?))
        .sum()
}

/// User memory that belongs to nobody else and would have to be written out, in bytes.
pub(super) fn private_dirty_bytes(pid: i32) -> Option<u64> {
    kib(&format!("/proc/{pid}/smaps_rollup"), "Private_Dirty:").map(|kib| kib << 10)
}

/// Shared memory and files that are mapped by huge pages, in bytes.
pub(super) fn huge_mapped_bytes(pid: i32) -> Option<u64> {
    let rollup = format!("/proc/{pid}/smaps_rollup");
    let [shmem, file] = ["ShmemPmdMapped:", "FilePmdMapped:"].map(|name| kib(&rollup, name));
    Some((shmem? + file?) << 10)
}

/// Memory that can be had without swapping, in bytes.
pub(super) fn available_bytes() -> Option<u64> {
    kib("/proc/meminfo", "MemAvailable:").map(|kib| kib << 10)
}

/// A line `Name:   123 kB`.
fn kib(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let process = Process::parse("17 (a) b (c) S 3 5 5 0 -1").unwrap();
        let expected = Process { pid: 17, name: "a) b (c".into(), state: 'S', parent: 3, group: 5 };
        assert_eq!(process, expected);
        assert_eq!(Process::parse("17 (a"), None);
    }

    #[test]
    fn this_process_is_found() {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let all = living();
        let me = all.iter().find(|process| process.pid == own).unwrap();
        assert!(group(me.group).iter().any(|process| process.pid == own));
        assert_eq!(tree(own)[0], own);
        assert!(cpu_ns(own) > Some(0) && available_bytes() > Some(0));
        assert!(private_dirty_bytes(own) > Some(0) && huge_mapped_bytes(own).is_some());
        assert_eq!(cpu_ns(-1), None);
    }
}
