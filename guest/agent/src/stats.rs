//! What `ukp status` shows.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Counts and times of this instance's forks, its parent's not among them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// UUID of this instance; nil until the host told it.
    pub uuid: Uuid,
    /// Its generation; 0 if it is nobody's child.
    pub generation: u64,
    /// Forks that gave a child.
    pub forks: u64,
    /// Forks that failed.
    pub failed: u64,
    /// Fork requests that wait.
    pub queued: usize,
    /// Children under `vm/`.
    pub children: usize,
    /// Of the last fork: from the doorbell to its answer, in the parent, in microseconds.
    pub last_fork_us: Option<u64>,
    /// In a child: from the answer to the reply to the writer, in microseconds.
    pub birth_us: Option<u64>,
    /// Of that, the time in which entropy, clock, generation and names were renewed.
    pub renew_us: Option<u64>,
}
