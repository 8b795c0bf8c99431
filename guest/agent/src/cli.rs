//! `ukp`, for scripts in the guest.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use guest_wire::{FrameError, WorkloadState};
use uuid::Uuid;

use crate::console::chain;
use crate::control::{self, MachineStatus};

/// Forks this machine, waits for its children, ends it.
#[derive(Debug, Parser)]
#[command(name = "ukp", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Fork this machine. Prints the child's UUID in the parent, and the zero UUID in the child.
    Fork {
        /// As JSON, with the time that the write to `fork` took, by this machine's clock.
        #[arg(long)]
        json: bool,
    },
    /// Wait until a child has stopped. Prints its exit code and exits with it.
    Wait {
        /// The child.
        uuid: Uuid,
    },
    /// End this machine.
    Exit {
        /// Its exit code, 0 to 255.
        #[arg(default_value_t = 0)]
        code: u8,
    },
    /// Tell who this machine is, and about its forks.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A file could not be used.
    #[error("cannot {what}")]
    Io {
        /// What it was used for.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The control socket could not be used.
    #[error("cannot ask this machine's init, which only root may")]
    Init(#[from] FrameError),
    /// A file holds something else than it should.
    #[error("{0}")]
    Answer(String),
}

/// Runs `ukp` with these arguments, its name first.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>, mounted: &Path) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            drop(error.print());
            return code.into();
        }
    };
    match act(&arguments.verb, mounted, &mut io::stdout()) {
        Ok(code) => code.into(),
        Err(error) => {
            drop(writeln!(io::stderr(), "ukp: {}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn act(verb: &Verb, mounted: &Path, out: &mut impl Write) -> Result<u8, CliError> {
    match verb {
        Verb::Fork { json } => {
            let (child, time) = fork(mounted)?;
            let told = if *json {
                let us = time.as_secs_f64() * 1e6;
                serde_json::json!({ "child": child, "guest_fork_us": us }).to_string()
            } else {
                child
            };
            print(out, &told)?;
            Ok(0)
        }
        Verb::Wait { uuid } => {
            let code = wait(mounted, *uuid)?;
            print(out, &code.to_string())?;
            Ok(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
        }
        Verb::Exit { code } => {
            control::exit(Path::new(control::SOCKET), *code)?;
            Ok(0)
        }
        Verb::Status { json } => {
            let status = control::status(Path::new(control::SOCKET))?;
            print(out, &if *json { as_json(&status) } else { as_text(&status) })?;
            Ok(0)
        }
    }
}

/// Forks, by the file system at `mounted`. Returns what its `fork` shows then, and how long the write
/// took: in the child too, where the clock runs on.
///
/// # Errors
///
/// There is no such file, or the fork failed.
pub fn fork(mounted: &Path) -> Result<(String, Duration), CliError> {
    let path = mounted.join("fork");
    let failed = |source| CliError::Io { what: format!("fork, by {}", path.display()), source };
    let mut file = OpenOptions::new().write(true).open(&path).map_err(failed)?;
    let begin = Instant::now();
    file.write_all(b"1").map_err(failed)?;
    let time = begin.elapsed();
    let uuid = fs::read_to_string(&path).map_err(failed)?;
    Ok((uuid.trim_end().to_owned(), time))
}

/// Waits for a child and returns its exit code. With one open file: the code is kept for who has it.
///
/// # Errors
///
/// There is no such child (any more), or somebody wants this process to end.
pub fn wait(mounted: &Path, uuid: Uuid) -> Result<i32, CliError> {
    let path = mounted.join("vm").join(uuid.to_string()).join("wait");
    let failed = |source| CliError::Io { what: format!("wait for {uuid}"), source };
    let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    file.write_all(b"1").map_err(failed)?;
    let mut code = String::new();
    file.read_to_string(&mut code).map_err(failed)?;
    let parsed = code.trim_end().parse();
    parsed.map_err(|_| CliError::Answer(format!("{uuid} ended with no exit code but {code:?}")))
}

fn print(out: &mut impl Write, line: &str) -> Result<(), CliError> {
    let failed = |source| CliError::Io { what: "write to standard output".into(), source };
    writeln!(out, "{line}").map_err(failed)
}

fn as_json(status: &MachineStatus) -> String {
    serde_json::to_string(status).unwrap_or_default()
}

fn as_text(status: &MachineStatus) -> String {
    let MachineStatus { stats, workload, uptime_ms } = status;
    let microseconds =
        |time: Option<u64>| time.map_or_else(|| "-".to_owned(), |time| format!("{time} us"));
    let workload = match workload {
        WorkloadState::Starting => "starting".to_owned(),
        WorkloadState::Running { pid } => format!("running, process {pid}"),
        WorkloadState::Exited { code } => format!("ended with {code}"),
    };
    let rows = [
        ("instance", stats.uuid.to_string()),
        ("generation", stats.generation.to_string()),
        ("uptime", format!("{}.{:03} s", uptime_ms / 1000, uptime_ms % 1000)),
        ("workload", workload),
        ("children", stats.children.to_string()),
        ("forks", format!("{}, {} failed, {} waiting", stats.forks, stats.failed, stats.queued)),
        ("last fork", microseconds(stats.last_fork_us)),
        ("birth", microseconds(stats.birth_us)),
        ("of that, renewing", microseconds(stats.renew_us)),
    ];
    rows.map(|(name, value)| format!("{name:<18} {value}")).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, needle) in [
            ("ukp", "Usage"),
            ("ukp wait nonsense", "nonsense"),
            ("ukp exit 256", "256"),
            ("ukp frok", "frok"),
        ] {
            let error = Arguments::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(error.contains(needle), "{line}: {error}");
        }
    }

    #[test]
    fn without_the_file_system_it_says_what_it_tried() {
        let error = act(&Verb::Fork { json: false }, Path::new("/no/such/folder"), &mut Vec::new())
            .unwrap_err();
        let line = chain(&error);
        assert!(line.contains("/no/such/folder/fork") && line.contains("No such file"), "{line}");
    }
}
