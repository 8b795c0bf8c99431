//! Devices of a machine: the doorbell, and for Linux a serial line and virtio devices. What a device
//! keeps is plain data.

mod answer;
pub mod generation;
pub mod ports;
mod serial;
pub mod virtio;

pub use answer::Answer;
pub use serial::{Serial, SerialRegisters};
