//! A door for the fuzz targets: what a guest may write to ports and parameter pages.

use super::Action;
use super::vcpu;
use crate::memory::GuestRam;

/// What a write to a port of the doorbell is taken for, in words.
#[must_use]
pub fn doorbell(port: u16, data: &[u8]) -> String {
    format!("{:?}", Action::of_doorbell(port, data, 0))
}

/// What is read from the parameter page of a vCPU: sequence number and results.
#[must_use]
pub fn parameters(ram: &GuestRam, vcpu: u32) -> (u64, Vec<u64>) {
    (vcpu::program_seq(ram, vcpu.into()), vcpu::results(ram, vcpu))
}
