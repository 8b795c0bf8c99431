//! The machine and the source that a run belongs to.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// Facts of the host. What cannot be found out is `unknown` or 0; a bench does not fail for that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Kind of host, from the laboratory: `direct`, `nested`, `hardware`.
    pub kind: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Model name of the CPU.
    pub cpu_model: String,
    /// Cores that this process may run on.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Name of the KVM modules that are loaded, separated by blanks.
    pub kvm_modules: String,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`, the chosen word.
    pub thp_enabled: String,
    /// `…/shmem_enabled`, the chosen word.
    pub thp_shmem_enabled: String,
    /// Pages of 2 MiB in the hugetlb pool.
    pub hugetlb_pages: u64,
}

impl HostFacts {
    /// Reads them.
    #[must_use]
    pub fn read(kind: &str) -> Self {
        const THP: &str = "/sys/kernel/mm/transparent_hugepage";
        let meminfo = read("/proc/meminfo");
        let number = |key| field(&meminfo, key).and_then(|value| first_number(&value)).unwrap_or(0);
        let unknown = || "unknown".to_owned();
        Self {
            kind: kind.to_owned(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpu_model: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: number("MemTotal") / 1024,
            kvm_modules: kvm_modules(),
            thp_enabled: chosen(&read(&format!("{THP}/enabled"))).unwrap_or_else(unknown),
            thp_shmem_enabled: chosen(&read(&format!("{THP}/shmem_enabled")))
                .unwrap_or_else(unknown),
            hugetlb_pages: number("HugePages_Total"),
        }
    }
}

/// Load averages over 1, 5 and 15 minutes; zeros if the kernel does not tell.
#[must_use]
pub fn load_average() -> [f64; 3] {
    let text = read("/proc/loadavg");
    let mut words = text.split_whitespace().map(|word| word.parse().unwrap_or(0.0));
    [(); 3].map(|()| words.next().unwrap_or(0.0))
}

/// The source that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Full hash, or `unknown`.
    pub hash: String,
    /// Whether tracked files differed from it.
    pub dirty: bool,
}

impl Revision {
    /// Asks git about the current folder.
    #[must_use]
    pub fn read() -> Self {
        let hash = git(&["rev-parse", "HEAD"]).filter(|hash| !hash.is_empty());
        let changes = git(&["status", "--porcelain", "--untracked-files=no"]);
        Self {
            hash: hash.unwrap_or_else(|| "unknown".to_owned()),
            dirty: changes.is_none_or(|changes| !changes.is_empty()),
        }
    }

    /// The first seven digits.
    #[must_use]
    pub fn short(&self) -> &str {
        self.hash.get(..7).unwrap_or(&self.hash)
    }
}

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.hash, if self.dirty { " (dirty)" } else { "" })
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Value of the first line `key : value` or `key: value`.
fn field(text: &str, key: &str) -> Option<String> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.filter(|(k, _)| k.trim() == key).map(|(_, v)| v.trim().to_owned()).next()
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// `madvise` of `always [madvise] never`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn kvm_modules() -> String {
    let modules = read("/proc/modules");
    let names = modules.lines().filter_map(|line| line.split(' ').next());
    let mut names: Vec<&str> = names.filter(|name| name.starts_with("kvm")).collect();
    names.sort_unstable();
    if names.is_empty() { "built in or unknown".to_owned() } else { names.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_understood() {
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("").as_deref(), None);
        let meminfo = "MemTotal:       24689240 kB\nHugePages_Total:      12\n";
        assert_eq!(field(meminfo, "MemTotal").and_then(|v| first_number(&v)), Some(24_689_240));
        assert_eq!(field(meminfo, "Missing"), None);
    }

    #[test]
    fn this_host_has_facts() {
        let facts = HostFacts::read("direct");
        assert!(facts.cores > 0 && facts.memory_mib > 0 && !facts.kernel.is_empty());
    }
}
