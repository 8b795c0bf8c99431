//! A guest for the bare virtual machine: no kernel, no privileged instruction, CPL 3 only.
//!
//! Under a hypervisor without hardware virtualisation only user-mode code runs at native speed, so
//! a guest that never leaves user mode is the one that measures the fork and nothing else, there
//! and everywhere. What it does is decided by the harness, one [`guest_abi::param::ParamPage`] at a
//! time:
//!
//! ```text
//!            +---------------- PARK(seq) <-----------+
//!            v  a new sequence number                | DONE(seq)
//!   entry -> run step, step, ... fork ... step, END -+
//!                                 \
//!                                  +-> the child goes on with the step after it
//! ```
//!
//! Every vCPU runs this same loop on its own parameter page. All of its state lives on its stack:
//! there is not one writable static, so what a fork copies is the stack, the parameter page and the
//! work pages, and a parked vCPU holds nothing else. The contract is told in `ABI.md`.

#![no_std]
#![no_main]

mod clock;
mod console;
mod cpu;
mod entry;
mod error;
mod fork;
mod interpreter;
mod intrinsics;
mod ops;
mod param;
mod port;
mod work;
