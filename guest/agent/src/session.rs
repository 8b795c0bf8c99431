//! Programs in a session of their own.
#![expect(unsafe_code, reason = "what runs between fork and exec is marked unsafe by std")]

use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{ioctl_tiocsctty, setsid};

/// What a program's terminal is to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlledBy {
    /// It has none.
    Nothing,
    /// Its standard input, which must be a terminal.
    Input,
    /// Its standard input, if that can be.
    InputMaybe,
}

/// The program gets a session and a process group of its own.
pub fn own_session(command: &mut Command, terminal: ControlledBy) {
    let start = move || {
        setsid()?;
        if terminal == ControlledBy::Nothing {
            return Ok(());
        }
        let result = ioctl_tiocsctty(rustix::stdio::stdin());
        if terminal == ControlledBy::Input {
            result?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only what is async-signal-safe may be called: the closure makes
    // two system calls, takes no lock and no memory.
    unsafe { command.pre_exec(start) };
}
