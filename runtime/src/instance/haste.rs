//! Real-time priority for a vCPU from its doorbell until it has left the guest again.
//!
//! Around a fork much else wants to run: the control thread that makes the next standby, the end of
//! the last child. Each of them may take the processor for a whole time slice of milliseconds, while
//! all vCPUs of the parent are stopped. The guest does not keep the priority: its next exit gives it
//! back, and the kernel brings that exit about if nothing else does ([`sys::limit_realtime`]).

use crate::sys::{self, Policy};

/// How long a vCPU may run with priority.
const LIMIT_US: u64 = 2_000;

/// The priority of one vCPU thread.
#[derive(Debug, Default)]
pub(super) struct Haste {
    on: bool,
}

impl Haste {
    /// Takes it, where it is allowed.
    pub(super) fn begin(&mut self) {
        self.on = take();
    }

    /// Before the guest is entered: it has the whole of the limit.
    pub(super) fn renew(&self) {
        if self.on {
            renew();
        }
    }

    /// Gives it back.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.on) {
            give_back();
        }
    }
}

/// Once per process, when it has the handler of the kick: how long the priority lasts.
pub(super) fn prepare() {
    sys::limit_realtime(LIMIT_US);
}

/// Puts the calling thread under real-time priority, if that is allowed.
pub(super) fn take() -> bool {
    sys::set_policy(Policy::Realtime).is_ok()
}

/// Before a thread that has the priority enters the guest.
pub(super) fn renew() {
    sys::renew_realtime_limit(LIMIT_US);
}

/// Puts it back.
pub(super) fn give_back() {
    sys::set_policy(Policy::Normal).unwrap_or(());
    sys::limit_realtime(LIMIT_US);
}
