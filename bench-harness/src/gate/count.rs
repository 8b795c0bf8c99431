//! Runs a workload under a tracer, and says what each of its forks did.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::heap;
use super::path::{Counts, Threads};
use super::trace;
use super::workload::{Forked, Variant, Workload};

/// Part of the forks that must agree on a count.
const AGREE: (usize, usize) = (9, 10);

/// What a count is of: `parent` (its vCPU thread), `children` (all vCPU threads of all), `pages`.
pub type Role = &'static str;

/// Values of one count over the forks of a run, in their order.
pub type Values = Vec<u64>;

/// What the forks of one workload did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Forks that count.
    pub forks: usize,
    /// Exact counts by role and name.
    pub exact: BTreeMap<(Role, String), Values>,
    /// Counts that depend on timing.
    pub timing: BTreeMap<(Role, String), Values>,
}

/// The value that at least nine of ten forks have.
#[must_use]
pub fn agreed(values: &[u64]) -> Option<u64> {
    let distinct: BTreeSet<u64> = values.iter().copied().collect();
    let of = |value: u64| values.iter().filter(|other| **other == value).count();
    distinct.into_iter().find(|value| of(*value) * AGREE.1 >= values.len() * AGREE.0)
}

/// The smallest limit that at least nine of ten forks keep.
#[must_use]
pub fn mostly_at_most(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let last = (values.len() * AGREE.0).div_ceil(AGREE.1).max(1) - 1;
    sorted.get(last).copied().unwrap_or(0)
}

/// The folder beside this executable for what is worth keeping until the next time: traces, to look
/// at when a count differs, and executables of bases.
///
/// # Errors
///
/// If it cannot be made.
pub fn kept() -> Result<PathBuf> {
    let own = std::env::current_exe().context("this program is gone")?;
    let folder = own.with_file_name("gate");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("{} cannot be made", folder.display()))?;
    Ok(folder)
}

/// Counts the calls of a workload's forks.
///
/// # Errors
///
/// Without strace, without the right to trace, and if the engine or the trace is not as expected.
pub fn count(workload: &Workload, variant: &Variant) -> Result<Seen> {
    let file = kept()?.join(format!("{}.strace", workload.name));
    let mut forks = run(workload, variant, Some(&file))?;
    let text = std::fs::read(&file).with_context(|| format!("{} is missing", file.display()))?;
    let calls = trace::parse(&String::from_utf8_lossy(&text));
    let threads = Threads::new(&calls);
    // A fork right after its standbys were made may find more pages that they were not prepared for
    // than those that are written for it.
    let strange = workload.dirty * u64::from(workload.children);
    forks.retain(|fork| fork.applied == fork.private + strange);
    let (left, all) = (forks.len(), variant.forks as usize);
    ensure!(left * 4 >= all * 3, "{}: only {left} of {all} forks were as meant", workload.name);
    let mut seen = Seen { forks: left, ..Seen::default() };
    for (index, fork) in forks.iter().enumerate() {
        let path = threads.fork(fork.parent, &fork.children).with_context(|| {
            format!("fork {} of {} in {}", index + 1, workload.name, file.display())
        })?;
        seen.add("parent", index, path.parent);
        seen.add("children", index, path.children);
        seen.add("pages", index, pages(workload, fork));
    }
    seen.pad(forks.len());
    Ok(seen)
}

/// Of several standbys some were made before the last background sync and some after it, so that the
/// number of pages that is left for the fork is no exact one.
fn pages(workload: &Workload, fork: &Forked) -> Counts {
    let named = |list: &[(&str, u64)]| {
        list.iter().map(|(name, pages)| ((*name).to_owned(), *pages)).collect()
    };
    let captured = [("captured", fork.captured)];
    let taken_in = [("applied", fork.applied), ("private", fork.private)];
    if workload.children > 1 {
        Counts { exact: named(&captured), timing: named(&taken_in) }
    } else {
        Counts { exact: named(&[captured.as_slice(), &taken_in].concat()), timing: named(&[]) }
    }
}

impl Seen {
    fn add(&mut self, role: Role, index: usize, counts: Counts) {
        for (map, counts) in [(&mut self.exact, counts.exact), (&mut self.timing, counts.timing)] {
            for (name, count) in counts {
                let values = map.entry((role, name)).or_default();
                values.resize(index, 0);
                values.push(count);
            }
        }
    }

    fn pad(&mut self, forks: usize) {
        self.exact.values_mut().chain(self.timing.values_mut()).for_each(|it| it.resize(forks, 0));
    }
}

/// Runs a workload in a process of its own, under strace if a file for its output is given.
///
/// # Errors
///
/// If it cannot be started or does not end well.
pub fn run(workload: &Workload, variant: &Variant, trace: Option<&Path>) -> Result<Vec<Forked>> {
    let own = std::env::current_exe().context("this program is gone")?;
    let mut command = match trace {
        None => Command::new(own),
        Some(file) => {
            let mut strace = Command::new("strace");
            strace.args(["-f", "-qq", "-s", "0", "-a", "1", "-e", "trace=all", "-o"]);
            strace.arg(file).arg("--").arg(own).env(heap::ASK, "1");
            strace
        }
    };
    command.args(["workload", workload.name]);
    command.args(["--warmup", &variant.warmup.to_string(), "--forks", &variant.forks.to_string()]);
    if variant.bitmap {
        command.arg("--bitmap");
    }
    let output = command.output().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            anyhow::anyhow!("strace is not installed: ./just does that, or apt-get install strace")
        }
        _ => error.into(),
    })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("workload {}: {} ({})", workload.name, text.trim(), output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let forks: Vec<Forked> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .with_context(|| format!("workload {}: not a fork", workload.name))?;
    ensure!(forks.len() == variant.forks as usize, "workload {}: forks are missing", workload.name);
    Ok(forks)
}

/// A folder for what is not kept; removed when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub fn new() -> Result<Self> {
        let name = format!("ukp-gate-{}", uuid::Uuid::new_v4().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is in the folder for temporary files.
        std::fs::remove_dir_all(&self.0).unwrap_or(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_straggler_in_twelve_is_passed_over() {
        let mut values = vec![1; 12];
        assert_eq!((agreed(&values), mostly_at_most(&values)), (Some(1), 1));
        values[3] = 9;
        assert_eq!((agreed(&values), mostly_at_most(&values)), (Some(1), 1));
        values[4] = 2;
        assert_eq!((agreed(&values), mostly_at_most(&values)), (None, 2));
        assert_eq!((agreed(&[]), mostly_at_most(&[])), (None, 0));
    }

    #[test]
    fn what_a_fork_did_not_do_is_a_zero() {
        let mut seen = Seen::default();
        let counts =
            |name: &str| Counts { exact: [(name.to_owned(), 2)].into(), ..Counts::default() };
        seen.add("parent", 0, counts("a"));
        seen.add("parent", 1, counts("b"));
        seen.pad(3);
        assert_eq!(seen.exact[&("parent", "a".to_owned())], [2, 0, 0]);
        assert_eq!(seen.exact[&("parent", "b".to_owned())], [0, 2, 0]);
    }
}
