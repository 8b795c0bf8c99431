//! Ports of a machine that runs Linux, besides those of `guest_abi::port`.

/// First port of the serial line, a 16550A; it has eight.
pub const SERIAL: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// ACPI's reset register.
pub const RESET: u16 = 0xd80;
/// What is written to it.
pub const RESET_VALUE: u8 = 1;
/// ACPI's sleep control and status registers.
pub const SLEEP: u16 = 0xd84;
/// The sleep type of "off" (S5).
pub const SLEEP_OFF: u8 = 5;
/// In the sleep control register: sleep now.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// Where the sleep type lies in it.
pub const SLEEP_TYPE_SHIFT: u8 = 2;
