//! Devices of a bare machine: the doorbell. What a device keeps is plain data.

mod answer;

pub use answer::Answer;
