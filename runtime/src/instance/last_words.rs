//! What an instance on huge pages says when there is none left for a page of its guest.
//!
//! A private mapping reserves huge pages for the process that made it. What is forked from that has
//! no reservation: when it writes and the pool is empty, the kernel sends SIGBUS, here if it is the
//! runtime that writes. (When it is the guest, `KVM_RUN` says EFAULT.) There is no way to go on: a
//! standby tells its parent, an instance its owner, and the process ends.
#![expect(unsafe_code, reason = "a signal handler, and what it may use")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};

use crate::fork::{self, Link};
use crate::memory::BackingKind;
use crate::proto::CRASHED;
use crate::sys::SysError;

/// What has happened, and what to do.
pub const POOL_EMPTY: &str = "the huge page pool is exhausted; raise /proc/sys/vm/nr_hugepages or \
                              choose another backing";

/// [`crate::proto::Event::Exited`] with that, as it is sent: nothing can be formatted in a handler.
const EVENT: &[u8] =
    b"{\"Exited\":{\"code\":125,\"reason\":\"the huge page pool is exhausted; raise \
                       /proc/sys/vm/nr_hugepages or choose another backing\"}}";

/// The connection to the owner; -1: there is none yet.
static OWNER: AtomicI32 = AtomicI32::new(-1);
/// The parent's link, as long as this is a standby, and its slot there.
static PARENT: AtomicPtr<Link> = AtomicPtr::new(std::ptr::null_mut());
static SLOT: AtomicUsize = AtomicUsize::new(0);

/// Prepares this process, if its memory is of huge pages.
///
/// # Errors
///
/// What sigaction(2) says.
pub fn prepare(kind: BackingKind) -> Result<(), SysError> {
    if kind != BackingKind::Hugetlb {
        return Ok(());
    }
    // SAFETY: an all-zero sigaction is a valid value: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = speak as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is initialised, and the handler calls only what is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if result < 0 { Err(SysError::last("sigaction")) } else { Ok(()) }
}

/// From now on this process is the standby in `slot` of `parent`, until [`forget_parent`].
pub fn parent(parent: &Link, slot: usize) {
    SLOT.store(slot, Ordering::Relaxed);
    PARENT.store((&raw const *parent).cast_mut(), Ordering::Release);
}

/// It is an instance of its own; its parent's link may be unmapped.
pub fn forget_parent() {
    PARENT.store(std::ptr::null_mut(), Ordering::Release);
}

/// From now on it has an owner at the other end of `line`, which stays open until the process ends.
pub(super) fn owner(line: &OwnedFd) {
    OWNER.store(line.as_raw_fd(), Ordering::Release);
}

extern "C" fn speak(_: libc::c_int) {
    let parent = PARENT.load(Ordering::Acquire);
    if !parent.is_null() {
        // SAFETY: a standby keeps its parent's link until it has called `forget_parent`, and the link
        // is shared by reference alone.
        fork::no_memory(unsafe { &*parent }, SLOT.load(Ordering::Relaxed));
    }
    let owner = OWNER.load(Ordering::Acquire);
    if owner >= 0 {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message is a constant of that length; send(2) is async-signal-safe.
        unsafe { libc::send(owner, EVENT.as_ptr().cast(), EVENT.len(), flags) };
    }
    // SAFETY: async-signal-safe; it does not return.
    unsafe { libc::_exit(CRASHED) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Event;

    #[test]
    fn the_event_is_one() -> Result<(), serde_json::Error> {
        let reason = Some(POOL_EMPTY.to_owned());
        assert_eq!(serde_json::to_vec(&Event::Exited { code: CRASHED, reason })?, EVENT);
        Ok(())
    }
}
