//! The command line of `bench-harness`.
//!
//! ```text
//! bench-harness run                      the three-minute set, report under results/
//! bench-harness run --set all            everything
//! bench-harness run --set linux          Linux guests, beside QEMU's
//! bench-harness run quiet dirty-100      these two
//! bench-harness list                     what there is
//! bench-harness json quiet               one scenario, one JSON object as last line
//! bench-harness samples quiet            one batch for `ab`, one JSON object
//! bench-harness ab main HEAD             two revisions, interleaved; exit code 1 is an alarm
//! bench-harness ab --base A --change B   the same with two executables
//! bench-harness gate                     counts per fork, and results/BASE against this executable
//! bench-harness compare results/X results/Y
//! bench-harness completions bash
//! ```
//!
//! Exit codes: 0 done, 1 an alarm, a void run or an error, 2 a wrong command line.

mod ab;
mod compare;
mod gate;
mod run;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::scenario::{Catalogue, Set};
use crate::session::Lab;

/// What a laboratory is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A report, with everything that forks are compared with.
    Report,
    /// One batch of `ab`: nothing but the forks.
    Batch,
}

/// Opens the laboratory: called only by commands that need one.
pub type OpenLab<'a> = &'a dyn Fn(Purpose) -> Result<Box<dyn Lab>>;

/// Scenarios, samples and reports for forks of whole virtual machines.
#[derive(Debug, Parser)]
#[command(name = "bench-harness", version)]
struct Cli {
    /// Read scenario definitions from this file instead of the built-in ones.
    #[arg(long, global = true, value_name = "FILE")]
    scenarios: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run scenarios and write a report.
    Run(run::RunArgs),
    /// List the scenarios.
    List,
    /// Run one scenario and print it as one JSON object on the last line.
    Json(run::JsonArgs),
    /// Measure one batch for `ab` and print it as one JSON object.
    Samples(run::SamplesArgs),
    /// Compare two revisions, or executables, interleaved, and fail if the change is slower.
    Ab(ab::AbArgs),
    /// Fail if a fork does more than recorded, or takes longer than with the base.
    Gate(gate::GateArgs),
    /// Run forks for `gate`, which traces this.
    #[command(hide = true)]
    Workload(gate::WorkloadArgs),
    /// Carry out a scenario of a Linux guest here, for a bench that runs outside.
    #[command(hide = true)]
    Inside(run::InsideArgs),
    /// Compare two recorded runs. This is history, not a verdict.
    Compare(compare::CompareArgs),
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum SetArg {
    /// The set that fits into three minutes.
    #[default]
    Default,
    /// All scenarios with the bench's own guest.
    All,
    /// Those with Linux guests.
    Linux,
}

impl From<SetArg> for Set {
    fn from(set: SetArg) -> Self {
        match set {
            SetArg::Default => Set::Default,
            SetArg::All => Set::All,
            SetArg::Linux => Set::Linux,
        }
    }
}

/// Runs the command line of this process and returns its exit code.
#[must_use]
pub fn main(open_lab: OpenLab<'_>) -> ExitCode {
    let cli = Cli::parse();
    let mut out = io::stdout().lock();
    match dispatch(&cli, open_lab, &mut out) {
        Ok(code) => code,
        Err(error) => {
            report_error(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the edge of the program")]
fn report_error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

fn dispatch(cli: &Cli, open_lab: OpenLab<'_>, out: &mut dyn Write) -> Result<ExitCode> {
    let catalogue = match &cli.scenarios {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            Catalogue::parse(&path.display().to_string(), &text)?
        }
        None => Catalogue::standard()?,
    };
    match &cli.command {
        Command::Run(args) => run::run(args, &catalogue, open_lab, out),
        Command::Json(args) => run::json(args, &catalogue, open_lab, out),
        Command::Samples(args) => run::samples(args, &catalogue, open_lab, out),
        Command::List => list(&catalogue, out),
        Command::Ab(args) => ab::ab(args, cli.scenarios.as_deref(), out),
        Command::Gate(args) => gate::gate(args, open_lab, out),
        Command::Workload(args) => gate::workload(args, out),
        Command::Inside(args) => run::inside(args, out),
        Command::Compare(args) => compare::compare(args, out),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "bench-harness", &mut { out });
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn list(catalogue: &Catalogue, out: &mut dyn Write) -> Result<ExitCode> {
    for scenario in catalogue.all() {
        let set = if scenario.in_default_set { "*" } else { " " };
        writeln!(
            out,
            "{set} {:<18} {:>5} forks  {}",
            scenario.name, scenario.forks, scenario.about
        )?;
    }
    writeln!(out, "* in the default set")?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn list_needs_no_laboratory() {
        let cli = Cli::parse_from(["bench-harness", "list"]);
        let mut out = Vec::new();
        let none = |_| anyhow::bail!("no laboratory here");
        dispatch(&cli, &none, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("* quiet ") && text.contains("  memory-8g "), "{text}");
    }
}
