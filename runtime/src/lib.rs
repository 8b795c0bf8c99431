//! fork() for a running KVM virtual machine.

pub mod kvm;
pub mod memory;
pub mod sys;
