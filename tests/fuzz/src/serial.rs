//! The serial line and the ports of the machine's power.

use arbitrary::{Arbitrary, Unstructured};
use runtime::device::Serial;
use runtime::device::ports::Power;

const MOST: usize = 4096;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Write { offset: u8, bytes: &'a [u8] },
    Read { offset: u8 },
    Say { bytes: &'a [u8] },
    Power { port: u16, value: u8 },
    Fork,
}

/// Plays the steps.
///
/// # Panics
///
/// If the line says more than it was told, or a child's registers are not its parent's.
pub fn run(data: &[u8]) {
    let mut rest = Unstructured::new(data);
    let mut serial = Serial::default();
    for _ in 0..MOST {
        if rest.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut rest) else { break };
        match step {
            Step::Write { offset, bytes } => {
                let said = serial.write_all(offset, bytes);
                assert!(said.len() <= bytes.len());
            }
            Step::Read { offset } => drop(serial.read(offset)),
            Step::Say { bytes } => drop(serial.write_all(0, bytes)),
            Step::Power { port, value } => drop(Power::of(port, value)),
            Step::Fork => {
                let child = Serial::default();
                let saved = serial.save();
                child.restore(&saved);
                assert_eq!(child.save(), saved);
                serial = child;
            }
        }
        serial.interrupts();
    }
    if let Some((reason, _)) = serial.panic() {
        assert!(reason.chars().count() <= 512);
    }
}
