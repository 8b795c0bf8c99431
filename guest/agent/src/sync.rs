//! Locks. Every panic ends the program, so that none can be poisoned.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Takes a lock.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits to be notified, at most for `limit`.
pub fn wait<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    limit: Option<Duration>,
) -> MutexGuard<'a, T> {
    match limit {
        None => condition.wait(guard).unwrap_or_else(PoisonError::into_inner),
        Some(limit) => {
            condition.wait_timeout(guard, limit).unwrap_or_else(PoisonError::into_inner).0
        }
    }
}
