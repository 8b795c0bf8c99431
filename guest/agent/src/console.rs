//! Lines for the machine's console, which is the standard error of its init.

use std::fmt::Display;
use std::io::Write;

/// Writes one line, in one piece. A console that does not take it is no reason to stop.
pub fn say(line: impl Display) {
    let line = format!("ukp-agent: {line}\n");
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// An error and what it came from, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
