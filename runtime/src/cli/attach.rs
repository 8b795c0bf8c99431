//! `logs` and `console`: what an instance says, and for the latter what is typed on it.

use std::io::{IsTerminal, Write, stdin, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::args::{ConsoleArgs, LogsArgs};
use super::client::{self, Line};
use super::error::{CliError, exit_code};
use super::keyboard::Keyboard;
use super::signals::Signals;
use super::wire::{Answer, Ask};
use super::{print_json, tell, verbs};

pub fn logs(args: &LogsArgs) -> Result<u8, CliError> {
    // What one that has ended has said is there for a while.
    let (line, instance) = client::find(&args.instance)?;
    let mut next = 0;
    line.output(&Ask::Logs { instance: instance.uuid, follow: args.follow }, |at, bytes| {
        if at > next {
            tell(&format!("note: {} bytes are no longer kept", at - next));
        }
        next = at + bytes.len() as u64;
        if args.json {
            let text = String::from_utf8_lossy(bytes);
            return print_json(&json!({ "instance": instance.uuid, "at": at, "text": text }))
                .map(|()| true);
        }
        show(bytes)
    })?;
    Ok(0)
}

pub fn console(args: &ConsoleArgs) -> Result<u8, CliError> {
    let (line, instance) = verbs::alive(&args.instance)?;
    let typing = Line::again(&line)?;
    let uuid = instance.uuid;
    let left = Arc::new(AtomicBool::new(false));
    let leaving = left.clone();
    // Before the first thread. The terminal is to be put back, whatever ends this.
    let signals = Signals::block()?;
    let type_in =
        move |bytes: &[u8]| match typing.ask(&Ask::Type { instance: uuid, bytes: bytes.into() }) {
            Ok(Answer::Typed(count)) => Some(count),
            _ => None,
        };
    let hang_up = line.hang_up()?;
    let keyboard = Keyboard::start(type_in, move || {
        leaving.store(true, Ordering::SeqCst);
        hang_up();
    })?;
    if stdin().is_terminal() {
        tell("note: what is typed goes to the guest's hvc0; Ctrl-] leaves it");
    }
    let ask = Ask::Logs { instance: uuid, follow: true };
    let (shown, signal) =
        signals.during(line.hang_up()?, || line.output(&ask, |_, bytes| show(bytes)));
    drop(keyboard);
    match signal {
        Some(signal) => Ok(exit_code(128 + signal)),
        None if left.load(Ordering::SeqCst) => Ok(0),
        None => shown.map(|()| 0),
    }
}

/// Tells whether anybody still reads.
fn show(bytes: &[u8]) -> Result<bool, CliError> {
    let mut out = stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(CliError::internal(format!("cannot write the output: {error}"))),
        Ok(()) => Ok(true),
    }
}
