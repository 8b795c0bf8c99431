//! Linux instances on whatever host this is: `./just guest` and `./just demo`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use nested_host::Place;
use tests::guest::host;
use tests::guest::lines::Lines;
use tests::guest::tree::{SCRIPT, Tree};
use tests::guest::{Ask, Event, GuestError, short};
use uuid::Uuid;

/// Runs Linux instances on this machine's KVM if it runs Linux, else on one under software emulation.
#[derive(Debug, Parser)]
#[command(
    name = "guest",
    after_help = "\
Exit codes: that of the instance; 64: wrong arguments, 69: something is missing, 70: anything else,
124: the time is over. `demo` ends with 1 if what the guests saw does not fit together."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a command in a fresh instance, and print what it and its descendants print
    Run {
        /// What its shell runs
        #[arg(value_name = "SHELL COMMAND")]
        command: String,
        #[command(flatten)]
        machine: Machine,
    },
    /// Fork an instance from inside, let the children fork, and show the tree
    Demo {
        #[command(flatten)]
        machine: Machine,
    },
}

#[derive(Debug, Args)]
struct Machine {
    /// What it boots: a directory, a tar archive, an OCI layout, or an image that `runtime image`
    /// made [default: busybox]
    #[arg(long, value_name = "SOURCE")]
    image: Option<PathBuf>,
    /// Its kernel [default: the one that `./just` fetches]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = memory)]
    memory: u32,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    vcpus: u32,
    /// End everything after so long
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    limit: u64,
    /// The program `runtime` [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    runtime: Option<PathBuf>,
}

/// MiB from `256M` or `1G`.
fn memory(text: &str) -> Result<u32, String> {
    let (digits, unit) = text.split_at(text.len() - text.len().min(1));
    let mib = match unit {
        "M" | "m" => 1,
        "G" | "g" => 1024,
        _ => 0,
    };
    let number = digits.parse::<u32>().ok().and_then(|number| number.checked_mul(mib));
    number
        .filter(|mib| *mib >= 64)
        .ok_or_else(|| "64M or more is needed, such as 256M or 1G".into())
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        // Nobody is left to be told, otherwise.
        error.print().unwrap_or(());
        std::process::exit(if error.use_stderr() { 64 } else { 0 })
    });
    let result = match arguments.verb {
        Verb::Run { command, machine } => run(command, machine),
        Verb::Demo { machine } => demo(machine),
    };
    result.unwrap_or_else(|error| {
        eprintln!("guest: {error}");
        ExitCode::from(error.code())
    })
}

fn ask(command: String, machine: Machine) -> Result<Ask, GuestError> {
    let beside = || -> anyhow::Result<PathBuf> {
        Ok(std::env::current_exe().context("looking for this program")?.with_file_name("runtime"))
    };
    let runtime = machine.runtime.map_or_else(beside, Ok)?;
    if !runtime.is_file() {
        return Err(GuestError::Missing(format!(
            "{} is not there; ./just build",
            runtime.display()
        )));
    }
    Ok(Ask {
        runtime,
        image: machine.image,
        kernel: machine.kernel,
        memory_mib: machine.memory,
        vcpus: machine.vcpus,
        command,
        limit: Duration::from_secs(machine.limit),
    })
}

fn run(command: String, machine: Machine) -> Result<ExitCode, GuestError> {
    let ask = ask(command, machine)?;
    let place = Place::choose();
    eprintln!("guest: {place}");
    let mut lines = Lines::default();
    let code = host::run(&ask, &place, |event| happened(&event, &mut lines, &mut show))?;
    for (instance, line) in lines.rest() {
        show(instance, &line);
    }
    Ok(ExitCode::from(byte(code)))
}

fn demo(machine: Machine) -> Result<ExitCode, GuestError> {
    let ask = ask(SCRIPT.to_owned(), machine)?;
    let place = Place::choose();
    eprintln!("guest: {place}");
    let (mut tree, mut lines) = (Tree::default(), Lines::default());
    let code = host::run(&ask, &place, |event| {
        let now = Instant::now();
        tree.event(&event, now);
        happened(&event, &mut lines, &mut |instance, line| {
            tree.line(instance, line, now);
            eprintln!("{} | {line}", short(instance));
        });
    })?;
    let emulated = matches!(place, Place::Emulated { .. });
    let how = if emulated { " (emulated: it says nothing about hardware)" } else { "" };
    print(&format!("\n{}\n{}{how}\n", tree.drawn(), tree.times()));
    let complaints = tree.complaints();
    let Some((first, more)) = complaints.split_first() else {
        print("what the guests saw is what the host saw\n");
        return Ok(ExitCode::from(byte(code)));
    };
    let more = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
    eprintln!("guest: what the guests saw does not fit together: {first}{more}");
    Ok(ExitCode::FAILURE)
}

/// Lines go to `show`, the rest to stderr.
fn happened(event: &Event, lines: &mut Lines, show: &mut impl FnMut(Uuid, &str)) {
    match event {
        Event::Started { .. } => {}
        Event::Console { instance, text } => {
            for line in lines.add(*instance, text) {
                show(*instance, &line);
            }
        }
        Event::Note { instance, text } => eprintln!("note: {}: {text}", short(*instance)),
        Event::Forked { instance, failed, .. } => {
            if let Some(failed) = failed {
                let why = std::io::Error::from_raw_os_error(failed.errno);
                eprintln!("note: {}: fork failed at {}: {why}", short(*instance), failed.step);
            }
        }
        Event::Exited { instance, code, reason } => {
            if let Some(line) = lines.end(*instance) {
                show(*instance, &line);
            }
            let who = short(*instance);
            match reason {
                Some(reason) => eprintln!("note: {who}: exited with {code}: {reason}"),
                None if *code != 0 => eprintln!("note: {who}: exited with {code}"),
                None => {}
            }
        }
    }
}

fn show(instance: Uuid, line: &str) {
    print(&format!("{} | {line}\n", short(instance)));
}

fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that has seen enough (`| head`) does not end the machines.
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).unwrap_or(());
}

fn byte(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}
