//! Fork requests: one in progress, the others wait in order.

use std::collections::VecDeque;

/// Why a fork request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too many wait already: `EBUSY`.
    Full,
    /// It was made to the parent of this instance: `EIO`.
    OfParent,
}

/// Requests of type `T`.
#[derive(Debug)]
pub struct Queue<T> {
    waiting: VecDeque<T>,
    capacity: usize,
    in_progress: bool,
    /// Requests that have been in progress so far.
    taken: u64,
    before_barrier: bool,
}

impl<T> Queue<T> {
    /// Room for `capacity` requests that wait, besides the one in progress.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            capacity,
            in_progress: false,
            taken: 0,
            before_barrier: false,
        }
    }

    /// Takes a request, or gives it back.
    ///
    /// # Errors
    ///
    /// See [`Refused`].
    pub fn submit(&mut self, request: T) -> Result<(), (T, Refused)> {
        if self.before_barrier {
            return Err((request, Refused::OfParent));
        }
        // A request that nobody works on yet takes the place of the one in progress.
        let room = self.capacity + usize::from(!self.in_progress);
        if self.waiting.len() >= room {
            return Err((request, Refused::Full));
        }
        self.waiting.push_back(request);
        Ok(())
    }

    /// The request that is in progress from now on, if none is yet.
    pub fn take(&mut self) -> Option<T> {
        if self.in_progress {
            return None;
        }
        let request = self.waiting.pop_front();
        self.in_progress = request.is_some();
        self.taken += u64::from(self.in_progress);
        request
    }

    /// The request in progress is done.
    pub fn done(&mut self) {
        self.in_progress = false;
    }

    /// Whether one is in progress, and which it is: each has a number of its own.
    #[must_use]
    pub fn in_progress(&self) -> Option<u64> {
        self.in_progress.then_some(self.taken)
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// This is another machine now: nothing is in progress, and what waited is given back.
    pub(super) fn became_child(&mut self, barrier: bool) -> Vec<T> {
        self.in_progress = false;
        self.before_barrier = barrier;
        self.waiting.drain(..).collect()
    }

    /// Whether what comes now was asked of the parent of this machine.
    #[must_use]
    pub fn is_of_parent(&self) -> bool {
        self.before_barrier
    }

    /// What comes from now on was asked of this machine.
    pub fn barrier_passed(&mut self) {
        self.before_barrier = false;
    }
}
