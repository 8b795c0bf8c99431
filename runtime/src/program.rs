//! This program, started again as something else.
//!
//! An instance, and a zygote that replaces a lost one, are the program that links this library,
//! executed once more with a word as its argument and a connection as descriptor 3. So whoever uses
//! the library needs no second file, and both sides are of one version.
#![expect(unsafe_code, reason = "an inherited descriptor is moved into place and adopted")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::sys::{self, SysError};

/// Descriptor of the connection.
const LINE: i32 = 3;

/// What this program can be besides itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A root instance.
    Instance,
    /// A zygote.
    Zygote,
}

impl Part {
    fn word(self) -> &'static str {
        match self {
            Self::Instance => "__instance",
            Self::Zygote => "__zygote",
        }
    }
}

/// If this process was started as a part, it plays it and does not return. To be called first in
/// `main`, before any thread is started.
pub fn play_part() {
    let Some(word) = std::env::args_os().nth(1) else { return };
    let Some(part) = [Part::Instance, Part::Zygote].into_iter().find(|part| word == part.word())
    else {
        return;
    };
    // SAFETY: `spawn` put the connection there, and nothing has touched it since.
    let line = unsafe { sys::adopt(LINE) };
    match part {
        Part::Instance => std::process::exit(crate::instance::run_root(&line)),
        Part::Zygote => crate::fork::serve_raised(line),
    }
}

/// Starts this program as `part`, with `line` as its connection and `stdin` as its standard input.
///
/// # Errors
///
/// What fork(2) and execve(2) say.
pub fn spawn(part: Part, line: &OwnedFd, stdin: Stdio) -> Result<Child, SysError> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(part.word()).stdin(stdin);
    if part == Part::Instance {
        // All that an instance leads to is one group; what the owner's terminal sends goes to others.
        command.process_group(0);
    }
    let fd = line.as_raw_fd();
    let place = move || {
        let result = if fd == LINE {
            // It is in its place and only loses its close-on-exec flag.
            // SAFETY: fcntl is async-signal-safe and touches no memory here.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }
        } else {
            // SAFETY: dup2 is async-signal-safe and touches no memory.
            unsafe { libc::dup2(fd, LINE) }
        };
        if result < 0 {
            return Err(std::io::Error::last_os_error());
        }
        unblock_signals();
        Ok(())
    };
    // SAFETY: `place` does nothing that is forbidden between fork and exec.
    unsafe {
        command.pre_exec(place);
    }
    command.spawn().map_err(|source| SysError { call: "starting a process", source })
}

/// An owner that blocks signals in order to wait for them does so for itself alone.
fn unblock_signals() {
    // SAFETY: an all-zero set is valid memory.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: a valid destination; async-signal-safe.
    unsafe { libc::sigemptyset(&raw mut none) };
    // SAFETY: a valid set, and the old one is not asked for; async-signal-safe. It cannot fail for
    // a valid operation.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
}
