//! Lines for the machine's console, which is the standard error of its init.

use std::fmt::Display;
use std::io::Write;

/// Writes one line. A console that does not take it is no reason to stop.
pub fn say(line: impl Display) {
    drop(writeln!(std::io::stderr().lock(), "ukp-agent: {line}"));
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
