//! `run -i`: what comes on stdin is typed on the first instance's console.
//!
//! A terminal hands on what is typed key by key, Ctrl-C too, until this goes; Ctrl-] is for `run`. Of
//! a pipe or a file the end is typed as a terminal has it, so `echo ls | runtime run -i …` is a
//! session of a shell.

use std::io::{IsTerminal, Read, stdin};
use std::sync::Arc;
use std::time::Duration;

use runtime::owner::Owner;
use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use uuid::Uuid;

use super::error::CliError;

/// Bytes in one message.
const CHUNK: usize = 4096;
/// How often it is looked whether a guest that was behind has read something.
const LOOK: Duration = Duration::from_millis(20);
/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// Ctrl-D.
const END: u8 = 0x04;

/// The terminal as it was, until this goes.
pub struct Keyboard(Option<Termios>);

impl Keyboard {
    /// Begins to pass stdin on.
    ///
    /// # Errors
    ///
    /// If the terminal cannot be set.
    pub fn start(owner: &Arc<Owner>, root: Uuid) -> Result<Self, CliError> {
        let is_terminal = stdin().is_terminal();
        let keyboard = Self(is_terminal.then(raw).transpose()?);
        let owner = owner.clone();
        // Ends with the process: nothing wakes who waits for a key.
        std::thread::spawn(move || pass_on(&owner, root, is_terminal));
        Ok(keyboard)
    }

    /// What whoever sits there is told.
    pub fn note(&self) -> Option<&'static str> {
        self.0.is_some().then_some("what is typed goes to the guest's hvc0; Ctrl-] ends all")
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // It may be gone.
            tcsetattr(stdin(), OptionalActions::Now, before).unwrap_or(());
        }
    }
}

/// Key by key, without echo: the guest's terminal has its own. Output stays as it is.
fn raw() -> Result<Termios, CliError> {
    let fail = |errno| CliError::internal(format!("cannot set the terminal: {errno}"));
    let before = tcgetattr(stdin()).map_err(fail)?;
    let mut modes = before.clone();
    modes.local_modes -=
        LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
    modes.input_modes -= InputModes::ICRNL | InputModes::IXON;
    tcsetattr(stdin(), OptionalActions::Now, &modes).map_err(fail)?;
    Ok(before)
}

fn pass_on(owner: &Owner, root: Uuid, is_terminal: bool) {
    let mut buffer = [0; CHUNK];
    let mut in_line = false;
    loop {
        let typed = match stdin().lock().read(&mut buffer) {
            Ok(len) => buffer.get(..len).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => &[],
        };
        if is_terminal && (typed.is_empty() || typed.contains(&ESCAPE)) {
            // It arrives: it is this process that waits for it.
            kill_process(getpid(), Signal::INT).unwrap_or(());
            return;
        }
        if typed.is_empty() {
            // In the middle of a line the first one ends that.
            type_all(owner, root, if in_line { &[END, END] } else { &[END] });
            return;
        }
        in_line = typed.last() != Some(&b'\n');
        if !type_all(owner, root, typed) {
            return;
        }
    }
}

/// As fast as the guest reads; tells whether it does.
fn type_all(owner: &Owner, root: Uuid, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match owner.type_in(root, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            // It has ended.
            Err(_) => return false,
        }
        if !bytes.is_empty() {
            std::thread::sleep(LOOK);
        }
    }
    true
}
