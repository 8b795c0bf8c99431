//! System calls that `std` does not wrap, each with an error that names the call.

mod memory;
mod process;
mod socket;
mod thread;

use std::io;

pub use memory::{
    available_bytes, copy_from_twin, populate_program, populate_stack, unmap_pages,
    warm_free_memory,
};
pub use process::{
    Forked, adopt, close_all_but, cpu_ns, cpu_ns_of, die_with_parent, fork, minor_faults,
    open_to_its_own, reap_children_automatically, set_process_name,
};
pub use socket::{receive, receive_whole, send, socket_pair};
pub use thread::{
    CpuSet, KickTimer, Policy, affinity, all_affinity, current_cpu, futex_wait, futex_wake,
    install_kick_handler, kick, kick_signal, limit_realtime, renew_realtime_limit, set_affinity,
    set_affinity_of, set_affinity_to, set_policy, thread_id,
};

/// A system call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct SysError {
    /// Name of the call, with its operation where one call has many.
    pub call: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl SysError {
    /// The error of `call` from `errno`.
    #[must_use]
    pub fn last(call: &'static str) -> Self {
        Self { call, source: io::Error::last_os_error() }
    }

    /// Wraps any error that is an errno.
    pub fn new(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self { call, source: errno.into() }
    }

    /// The errno, `EIO` if there is none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(libc::EIO)
    }
}

/// Monotonic clock in nanoseconds; the same in all processes of this machine.
#[must_use]
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both parts are non-negative and far from the limits until the year 2500.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Wall clock in nanoseconds since the epoch.
#[must_use]
pub fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// An error and everything below it, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
