//! The machine's generation id: 16 random bytes in guest memory that are others in each machine.
//!
//! ```text
//!   ACPI: \_SB.VGEN, _CID "VM_Gen_Counter", ADDR --> 16 bytes at 0xfe000, in a reserved range
//!         \_SB.GED, its interrupt --_EVT--> Notify(VGEN, 0x80)
//! ```
//!
//! A child's bytes are there before its first instruction. The interrupt that has the guest's driver
//! look at them (Linux since 5.18: `vmgenid`, which stirs them into its random numbers) comes with the
//! child's first exit: what the guest does about it is not part of the fork's time. No one relies on a
//! driver being there: the agent is told by the answer to the fork.
//!
//! Source: "Virtual Machine Generation ID" (Microsoft, 2012); ACPI 6.5, sections 5.6.9 (generic event
//! device) and 4.1 (hardware-reduced ACPI has no other interrupt for its events).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GuestRam, PAGE};

/// Bytes of it.
pub const BYTES: usize = 16;
/// Where it lies: on a page of its own, among what the guest is told to be reserved.
pub const ADDRESS: u32 = 0xf_e000;
/// The page of guest memory that it lies in. Low memory begins with the image.
pub const PAGE_NUMBER: u32 = ADDRESS >> PAGE.trailing_zeros();
/// The interrupt of the generic event device, an edge: the last line of the I/O APIC, far from those
/// of other devices.
pub const EVENT_GSI: u32 = 23;

/// Writes it.
///
/// # Errors
///
/// If guest memory ends before it.
pub fn write(ram: &GuestRam, id: &[u8; BYTES]) -> Result<(), GuestMemoryError> {
    ram.write_slice(id, GuestAddress(ADDRESS.into()))
}
