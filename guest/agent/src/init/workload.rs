//! The workload: the program that the machine is there for.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use guest_wire::WorkloadState;

use super::config::Config;
use super::{Ending, InitError, cannot};
use crate::console::say;
use crate::reaper::Reaper;
use crate::session::{ControlledBy, own_session};
use crate::sync::lock;

/// What runs if nothing else is said.
const SHELL: &str = "/bin/sh";

/// Starts it, on the console. When it ends the machine does.
pub(super) fn start(
    config: &Config,
    reaper: &Arc<Reaper>,
    state: &Arc<Mutex<WorkloadState>>,
    ending: &Ending,
    group: Option<Arc<File>>,
) -> Result<(), InitError> {
    let shell = [SHELL.to_owned(), "-i".to_owned()];
    let argv = if config.argv.is_empty() { shell.as_slice() } else { config.argv.as_slice() };
    let Some((program, arguments)) = argv.split_first() else { return Ok(()) };
    if config.argv.is_empty() && !Path::new(SHELL).exists() {
        let error = io::Error::other("config.json has no argv, and there is no /bin/sh");
        return Err(cannot("start a workload")(error));
    }
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(config.environment()).current_dir(&config.cwd);
    own_session(&mut command, ControlledBy::InputMaybe, group);

    // The machine is ended by a thread that starts no programs.
    let (sender, ended) = std::sync::mpsc::channel();
    let (told, ends) = (state.clone(), ending.clone());
    let thread = std::thread::Builder::new().name("ukp-end".into());
    let wait = move || {
        if let Ok(code) = ended.recv() {
            *lock(&told) = WorkloadState::Exited { code };
            ends.end(u8::try_from(code & 0xff).unwrap_or(u8::MAX));
        }
    };
    thread.spawn(wait).map_err(cannot("start the thread that ends the machine"))?;

    let tell = sender.clone();
    let spawned =
        reaper.spawn(&mut command, Box::new(move |code| tell.send(code).unwrap_or_default()));
    match spawned {
        Ok(child) => *lock(state) = WorkloadState::Running { pid: child.id() },
        Err(error) => {
            say(format_args!("cannot run {program}: {error}"));
            // As a shell has it.
            let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            sender.send(code).unwrap_or_default();
        }
    }
    Ok(())
}
