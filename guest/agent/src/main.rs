//! `ukp-agent`: init of a Linux guest, and `ukp` for its scripts.
//!
//! Which of them is told by the name it is called by (`init`, `ukp`), by being PID 1, or by the first
//! argument (`ukp-agent init`, `ukp-agent fork`).

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use guest_agent::doorbell::ports::Ports;
use guest_agent::{cli, console, init};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|name| Path::new(name).file_name());
    let is_first = std::process::id() == 1;
    let asked = name.is_some_and(|name| name == "init")
        || arguments.get(1).is_some_and(|argument| argument == "init");
    if is_first {
        init::run(|| Ok(Arc::new(Ports::open()?)));
    }
    if asked {
        console::say("init can only be the first process of a machine");
        return ExitCode::FAILURE;
    }
    cli::run(arguments, Path::new(init::LIBUKP))
}
