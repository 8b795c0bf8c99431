//! What this process says about itself to the probes in the kernel, and to any other tracer.
//!
//! It is a value at a fixed place in memory that the probes read in the process that they interrupt:
//! telling costs a store. A forked process has it at the same address, so a child needs to say only
//! what changed. Nothing here is needed for anything else; without probes nobody reads it.
//!
//! The moments of a fork are marks for tracers, too (USDT `ukp:stage`, with the moment's number and
//! its time, in ns of the monotonic clock):
//! one instruction without effect where nobody traces.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

pub use ebpf_common::Role;

use crate::fork::Moment;
use crate::memory::Mapping;
use crate::sys::now_ns;

/// As `ebpf_common::Beacon`.
#[repr(C)]
struct Beacon {
    role: AtomicU32,
    stage: AtomicU32,
    guest_start: AtomicU64,
    guest_len: AtomicU64,
    born_ns: AtomicU64,
}

const _: () = assert!(size_of::<Beacon>() == size_of::<ebpf_common::Beacon>());

static BEACON: Beacon = Beacon {
    role: AtomicU32::new(Role::Unknown as u32),
    stage: AtomicU32::new(0),
    guest_start: AtomicU64::new(0),
    guest_len: AtomicU64::new(0),
    born_ns: AtomicU64::new(0),
};

/// Its address in this process and in those that it forks.
#[must_use]
pub fn address() -> u64 {
    (&raw const BEACON) as u64
}

/// Who this process is from now on.
pub fn role(role: Role) {
    BEACON.role.store(role as u32, Relaxed);
}

/// Where the guest's memory lies in this process.
pub fn guest(mapping: &Mapping) {
    BEACON.guest_start.store(mapping.address().as_ptr() as u64, Relaxed);
    BEACON.guest_len.store(mapping.bytes() as u64, Relaxed);
}

/// This process is an instance since `ns`: its guest has run.
pub fn born(ns: u64) {
    BEACON.born_ns.store(ns, Relaxed);
    role(Role::Parent);
}

/// The number of the [`Role`] that this process has at `ns`.
#[must_use]
pub fn role_at(ns: u64) -> u8 {
    let role = BEACON.role.load(Relaxed);
    let young = role == Role::Parent as u32
        && ns.saturating_sub(BEACON.born_ns.load(Relaxed)) < Role::YOUNG_NS;
    // A role's number is small.
    if young { Role::Young as u8 } else { u8::try_from(role).unwrap_or(0) }
}

/// The number of the [`Role`] that this process has now. The clock is read while it matters.
#[must_use]
pub fn role_now() -> u8 {
    // The child of one that has grown up has a birth of its own.
    static GROWN: AtomicU64 = AtomicU64::new(0);
    let (role, born) = (BEACON.role.load(Relaxed), BEACON.born_ns.load(Relaxed));
    if role != Role::Parent as u32 || GROWN.load(Relaxed) == born {
        return u8::try_from(role).unwrap_or(0);
    }
    let role = role_at(now_ns());
    if role == Role::Parent as u8 {
        GROWN.store(born, Relaxed);
    }
    role
}

/// A moment of a fork was reached in this process at `ns`. What happens from now on belongs to what
/// comes after it.
// Never inlined, so that there is one mark.
#[inline(never)]
pub fn moment(moment: Moment, ns: u64) {
    let number = moment as u32 + 1;
    BEACON.stage.store(number, Relaxed);
    probe::probe!(ukp, stage, number, ns);
    if matches!(moment, Moment::Resumed | Moment::Exited) {
        BEACON.stage.store(0, Relaxed);
    }
}
