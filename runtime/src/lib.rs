//! `fork()` for a running KVM virtual machine.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`fork`] | the fork path, and everything that prepares for it: standbys, zygotes, dirty pages |
//! | [`instance`] | the VMM process around one machine: vCPU threads, control thread |
//! | [`owner`] | the other side: the process that runs a tree of instances |
//! | [`kvm`], [`memory`], [`device`], [`boot`] | what a machine is made of |
//! | [`proto`] | what owner and instance say to each other |
//! | [`agent`] | asking the agent in a Linux guest |
//! | [`beacon`] | what an instance says about itself to the probes in the kernel |
//! | [`doctor`] | whether this host can fork machines, and what would make it faster |
//!
//! Dependencies point down: `owner` speaks to `instance` through `proto` alone.
#![warn(clippy::print_stdout)]

pub mod agent;
pub mod beacon;
pub mod boot;
pub mod device;
pub mod doctor;
pub mod fork;
pub mod instance;
pub mod kvm;
pub mod memory;
pub mod owner;
pub mod program;
pub mod proto;
pub mod sys;
