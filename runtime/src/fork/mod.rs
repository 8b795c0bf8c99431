//! `fork()` for a running machine.
//!
//! ```text
//!  instance A: VMM process                      standby child of A: VMM process, parked
//!    vCPU threads, one control thread             VM, irqchip, vCPUs, CPUID, memslots: made
//!          |                                      memory: A's image as of the last sync
//!          | 1 doorbell exit                      rehearsed, hot pages already private
//!          | 2 wake standbys, stop other vCPUs    identity: chosen
//!          | 3 dirty pages -> journal ----------> 4 apply pages
//!          |   vCPU state  -> fork block -------> 5 set what differs, new identity, consent
//!          | 6 back into the guest                7 KVM_RUN
//!          v                                      v
//!    new standby, off the path  <---- zygote of A: no KVM, just memory; fork(2)s standbys
//! ```
//!
//! [`Engine::fork`] is the parent's side, `park_and_go` in `child.rs` the child's. Everything else
//! here prepares for them: `capture.rs` knows what is dirty, the [`Link`] carries it, [`Zygote`] and
//! [`Keeper`] keep standbys ready.

mod apply;
mod capture;
mod child;
mod consolidate;
mod crew;
mod engine;
mod keeper;
mod link;
mod path;
mod rehearse;
mod report;
mod shared;
mod standby;
mod step;
mod zygote;

pub use engine::Engine;
pub use keeper::{Keeper, MOST as MOST_STANDBYS, Tick};
pub use link::{Base, Identity, Link, MAX_VCPUS, capacity};
pub use report::{ChildReport, ForkReport, ParentMoments};
pub use shared::{Shared, no_memory};
pub use step::{
    FAULT_DELAY, FAULT_KILL, FAULT_SHORT_MSRS, Fault, ForkCause, ForkError, Moment, Step,
};
pub use zygote::{Twin, Womb, Zygote, live, serve_raised};
