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

/// The device.
#[derive(Debug)]
pub struct Serial {
    device: Mutex<Device<Asked, NoEvents, Vec<u8>>>,
    asked: Asked,
}

impl Default for Serial {
    fn default() -> Self {
        let asked = Asked::default();
        Self { device: Mutex::new(Device::new(asked.clone(), Vec::new())), asked }
    }
}

impl Serial {
    /// The guest writes a register. Returns what it said on the line.
    pub fn write(&self, offset: u8, value: u8) -> Vec<u8> {
        let mut device = self.lock();
        // The only error is that of a trigger or a sink, which have none.
        device.write(offset, value).unwrap_or(());
        std::mem::take(device.writer_mut())
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
    }
}
