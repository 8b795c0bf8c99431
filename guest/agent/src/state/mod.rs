//! What `/uk/libukp` means, apart from files, ports and clocks.
//!
//! ```text
//!             submit                next                parent: forked
//!  write ──> waiting (bounded) ──> in progress ──┬──> record for the reader, a child in vm/
//!              │ full: EBUSY                     ├──> failed: EIO
//!              │                                 └──> became a child
//!              └───────── EIO to all that wait <───────────┘  vm/ empty, no records, next epoch;
//!                                                             EIO until the barrier has passed
//! ```
//!
//! After a fork the child's kernel still holds requests that were made to the parent and that the
//! agent had not read. The **barrier** is a request of the agent itself, behind all of them: what
//! comes before it belonged to the parent.

mod children;
mod queue;
mod readers;

pub use children::{Child, Children, Constants, Gone, NUMBER_BITS, Progress};
pub use queue::{Queue, Refused};
pub use readers::{ForkValue, Process, Processes, Readers};

use std::time::Duration;

use uuid::Uuid;

/// Everything that `/uk/libukp` has to remember. `T` is a fork request.
#[derive(Debug)]
pub struct Machine<T> {
    /// Fork requests.
    pub queue: Queue<T>,
    /// Who forked whom.
    pub readers: Readers,
    /// Children of this instance.
    pub children: Children,
    /// Scale-to-zero is off while this is above zero.
    pub scale_to_zero_disable: i64,
    own: Uuid,
    generation: u64,
    epoch: u64,
}

impl<T> Machine<T> {
    /// A machine that nobody forked, with room for `queue` waiting forks, that keeps children that
    /// have stopped for `retention`.
    #[must_use]
    pub fn new(queue: usize, retention: Duration) -> Self {
        Self {
            queue: Queue::new(queue),
            readers: Readers::default(),
            children: Children::new(retention),
            scale_to_zero_disable: 0,
            own: Uuid::nil(),
            generation: 0,
            epoch: 0,
        }
    }

    /// UUID of this instance, nil while unknown.
    #[must_use]
    pub fn own(&self) -> Uuid {
        self.own
    }

    /// Generation of this instance, 0 in one that is nobody's child.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How often this machine became another one.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The host says who this instance is. Returns whether that agrees with what is known.
    pub fn welcomed(&mut self, own: Uuid) -> bool {
        if self.own.is_nil() {
            self.own = own;
        }
        // What is told first stays: the doorbell, which knows best, tells before a child goes on.
        self.own == own
    }

    /// The fork in progress is done, and this is the parent. Returns the child's number.
    pub fn forked(&mut self, tid: u32, tgid: u32, now: Duration, child: Uuid) -> u32 {
        self.queue.done();
        self.readers.record(tid, tgid, now, child);
        self.children.add(child, now)
    }

    /// The fork in progress, which the thread `tid` asked for, is done, and this is the child. Returns the requests that belonged to
    /// the parent. Until [`Queue::barrier_passed`] further ones are refused, if there is a barrier.
    pub fn became_child(
        &mut self,
        (own, generation): (Uuid, u64),
        (tid, tgid): (u32, u32),
        now: Duration,
        barrier: bool,
    ) -> Vec<T> {
        self.own = own;
        self.generation = generation;
        self.epoch += 1;
        self.readers.became_child(tid, tgid, now);
        self.children.clear();
        self.queue.became_child(barrier)
    }

    /// Writes to `scale_to_zero_disable`: `=N`, `+` or `-`. Returns whether it was one of them.
    pub fn set_scale_to_zero(&mut self, text: &str) -> bool {
        let value = match text.trim_end() {
            "+" => self.scale_to_zero_disable.checked_add(1),
            "-" => self.scale_to_zero_disable.checked_sub(1).filter(|value| *value >= 0),
            text => text
                .strip_prefix('=')
                .and_then(|number| number.parse().ok())
                .filter(|value: &i64| *value >= 0),
        };
        self.scale_to_zero_disable = value.unwrap_or(self.scale_to_zero_disable);
        value.is_some()
    }
}

#[cfg(test)]
mod tests;
