//! Runs one program in the nested test host and ends with its exit code: what a machine without
//! VMX or SVM offers to somebody who wants to see a Linux guest.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use nested_host::Program;

/// Runs a program in a virtual machine whose Linux offers a standard /dev/kvm, under software
/// emulation. Files are found in /files there.
#[derive(Debug, Parser)]
#[command(name = "nested-host")]
struct Arguments {
    /// Ends everything after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    limit: u64,
    /// A file to take along.
    #[arg(long = "file", value_name = "NAME=PATH")]
    files: Vec<String>,
    /// Another program to take along, to /bin.
    #[arg(long = "other", value_name = "PATH")]
    others: Vec<PathBuf>,
    /// A kernel module to load.
    #[arg(long = "module", value_name = "PATH")]
    modules: Vec<PathBuf>,
    /// A variable of the program's environment.
    #[arg(long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// The program; the libraries that it needs come along.
    program: PathBuf,
    /// Its arguments.
    #[arg(value_name = "ARGUMENTS", trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nested-host: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    if let Some(missing) = nested_host::missing() {
        bail!("{missing}");
    }
    let pair = |text: String| -> Result<(String, String)> {
        let (name, value) = text.split_once('=').with_context(|| format!("no '=' in {text:?}"))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    let files: Result<Vec<_>> = arguments.files.into_iter().map(pair).collect();
    let environment: Result<Vec<_>> = arguments.environment.into_iter().map(pair).collect();
    let program = Program {
        name: "program".to_owned(),
        path: arguments.program,
        arguments: arguments.rest,
        environment: environment?,
        files: files?.into_iter().map(|(name, path)| (name, path.into())).collect(),
        others: arguments.others,
        modules: arguments.modules,
    };
    let ended = nested_host::run(&[program], Duration::from_secs(arguments.limit), |line| {
        // A reader that has seen enough is no reason to stop.
        writeln!(std::io::stdout(), "{line}").unwrap_or(());
    })?;
    let code = ended.first().context("no program ran")?.code;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
