//! What needs no machine.

use std::process::Stdio;

use libtest_mimic::Failed;
use serde_json::Value;

use super::tools::{Done, Folder, holds, same};

const VERBS: [&str; 13] = [
    "run",
    "image",
    "ps",
    "branch",
    "wait",
    "stop",
    "kill",
    "pause",
    "resume",
    "stats",
    "trace",
    "doctor",
    "completions",
];

pub fn usage_errors_are_one_line() -> Result<(), Failed> {
    let folder = Folder::new()?;
    for (words, expected) in [
        (&["run"][..], "--bare"),
        (&["run", "--bare", "--memory", "12"], "512M"),
        (&["run", "--bare", "--memory", "1M"], "between 8M"),
        (&["run", "--bare", "--vcpus", "0"], "1..=16"),
        (&["run", "--bare", "--vcpu-cpus", "3-1"], "0,2-3"),
        (&["run", "--bare", "/nowhere/x.elf"], "cannot read /nowhere/x.elf"),
        (&["branch", "-n", "129", "0"], "1..=128"),
        (&["branch", "../x"], "UUID"),
        (&["image"], "SOURCE"),
        (&["image", "/nowhere"], "cannot look at /nowhere"),
        (&["frok"], "frok"),
    ] {
        let done = folder.done(words)?;
        if expected.starts_with("cannot read") && done.code != 64 {
            // Without KVM that is what is told first.
            holds([69, 77].contains(&done.code), &done)?;
            continue;
        }
        same(&done.code, &64, &(words, &done))?;
        same(&done.err.lines().count(), &1, &(words, &done))?;
        holds(done.err.starts_with("error: ") && done.err.contains(expected), &(words, &done))?;
        same(&done.out, &"", &done)?;
    }
    Ok(())
}

pub fn an_image_is_made_and_kept() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let (kernel, source) = (folder.0.join("kernel"), folder.0.join("source"));
    std::fs::create_dir_all(&kernel)?;
    std::fs::create_dir_all(source.join("etc"))?;
    std::fs::write(kernel.join("vmlinuz"), "a kernel")?;
    let built_in = "virtio_mmio virtio-rng virtio_console vmw_vsock_virtio_transport fuse overlay";
    let built_in = built_in.split(' ').map(|name| format!("kernel/{name}.ko\n"));
    std::fs::write(kernel.join("modules.builtin"), built_in.collect::<String>())?;
    let image = |words: &[&str]| {
        let mut command = folder.runtime(&["image"]);
        command.env("UKP_CACHE", folder.0.join("cache")).arg("--kernel-dir").arg(&kernel);
        command.arg(&source).args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
        Done::of(command.spawn()?)
    };
    let first = image(&[])?;
    same(&(first.code, &*first.err), &(0, ""), &first)?;
    let path = first.out.trim_end();
    holds(path.contains("/cache/images/") && std::fs::metadata(path)?.len() > 512, &first)?;

    let told: Value = serde_json::from_str(&image(&["--json"])?.out)?;
    same(&told["path"].as_str(), &Some(path), &told)?;
    same(&told["cached"], &Value::Bool(true), &told)?;
    same(&told["argv"], &Value::Null, &told)?;
    let out = folder.0.join("out.cpio");
    let told = image(&["--json", "-o", &out.to_string_lossy(), "--", "sh", "-c"])?;
    let told: Value = serde_json::from_str(&told.out)?;
    same(&told["argv"], &serde_json::json!(["sh", "-c"]), &told)?;
    same(&told["cwd"], &serde_json::json!("/"), &told)?;
    same(&told["bytes"].as_u64(), &Some(std::fs::metadata(&out)?.len()), &told)?;

    std::fs::create_dir(source.join(".uk"))?;
    let refused = image(&[])?;
    same(&(refused.code, refused.err.lines().count()), &(64, 1), &refused)?;
    holds(refused.err.contains("`/.uk` is kept for the runtime's own files"), &refused)
}

pub fn every_verb_has_help() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let top = folder.done(&["--help"])?;
    same(&top.code, &0, &top)?;
    holds(top.out.contains("Exit codes:") && top.out.contains("77"), &top)?;
    for verb in VERBS {
        holds(top.out.contains(&format!("\n  {verb} ")), &(verb, &top))?;
        let help = folder.done(&[verb, "--help"])?;
        same(&help.code, &0, &help)?;
        let json = help.out.contains("--json");
        holds(json || verb == "completions", &help)?;
    }
    Ok(())
}

pub fn completions_know_the_verbs() -> Result<(), Failed> {
    let folder = Folder::new()?;
    for shell in ["bash", "zsh", "fish"] {
        let done = folder.done(&["completions", shell])?;
        same(&done.code, &0, &done)?;
        for verb in VERBS {
            holds(done.out.contains(verb), &(shell, verb))?;
        }
    }
    Ok(())
}

pub fn doctor_speaks_json() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let done = folder.done(&["doctor", "--json"])?;
    let report: Value = serde_json::from_str(&done.out)?;
    let checks = report["checks"].as_array().ok_or("no checks")?;
    let device = checks.iter().find(|check| check["name"] == "/dev/kvm").ok_or("no device")?;
    if device["status"] == "ok" {
        let kind = report["host_kind"].as_str().unwrap_or_default();
        holds(["direct", "nested", "hardware"].contains(&kind), &report)?;
    }
    let failed = checks.iter().any(|check| check["status"] == "fail");
    same(&report["forks_work"], &!failed, &report)?;
    same(&(done.code == 0), &!failed, &done)?;
    holds([0, 69, 77].contains(&done.code), &done)?;
    for check in checks.iter().filter(|check| check["status"] != "ok") {
        holds(check["advice"].as_str().is_some_and(|advice| !advice.is_empty()), check)?;
    }
    same(&folder.owners(), &0, &"an owner was left")
}

/// Without the device, by a mount namespace of our own; where that is not allowed, the host's own lack of
/// it is what is looked at. And, where it is allowed, without permission.
pub fn without_kvm_the_exit_code_says_so() -> Result<(), Failed> {
    says_so("", 69, "there is no such device; load the kvm module", "load kvm_intel or kvm_amd")?;
    if can_mount() {
        says_so(CLOSED, 77, "no permission; add this user to the group", "to the group kvm")?;
    }
    Ok(())
}

/// Makes a device that nobody may open, and gives up the right to do so all the same.
const CLOSED: &str = "&& touch /dev/kvm && chmod 0 /dev/kvm && \
     set -- setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-all \"$@\"";

/// `run` in one line, `doctor` among others, both with what to do.
fn says_so(then: &str, code: i32, run: &str, doctor: &str) -> Result<(), Failed> {
    let folder = Folder::new()?;
    let done = |words: &[&str]| {
        let mut command = folder.runtime(words);
        if can_mount() {
            hide_device(&mut command, then);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        super::tools::Done::of(command.spawn()?)
    };
    let ran = done(&["run", "--bare"])?;
    same(&(ran.code, ran.err.lines().count()), &(code, 1), &ran)?;
    holds(ran.err.starts_with("error: cannot open /dev/kvm: ") && ran.err.contains(run), &ran)?;
    let asked = done(&["doctor"])?;
    same(&asked.code, &code, &asked)?;
    let line = asked.out.lines().find(|line| line.contains("/dev/kvm")).unwrap_or_default();
    holds(line.starts_with("FAIL") && line.contains(doctor), &asked)
}

/// Whether a file system may be mounted in a namespace of its own.
fn can_mount() -> bool {
    std::process::Command::new("unshare")
        .args(["--mount", "--", "mount", "-t", "tmpfs", "tmpfs", "/dev"])
        .status()
        .is_ok_and(|status| status.success())
}

/// Why a host without KVM cannot be shown here.
pub fn kvm_stays() -> Option<&'static str> {
    let stays = std::path::Path::new("/dev/kvm").exists() && !can_mount();
    stays.then_some("/dev/kvm is there, and it takes the right to mount to hide it")
}

/// Runs the command where `/dev` is an empty file system, after `then`, words of a shell.
fn hide_device(command: &mut std::process::Command, then: &str) {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(ToOwned::to_owned)
        .collect();
    let environment: Vec<_> = command
        .get_envs()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
        .collect();
    let mut wrapped = std::process::Command::new("unshare");
    wrapped
        .args(["--mount", "--", "sh", "-c"])
        .arg(format!("mount -t tmpfs tmpfs /dev {then} && exec \"$@\""))
        .arg("sh")
        .args(words)
        .envs(environment);
    *command = wrapped;
}
