//! Programs in a session of their own.
#![expect(unsafe_code, reason = "what runs between fork and exec is marked unsafe by std")]

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

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

/// The program gets a session and a process group of its own, and joins the control group whose
/// list of processes is given.
pub fn own_session(command: &mut Command, terminal: ControlledBy, group: Option<Arc<File>>) {
    let start = move || {
        setsid()?;
        if let Some(group) = &group {
            rustix::io::write(group, b"0")?;
        }
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
    // three system calls, takes no lock and no memory.
    unsafe { command.pre_exec(start) };
}
