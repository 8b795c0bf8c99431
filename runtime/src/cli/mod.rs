//! The command line.
//!
//! ```text
//!   runtime run ──── owns a tree of instances, serves ──┐
//!                                                       │ control socket ([`wire`])
//!   runtime ps, branch, wait, stop, kill, … ── asks ────┘
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `args`, `parse` | what can be typed |
//! | `run`, `console`, `keyboard`, `log`, `signals` | the foreground owner |
//! | `wire`, `serve`, `client` | what is said between processes |
//! | `attach` | consoles from elsewhere |
//! | `guest` | what the agent in a Linux guest is asked for |
//! | `image` | images of Linux guests |
//! | `verbs`, `ps`, `doctor` | everything else that can be asked for |
//!
//! Exit codes are those of [`error`]; the guest's own code otherwise.

mod args;
mod attach;
mod client;
mod console;
mod doctor;
mod error;
mod guest;
mod image;
mod keyboard;
mod live;
mod log;
mod parse;
mod prometheus;
mod ps;
mod run;
mod screen;
mod serve;
mod signals;
mod stats;
mod trace;
mod tracing;
mod verbs;
mod wire;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Arguments, Verb};
use error::CliError;

/// Does what the arguments say.
pub fn main() -> ExitCode {
    let code = match Arguments::try_parse() {
        Ok(arguments) => arguments.verb.run(),
        Err(error) => refuse(&error),
    };
    code.map_or_else(
        |error| {
            tell(&format!("error: {error}"));
            ExitCode::from(error.code)
        },
        ExitCode::from,
    )
}

impl Verb {
    fn run(self) -> Result<u8, CliError> {
        match self {
            Self::Run(args) => run::run(&args),
            Self::Image(args) => image::run(&args),
            Self::Ps(args) => ps::run(&args),
            Self::Branch(args) => verbs::branch(&args),
            Self::Exec(args) => guest::exec(&args),
            Self::Logs(args) => attach::logs(&args),
            Self::Console(args) => attach::console(&args),
            Self::Cp(args) => guest::cp(&args),
            Self::Wait(args) => verbs::wait(&args),
            Self::Stop(args) => verbs::stop(&args),
            Self::Kill(args) => verbs::kill(&args),
            Self::Pause(args) => verbs::pause(&args),
            Self::Resume(args) => verbs::resume(&args),
            Self::Stats(args) => stats::stats(&args),
            Self::Trace(args) => trace::trace(&args),
            Self::Doctor(args) => doctor::run(&args),
            Self::Completions { shell } => {
                let mut script = Vec::new();
                let mut command = Arguments::command();
                clap_complete::generate(shell, &mut command, "runtime", &mut script);
                print(&script)?;
                Ok(0)
            }
        }
    }
}

/// Help goes to stdout; everything else becomes one line.
fn refuse(error: &clap::Error) -> Result<u8, CliError> {
    use clap::error::ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion,
    };
    let text = error.render();
    match error.kind() {
        DisplayHelp | DisplayVersion => {
            print(text.to_string().as_bytes())?;
            Ok(0)
        }
        DisplayHelpOnMissingArgumentOrSubcommand => {
            tell(text.to_string().trim_end());
            Ok(error::USAGE)
        }
        _ => {
            let text = text.to_string();
            let said = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
            let line = said.collect::<Vec<_>>().join(" ");
            let line = line.strip_prefix("error: ").unwrap_or(&line);
            Err(CliError::usage(format!("{line}; see `runtime help`")))
        }
    }
}

/// One line for people, on stderr. Where it cannot be written there is nobody to be told.
fn tell(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or(());
}

/// Writes to stdout; a reader that has gone away (`| head`) is no error.
fn print(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(CliError::internal(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Prints one line for each.
fn print_lines<T: std::fmt::Display>(lines: impl IntoIterator<Item = T>) -> Result<(), CliError> {
    let mut text = String::new();
    for line in lines {
        text.push_str(&line.to_string());
        text.push('\n');
    }
    print(text.as_bytes())
}

/// Prints one line.
fn print_line(line: &str) -> Result<(), CliError> {
    print(format!("{line}\n").as_bytes())
}

/// Prints `value` as one line of JSON.
fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value)
        .map_err(|error| CliError::internal(format!("cannot write JSON: {error}")))?;
    print_line(&text)
}
