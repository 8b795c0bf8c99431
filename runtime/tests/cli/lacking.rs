//! Hosts, and users, that lack something for the probes: machines run and fork all the same.

use std::process::{Command, Stdio};

use libtest_mimic::Failed;

use super::tools::{Owner, holds, same};

/// Hides the kernel's description of its types from the program that is started.
const WITHOUT_BTF: [&str; 6] =
    ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"", "sh"];
const WITHOUT_CAPABILITIES: [&str; 3] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
/// Those that the line about missing ones advises, but for the one that older kernels want.
const WITH_ADVISED: [&str; 3] = ["setpriv", "--bounding-set=-all,+bpf,+perfmon", "--inh-caps=-all"];

/// Why such hosts cannot be had here, if they cannot.
pub fn cannot() -> Option<&'static str> {
    let can = |by: &[&str]| {
        let mut command = Command::new(by[0]);
        command.args(&by[1..]).arg("true").stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    (!can(&WITHOUT_BTF) || !can(&WITHOUT_CAPABILITIES))
        .then_some("unshare and setpriv cannot be used: they want root")
}

pub fn without_btf_machines_fork() -> Result<(), Failed> {
    forks_without_probes(&WITHOUT_BTF, "the kernel has no BTF")
}

pub fn without_capabilities_machines_fork() -> Result<(), Failed> {
    forks_without_probes(&WITHOUT_CAPABILITIES, "CAP_BPF and CAP_PERFMON are missing")
}

pub fn in_a_user_namespace_machines_fork() -> Result<(), Failed> {
    let by = ["unshare", "--user", "--map-root-user"];
    forks_without_probes(&by, "this is a user namespace")
}

pub fn in_a_pid_namespace_machines_fork() -> Result<(), Failed> {
    let by = ["unshare", "--pid", "--fork", "--kill-child"];
    forks_without_probes(&by, "a PID namespace of its own")
}

/// One line says what is missing; `stats` repeats it.
fn forks_without_probes(by: &[&str], missing: &str) -> Result<(), Failed> {
    let (owner, notes) = Owner::start_by(by)?;
    let off: Vec<_> = notes.iter().filter(|note| note.contains("probes are off")).collect();
    same(&off.len(), &1, &notes)?;
    holds(off[0].contains(missing), &notes)?;
    let root = owner.root.to_string();
    let made = owner.folder.json(&["branch", "-n", "2", "--json", &root])?;
    let stats = owner.folder.json(&["stats", "--json", &root])?;
    same(&stats["stats"]["forks"], &1, &(made, &stats))?;
    holds(stats["probes"]["off"].as_str().is_some_and(|off| off.contains(missing)), &stats)
}

/// What is measured by default is, if this program has probes and the kernel lets anybody use them.
pub fn the_advised_capabilities_are_enough() -> Result<(), Failed> {
    let (plain, without) = Owner::start_by(&[])?;
    drop(plain);
    let (owner, notes) = Owner::start_by(&WITH_ADVISED)?;
    let off = |notes: &[String]| notes.iter().any(|note| note.contains("probes are off"));
    if off(&without) {
        return holds(off(&notes), &(without, notes));
    }
    holds(!off(&notes), &notes)?;
    let root = owner.root.to_string();
    owner.folder.json(&["branch", "--json", &root])?;
    let stats = owner.folder.json(&["stats", "--json", &root])?;
    let rows = stats["probes"]["rows"].as_array().ok_or("no rows")?;
    let has = |metric: &str| rows.iter().any(|row| row["metric"] == metric);
    holds(has("own_minor") && has("off_cpu"), &stats)
}
