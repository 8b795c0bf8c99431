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

/// What the guest does to its power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Nothing.
    Stays,
    /// It restarts, which ends an instance.
    Restarts,
    /// It switches itself off.
    Off,
}

impl Power {
    /// What `byte` at `port` does; `None`: it is no port of ACPI's, or no value of it.
    #[must_use]
    pub fn of(port: u16, byte: u8) -> Option<Self> {
        match port {
            RESET if byte == RESET_VALUE => Some(Self::Restarts),
            SLEEP if byte == SLEEP_ENABLE | SLEEP_OFF << SLEEP_TYPE_SHIFT => Some(Self::Off),
            SLEEP => Some(Self::Stays),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_value_restarts_and_one_switches_off() {
        assert_eq!(Power::of(RESET, 1), Some(Power::Restarts));
        assert_eq!(Power::of(SLEEP, 0x34), Some(Power::Off));
    }

    proptest! {
        #[test]
        fn nothing_else_does(port in prop_oneof![Just(RESET), Just(SLEEP), any::<u16>()], byte in any::<u8>()) {
            let ends = matches!(Power::of(port, byte), Some(Power::Restarts | Power::Off));
            prop_assert_eq!(ends, matches!((port, byte), (RESET, 1) | (SLEEP, 0x34)));
        }
    }
}
