//! Linux guests: `/uk/libukp` as the specification has it, sentence by sentence, and what the host
//! does with a guest.
//!
//! A boot takes long here, and so does a fork. So there are few guests, each booted by the first test
//! that asks for it: `one` as a user has it, `two` with two vCPUs, a short queue and a short retention, `frozen`
//! across forks, `python` with programs that nobody here wrote. Tests whose
//! sentences are seen in the same fork share that fork: a *story* happens once, and each test looks at
//! its part of what was told.

mod calls;
mod children;
mod cli;
mod clock;
mod console;
mod forks;
mod guest;
mod host;
mod hostile;
mod identity;
mod load;
mod python;
mod queue;
mod refusals;
mod states;
mod values;
mod vsock;

use anyhow::{Result, ensure};
pub use guest::{FILES_IN, brought, file, image};
pub use python::CHILDREN_FROM;

use super::Inside;

/// How the names of tests begin that need a root with Python.
pub const WITH_PYTHON: &str = "python::";

pub fn cases() -> Vec<Inside> {
    let last: Vec<Inside> = vec![("linux::everything_has_an_end", all_gone)];
    let areas = [forks::cases(), values::cases(), children::cases(), identity::cases()];
    let more = [clock::cases(), host::cases(), states::cases(), refusals::cases(), calls::cases()];
    let others = [queue::cases(), load::cases(), vsock::cases(), python::cases(), console::cases()];
    let end = [hostile::cases(), cli::cases(), last];
    let all = areas.into_iter().chain(more).chain(others).chain(end);
    all.flatten().collect()
}

/// The last test: no process is left of the guests, their children, standbys and zygotes.
fn all_gone() -> Result<()> {
    let folders = guest::end_all();
    for folder in folders {
        ensure!(!folder.exists(), "{} is left", folder.display());
    }
    let own = std::process::id();
    let mut left = Vec::new();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let parent = std::fs::read_to_string(process.path().join("status")).unwrap_or_default();
        if parent.lines().any(|line| line == format!("PPid:\t{own}")) {
            left.push(process.file_name());
        }
    }
    ensure!(left.is_empty(), "processes are left: {left:?}");
    Ok(())
}
