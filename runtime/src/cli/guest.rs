//! `exec` and `cp`: what the agent in a Linux guest is asked for.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write, stderr, stdin, stdout};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_wire::{Input, Terminal};
use ratatui::crossterm::terminal;
use runtime::agent::{Agent, AgentError, Command, ProgramInput, ProgramSignals, Running, Said};
use runtime::sys;

use super::args::{CpArgs, ExecArgs};
use super::error::{CliError, exit_code};
use super::parse::Prefix;
use super::signals::Signals;
use super::verbs;
use super::wire::State;

/// How often the size of the terminal is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Bytes of input that are sent at once.
const PIECE: usize = 16 * 1024;

pub fn exec(args: &ExecArgs) -> Result<u8, CliError> {
    if args.tty && !stdin().is_terminal() {
        return Err(CliError::usage("--tty needs a terminal as stdin"));
    }
    let command = Command {
        argv: args.command.clone(),
        env: args.env.iter().cloned().collect(),
        cwd: args.workdir.clone(),
        tty: args.tty.then(size_of_terminal),
    };
    let agent = connect(&args.instance)?;
    // Before the first thread: all of them leave these signals to the one that waits.
    let signals = Signals::block()?;
    let running = agent.exec(&command)?;
    let raw = args.tty.then(Raw::enter).transpose()?;
    pass_input(&running, args)?;
    pass_signals(running.input()?, running.signals(), signals, args.tty);
    let code = pass_output(running);
    drop(raw);
    code
}

fn connect(instance: &Prefix) -> Result<Agent, CliError> {
    let (line, instance) = verbs::alive(instance)?;
    if instance.state == State::Paused {
        let uuid = instance.uuid;
        return Err(CliError::usage(format!("{uuid} is paused; `runtime resume` it first")));
    }
    Ok(Agent::connect(line.folder(), instance.uuid)?)
}

/// The terminal hands on what is typed as it is, until this goes.
struct Raw;

impl Raw {
    fn enter() -> Result<Self, CliError> {
        terminal::enable_raw_mode()
            .map_err(|error| CliError::internal(format!("cannot set the terminal: {error}")))?;
        Ok(Self)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // It was there a moment ago.
        terminal::disable_raw_mode().unwrap_or(());
    }
}

fn size_of_terminal() -> Terminal {
    let (cols, rows) = terminal::size().unwrap_or((80, 24));
    Terminal { rows, cols }
}

fn pass_input(running: &Running, args: &ExecArgs) -> Result<(), CliError> {
    let mut input = running.input()?;
    if !args.interactive && !args.tty {
        return Ok(input.send(&[])?);
    }
    start(move || {
        let mut piece = [0; PIECE];
        loop {
            let len = match stdin().lock().read(&mut piece) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read.unwrap_or(0),
            };
            // The program may have ended.
            if input.send(&piece[..len]).is_err() || len == 0 {
                return;
            }
        }
    })
}

fn pass_signals(mut input: ProgramInput, to: ProgramSignals, signals: Signals, tty: bool) {
    let pass = move || {
        // Where there is no terminal, asking for its size starts programs.
        let mut size = tty.then(size_of_terminal);
        loop {
            if let Some(number) = signals.wait(LOOK) {
                // Otherwise it has ended, or its machine has.
                to.send(number).unwrap_or(());
            }
            let now = tty.then(size_of_terminal);
            if let Some(now) = now.filter(|_| now != size) {
                size = Some(now);
                if input.tell(Input::Resize(now)).is_err() {
                    return;
                }
            }
        }
    };
    // Without it the program runs all the same.
    start(pass).unwrap_or(());
}

fn start(work: impl FnOnce() + Send + 'static) -> Result<(), CliError> {
    std::thread::Builder::new()
        .spawn(work)
        .map(drop)
        .map_err(|error| CliError::internal(format!("cannot start a thread: {error}")))
}

fn pass_output(mut running: Running) -> Result<u8, CliError> {
    let written = |result: std::io::Result<()>| match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::internal(format!("cannot write the output: {error}")))
        }
        _ => Ok(()),
    };
    loop {
        match running.hear()? {
            Said::Out(bytes) => {
                let mut out = stdout().lock();
                written(out.write_all(&bytes).and_then(|()| out.flush()))?;
            }
            Said::Err(bytes) => written(stderr().lock().write_all(&bytes))?,
            Said::Exited(code) => return Ok(exit_code(code)),
        }
    }
}

/// One side of a copy.
enum Side<'a> {
    Here(&'a Path),
    Guest(Prefix, &'a str),
}

impl<'a> Side<'a> {
    /// `INSTANCE:PATH`, or a path here; `./` before a path that looks like the former.
    fn of(typed: &'a str) -> Result<Self, CliError> {
        match typed.split_once(':') {
            Some((instance, path)) if !instance.contains('/') => {
                if !path.starts_with('/') {
                    let text = format!("{path:?} is not an absolute path in the guest");
                    return Err(CliError::usage(text));
                }
                let prefix = instance.parse().map_err(CliError::usage)?;
                Ok(Self::Guest(prefix, path))
            }
            _ => Ok(Self::Here(Path::new(typed))),
        }
    }
}

pub fn cp(args: &CpArgs) -> Result<u8, CliError> {
    match (Side::of(&args.from)?, Side::of(&args.to)?) {
        (Side::Here(from), Side::Guest(instance, to)) => {
            let mut file = File::open(from).map_err(|error| named(from, &error))?;
            let about = file.metadata().map_err(|error| named(from, &error))?;
            if about.is_dir() {
                let text = format!("{} is a folder; copy a tar of it", from.display());
                return Err(CliError::usage(text));
            }
            let mode = about.permissions().mode() & 0o7777;
            connect(&instance)?.write(&inside(to, from.file_name()), mode, &mut file)?;
        }
        (Side::Guest(instance, from), Side::Here(to)) => {
            let to = match Path::new(from).file_name() {
                Some(name) if to.is_dir() => to.join(name),
                _ => to.to_owned(),
            };
            fetch(connect(&instance)?, from, &to)?;
        }
        _ => {
            let text = "one of the two must be in a guest, and one here: INSTANCE:PATH, PATH";
            return Err(CliError::usage(text));
        }
    }
    Ok(0)
}

/// Where a file goes in the guest: into a folder, if the path ends like one.
fn inside(to: &str, name: Option<&std::ffi::OsStr>) -> String {
    match name {
        Some(name) if to.ends_with('/') => format!("{to}{}", name.to_string_lossy()),
        _ => to.to_owned(),
    }
}

/// A file is written beside its place first, so that half of one never lies there. What is there and is
/// no file (a device, a pipe, a link to one) is written to and stays what it is.
fn fetch(agent: Agent, from: &str, to: &Path) -> Result<(), CliError> {
    // Where a link leads to: the link is not what is replaced.
    let place = std::fs::canonicalize(to).unwrap_or_else(|_| to.to_owned());
    if std::fs::metadata(&place).is_ok_and(|there| !there.is_file()) {
        let open = |_| File::options().write(true).open(&place);
        return agent.read(from, open).map(drop).map_err(CliError::from);
    }
    let mut beside = place.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    let beside = PathBuf::from(beside);
    let open =
        |mode: u32| File::options().write(true).create_new(true).mode(mode & 0o777).open(&beside);
    let fetched = agent.read(from, open).map_err(CliError::from);
    let placed = fetched.and_then(|file| {
        file.sync_all()
            .and_then(|()| std::fs::rename(&beside, &place))
            .map_err(|error| named(to, &error))
    });
    if placed.is_err() {
        // It may not have come that far.
        drop(std::fs::remove_file(&beside));
    }
    placed
}

fn named(path: &Path, error: &std::io::Error) -> CliError {
    CliError::usage(format!("{}: {error}", path.display()))
}

impl From<AgentError> for CliError {
    fn from(error: AgentError) -> Self {
        match error {
            // A program that is not there, a file that is not: what was typed is wrong.
            // So is the name of an instance that has no agent.
            AgentError::Refused { .. } | AgentError::NoSocket { .. } | AgentError::NoAgent => {
                Self::usage(sys::chain(&error))
            }
            _ => Self::internal(sys::chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        assert!(matches!(Side::of("a/b:c"), Ok(Side::Here(_))));
        assert!(matches!(Side::of("./ab:c"), Ok(Side::Here(_))));
        assert!(matches!(Side::of("file"), Ok(Side::Here(_))));
        assert!(matches!(Side::of("3f:/etc/passwd"), Ok(Side::Guest(_, "/etc/passwd"))));
        assert!(Side::of("3f:etc").is_err() && Side::of("xyz:/etc").is_err());
    }

    #[test]
    fn a_path_that_ends_like_a_folder_takes_the_name() {
        let name = Some(std::ffi::OsStr::new("x"));
        assert_eq!(inside("/tmp/", name), "/tmp/x");
        assert_eq!(inside("/tmp/y", name), "/tmp/y");
    }
}
