//! fork() for a running KVM virtual machine.
