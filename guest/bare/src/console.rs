//! Text for the runtime's console.

use core::fmt;

use guest_abi::port::CONSOLE;

use crate::port;

/// Every piece of text leaves the guest at once: there is no buffer that a fork could
/// duplicate.
struct Console;

/// Writes a line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    // Only a `Display` that gives up by itself can fail here, and then half a line is better than
    // a second panic.
    if fmt::write(&mut Console, text).is_err() {
        port::write_bytes(CONSOLE, b"...");
    }
    port::write_bytes(CONSOLE, b"\n");
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        port::write_bytes(CONSOLE, text.as_bytes());
        Ok(())
    }
}
