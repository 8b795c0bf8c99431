//! The command `ab` with executables that only print batches.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

/// One test at a time: a process that one test starts would hold another's script open for writing
/// until its exec, and a script that is open for writing cannot be run (ETXTBSY).
static ALONE: Mutex<()> = Mutex::new(());

/// A program whose batches have this median in µs, give or take a little, and this many failed forks.
fn pretender(name: &str, median_us: u32, failed: u32) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    // The process id is as good as noise: a few µs that differ from batch to batch.
    let script = format!(
        "#!/bin/sh\nm=$(({median_us} + $$ % 5))\n\
         echo something for people\n\
         echo '{{\"metrics\":{{\"branch_us\":['$m','$m',9000]}},\
         \"failed\":{failed}}}'\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn ab(base: &Path, change: &Path, out: &str) -> (Output, String, PathBuf) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(out);
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench-harness"));
    command.args(["ab", "--scenario", "quiet"]).arg("--base").arg(base).arg("--change").arg(change);
    let output = command.arg("--out").arg(&folder).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text, folder)
}

#[test]
fn the_same_passes() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let base = pretender("same", 100, 0);
    let (output, text, folder) = ab(&base, &base, "ab-same");
    assert!(output.status.success() && text.ends_with("no alarm\n"), "{text}");
    assert!(folder.join("ab-quiet-1.json").is_file());
    assert!(folder.join("ab-quiet-branch_us-1.svg").is_file());
}

#[test]
fn a_slow_down_alarms_after_a_second_look() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (base, change) = (pretender("slow-a", 100, 0), pretender("slow-b", 115, 0));
    let (output, text, _) = ab(&base, &change, "ab-slow");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("branch_us: slower") && text.contains("measuring the alarm again"),
        "{text}"
    );
    assert!(text.ends_with("ALARM: quiet\n"), "{text}");
}

#[test]
fn one_failed_fork_alarms_at_once() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (base, change) = (pretender("failed-a", 100, 0), pretender("failed-b", 100, 1));
    let (output, text, _) = ab(&base, &change, "ab-failed");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("quiet failed forks: 0 in A, "), "{text}");
    assert!(!text.contains("again"), "{text}");
}

#[test]
fn an_executable_that_fails_is_named() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let base = pretender("fails-a", 100, 0);
    let (output, _, _) = ab(&base, Path::new("/bin/false"), "ab-fails");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("/bin/false samples quiet"), "{text}");
}
