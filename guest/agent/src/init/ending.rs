//! The end of the machine.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::system::{RebootCommand, reboot};
use rustix::termios::tcdrain;

use crate::console::say;
use crate::doorbell::Doorbell;
use crate::sync::lock;

/// Ends the machine, once, with the first exit code that is given.
#[derive(Clone, Default)]
pub struct Ending {
    doorbell: Arc<Mutex<Option<Arc<dyn Doorbell>>>>,
}

impl Ending {
    /// How it is ended.
    pub fn use_doorbell(&self, doorbell: Arc<dyn Doorbell>) {
        *lock(&self.doorbell) = Some(doorbell);
    }

    /// Ends it.
    pub fn end(&self, code: u8) -> ! {
        self.end_with(code, rustix::fs::sync)
    }

    /// Ends it without writing files back: that may wait for programs that stand still, and this machine
    /// is one that must not be.
    pub fn end_at_once(&self, code: u8) -> ! {
        self.end_with(code, || {})
    }

    fn end_with(&self, code: u8, sync: impl FnOnce()) -> ! {
        // Held for good: others that want to end it wait here.
        let doorbell = lock(&self.doorbell);
        // Not everything is a terminal.
        tcdrain(rustix::stdio::stdout()).unwrap_or_default();
        tcdrain(rustix::stdio::stderr()).unwrap_or_default();
        sync();
        if let Some(doorbell) = doorbell.as_ref()
            && let Err(error) = doorbell.exit(code)
        {
            say(format_args!("cannot tell the exit code {code}: {error}"));
        }
        if let Err(error) = reboot(RebootCommand::PowerOff) {
            say(format_args!("cannot power off: {error}"));
        }
        loop {
            std::thread::sleep(Duration::from_hours(1));
        }
    }
}
