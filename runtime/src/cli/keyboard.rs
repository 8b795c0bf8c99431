//! `run -i` and `console`: what comes on stdin is typed on an instance's console.
//!
//! A terminal hands on what is typed key by key, Ctrl-C too, until this goes; Ctrl-] is for us. Of
//! a pipe or a file the end is typed as a terminal has it, so `echo ls | runtime run -i …` is a
//! session of a shell.

use std::io::{IsTerminal, Read, stdin};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use super::error::CliError;

/// Bytes in one message.
const CHUNK: usize = 4096;
/// Messages that may wait for a guest that does not read.
const BEHIND: usize = 16;
/// How often it is looked whether a guest that was behind has read something.
const LOOK: Duration = Duration::from_millis(20);
/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// Ctrl-D.
const END: u8 = 0x04;

/// The terminal as it was, until this goes.
pub struct Keyboard(Option<Termios>);

impl Keyboard {
    /// Begins to pass stdin on. `type_in` tells how many bytes the guest had room for, or nothing once
    /// it has ended; `leave` is called when Ctrl-] is typed at a terminal, or that is gone.
    ///
    /// # Errors
    ///
    /// If the terminal cannot be set.
    pub fn start(
        type_in: impl Fn(&[u8]) -> Option<usize> + Send + 'static,
        leave: impl FnOnce() + Send + 'static,
    ) -> Result<Self, CliError> {
        let is_terminal = stdin().is_terminal();
        let keyboard = Self(is_terminal.then(raw).transpose()?);
        // Ends with the process: nothing wakes who waits for a key.
        std::thread::spawn(move || pass_on(type_in, leave, is_terminal));
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

/// Reads what is typed. It never waits for the guest at a terminal, so that Ctrl-] always works: when
/// the guest has stopped reading, or the first instance has ended and its children go on.
fn pass_on(
    type_in: impl Fn(&[u8]) -> Option<usize> + Send + 'static,
    leave: impl FnOnce(),
    is_terminal: bool,
) {
    let (to_guest, typed) = sync_channel::<Vec<u8>>(BEHIND);
    std::thread::spawn(move || {
        // What comes after its end is nobody's.
        while typed.recv().is_ok_and(|bytes| type_all(&type_in, &bytes)) {}
    });
    let mut buffer = [0; CHUNK];
    let mut in_line = false;
    loop {
        let typed = match stdin().lock().read(&mut buffer) {
            Ok(len) => buffer.get(..len).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => &[],
        };
        if is_terminal && (typed.is_empty() || typed.contains(&ESCAPE)) {
            return leave();
        }
        let ended = typed.is_empty();
        // In the middle of a line the first one ends that.
        let end: &[u8] = if in_line { &[END, END] } else { &[END] };
        let bytes = if ended { end } else { typed };
        in_line = typed.last() != Some(&b'\n');
        if is_terminal {
            // A guest that is so far behind misses what is typed, as at any terminal.
            to_guest.try_send(bytes.to_vec()).unwrap_or(());
        } else if to_guest.send(bytes.to_vec()).is_err() || ended {
            return;
        }
    }
}

/// As fast as the guest reads; tells whether it does.
fn type_all(type_in: &impl Fn(&[u8]) -> Option<usize>, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        // Without an answer it has ended.
        let Some(count) = type_in(bytes) else { return false };
        bytes = bytes.get(count..).unwrap_or_default();
        if !bytes.is_empty() {
            std::thread::sleep(LOOK);
        }
    }
    true
}
