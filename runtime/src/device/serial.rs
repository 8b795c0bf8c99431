//! The serial line of a machine that runs Linux. What the guest writes goes to its console; nobody
//! writes to it yet.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Device, Trigger};

/// Its registers, as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SerialRegisters {
    bytes: [u8; 9],
    unused: [u8; 7],
}

/// Notes that the guest is to be interrupted.
#[derive(Clone, Debug, Default)]
struct Asked(Arc<AtomicBool>);

impl Trigger for Asked {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// How a line begins with which Linux says that it goes no further; and, with `END`, that it has
/// said all.
const PANIC: &str = "Kernel panic - not syncing";
const END: &str = "---[ end Kernel panic";
/// Longest line that is looked at.
const LINE: usize = 512;

/// Listens to what the guest says, for a panic.
#[derive(Debug, Default)]
struct Panic {
    line: Vec<u8>,
    reason: Option<String>,
    ended: bool,
}

impl Panic {
    fn hear(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < LINE {
                self.line.push(byte);
            }
            return;
        }
        let line = String::from_utf8_lossy(&self.line);
        if self.reason.is_none() {
            self.reason = line.find(PANIC).map(|at| line[at..].trim_end().to_owned());
        }
        self.ended |= line.contains(END);
        self.line.clear();
    }
}

/// The device.
#[derive(Debug)]
pub struct Serial {
    device: Mutex<Device<Asked, NoEvents, Vec<u8>>>,
    asked: Asked,
    panic: Mutex<Panic>,
    /// On another console.
    panic_elsewhere: Mutex<Panic>,
}

impl Default for Serial {
    fn default() -> Self {
        let asked = Asked::default();
        let device = Mutex::new(Device::new(asked.clone(), Vec::new()));
        Self { device, asked, panic: Mutex::default(), panic_elsewhere: Mutex::default() }
    }
}

impl Serial {
    /// The guest writes a register. Returns what it said on the line.
    pub fn write(&self, offset: u8, value: u8) -> Vec<u8> {
        let mut device = self.lock();
        // The only error is that of a trigger or a sink, which have none.
        device.write(offset, value).unwrap_or(());
        let said = std::mem::take(device.writer_mut());
        if !said.is_empty() {
            let mut panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            for byte in &said {
                panic.hear(*byte);
            }
        }
        said
    }

    /// What the guest's kernel said when it panicked, and whether it has said all.
    pub fn panic(&self) -> Option<(String, bool)> {
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
        panic.reason.clone().map(|reason| (reason, panic.ended))
    }

    /// The guest says something on another console than this one: its kernel may panic there.
    pub fn overhear(&self, said: &[u8]) {
        let mut panic = self.panic_elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in said {
            panic.hear(*byte);
        }
    }

    /// What the guest's kernel said on any console when it panicked. Programs say things there, too:
    /// it explains an end, and is no reason for one.
    pub fn last_panic(&self) -> Option<String> {
        let elsewhere = self.panic_elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        self.panic().map(|(reason, _)| reason).or_else(|| elsewhere.reason.clone())
    }

    /// The guest writes a register several times. Returns what it said on the line.
    pub fn write_all(&self, offset: u8, values: &[u8]) -> Vec<u8> {
        values.iter().flat_map(|value| self.write(offset, *value)).collect()
    }

    /// The guest reads a register.
    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    /// Whether the guest is to be interrupted; once.
    pub fn interrupts(&self) -> bool {
        self.asked.0.swap(false, Ordering::Relaxed)
    }

    /// Its registers.
    pub fn save(&self) -> SerialRegisters {
        let state = self.lock().state();
        let bytes = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        SerialRegisters { bytes, ..SerialRegisters::default() }
    }

    /// Sets its registers.
    pub fn restore(&self, registers: &SerialRegisters) {
        let [low, high, enable, identification, line, status, modem, modem_status, scratch] =
            registers.bytes;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        // It fails for more input than there is room for.
        if let Ok(device) = Device::from_state(&state, self.asked.clone(), NoEvents, Vec::new()) {
            *self.lock() = device;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Device<Asked, NoEvents, Vec<u8>>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_heard() {
        let serial = Serial::default();
        let say = |text: &str| {
            for byte in text.bytes() {
                serial.write(0, byte);
            }
        };
        say("[    1.0] all is well, no Kernel panic here\r\n");
        assert_eq!(serial.panic(), None);
        say("[    1.1] Kernel panic - not syncing: No working init found.\r\n");
        let reason = "Kernel panic - not syncing: No working init found.".to_owned();
        assert_eq!(serial.panic(), Some((reason.clone(), false)));
        say("[    1.2] ---[ end Kernel panic - not syncing: No working init found. ]---\r\n");
        assert_eq!(serial.panic(), Some((reason, true)));
    }

    #[test]
    fn a_panic_on_another_console_is_no_reason_to_end() {
        let serial = Serial::default();
        assert_eq!(serial.last_panic(), None);
        serial.overhear(
            b"[    1.1] Kernel panic - not syncing: hung\r\n---[ end Kernel panic ]---\r\n",
        );
        assert_eq!(serial.panic(), None);
        assert_eq!(serial.last_panic().as_deref(), Some("Kernel panic - not syncing: hung"));
    }

    #[test]
    fn what_is_saved_is_restored_and_the_guest_goes_on() {
        let one = Serial::default();
        // Interrupts when there is room, and a scratch value.
        assert!(one.write(1, 2).is_empty());
        assert!(one.interrupts() && !one.interrupts());
        one.write(7, 0x5a);
        assert_eq!(one.write(0, b'x'), b"x");
        let two = Serial::default();
        two.restore(&one.save());
        assert_eq!((two.save(), two.read(7), two.read(1)), (one.save(), 0x5a, 2));
        assert_eq!(two.write(0, b'y'), b"y");
        assert_eq!(two.write_all(0, b"a whole line\n"), b"a whole line\n");
    }
}
