//! A thread that others do not get in the way of.
#![expect(unsafe_code, reason = "rustix and nix have no function for scheduling policies")]

use std::io;

/// Gives this thread the lowest real-time priority: it runs before everything that has none. What it
/// starts does not inherit that.
///
/// # Errors
///
/// The kernel refuses: this is not root.
pub fn before_others() -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 is the calling thread; the parameter is complete and lives until the call returns.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const priority) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
