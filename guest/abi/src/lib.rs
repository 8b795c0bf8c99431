//! The contract between the runtime and a guest that runs on the bare virtual machine.
//!
//! A bare guest is a static x86-64 ELF that stays in CPL 3. The runtime loads it, builds page
//! tables and starts every vCPU at the ELF's entry point with the state that [`entry`] describes.
//! From then on the guest talks to the runtime through I/O ports ([`port`]) and, if it is driven by
//! a harness, through one [`param::ParamPage`] per vCPU. `guest/bare/ABI.md` tells the same in
//! prose.

#![no_std]

pub mod entry;
pub mod param;
pub mod pattern;
pub mod port;
