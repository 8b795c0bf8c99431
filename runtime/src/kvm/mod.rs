//! KVM, in three layers: the host's abilities ([`Host`]), one virtual machine ([`Machine`]), one
//! virtual processor ([`Vcpu`]) and its state as plain data ([`VcpuState`]).

mod broken;
pub mod calls;
mod dirty;
mod error;
mod host;
mod machine;
mod state;
mod statistics;
mod vcpu;

pub use dirty::{DirtyLog, DirtyMode};
pub use error::{KvmError, NEWER_KERNEL};
pub use host::{Host, Needed, needed};
pub use machine::{Machine, MachineConfig, VmState};
pub use state::{MAX_MSRS, MAX_XSAVE, VcpuState};
pub use vcpu::{Kick, Vcpu};
