//! Helpers shared by the suites.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`case`] | a test with a name, what it needs, and what it must not share the machine with |
//! | [`rig`] | a root instance to test, with a time limit and a check that nothing is left of it |
//! | [`program`] | programs of the bundled guest, and the answers that it reads |
//! | [`memory`] | what a machine's memory must hold |
//! | [`census`] | what processes hold: descriptors, mappings, memfds |
//! | [`host`] | what this host can do |
//! | [`guest`] | a Linux instance on whatever host this is |
//! | [`elf`] | guests of a few bytes |

pub mod case;
pub mod census;
pub mod elf;
pub mod guest;
pub mod host;
pub mod memory;
pub mod probes;
pub mod program;
pub mod rig;
