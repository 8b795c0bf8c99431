//! The housekeeper: time limits, retention, and signals to those who wait.

use std::time::Duration;

use fuser::{Errno, PollNotifier};

use super::questions::Again;
use super::service::{Inner, Service, Waiter};
use crate::processes::{Proc, since_boot};
use crate::sync::wait;

/// How often it is looked whether somebody who waits has got a signal.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(200);

impl Service {
    /// Looks after time limits, retention and signals until the agent ends. Sleeps while there is
    /// nothing to look after: a guest that does nothing should do nothing.
    pub fn keep_house(&self) {
        let mut inner = self.lock();
        while !inner.closed {
            let now = since_boot();
            let interrupted = inner.take_interrupted();
            let late = inner.take_late(now);
            let polls = inner.expire(now);
            let again = inner.take_again(now);
            let quiet = interrupted.is_empty() && late.is_empty();
            if !(quiet && polls.is_empty() && again.is_empty()) {
                drop(inner);
                for (what, child) in again {
                    match what {
                        Again::Wait(number) => self.ask_for_end(number, child),
                        Again::Read(id) => self.ask_for_read(id, child),
                    }
                }
                for waiter in interrupted {
                    waiter.reply.error(Errno::EINTR);
                }
                for asked in late {
                    asked.reply.error(Errno::EIO);
                }
                notify(polls);
                inner = self.lock();
                continue;
            }
            let limit = inner.next_look(now);
            inner = wait(&self.tick, inner, limit);
        }
    }
}

impl Inner {
    pub(super) fn take_polls(&mut self, child: u32) -> Vec<PollNotifier> {
        let of_child = self.polls.extract_if(.., |_, (of, _)| *of == child);
        of_child.map(|(_, (_, notifier))| notifier).collect()
    }

    /// The kernel tells of signals (`FUSE_INTERRUPT`), but the FUSE library does not pass it on, and
    /// who waits for an answer of ours cannot even be killed. So it is looked after.
    fn take_interrupted(&mut self) -> Vec<Waiter> {
        let interrupted = |waiter: &mut Waiter| Proc.is_interrupted(waiter.tid);
        let mut all: Vec<Waiter> = self.waiters.extract_if(.., interrupted).collect();
        all.extend(self.in_clones.extract_if(.., interrupted));
        all
    }

    fn expire(&mut self, now: Duration) -> Vec<PollNotifier> {
        self.machine.children.expire(now);
        let children = &self.machine.children;
        let gone = self.polls.extract_if(.., |_, (child, _)| children.get(*child).is_err());
        gone.map(|(_, (_, notifier))| notifier).collect()
    }

    fn next_look(&self, now: Duration) -> Option<Duration> {
        let somebody = !self.waiters.is_empty() || !self.in_clones.is_empty();
        let signals = somebody.then_some(SIGNAL_INTERVAL);
        let answers = self.asked.values().map(|asked| asked.limit).min();
        let again = self.again.iter().map(|(at, _)| *at).min();
        let times = [answers, again, self.machine.children.next_expiry()].into_iter().flatten();
        signals.into_iter().chain(times.map(|time| time.saturating_sub(now))).min()
    }
}

/// Makes those who poll look again. The kernel may have forgotten them, which is as good.
pub(super) fn notify(polls: impl IntoIterator<Item = PollNotifier>) {
    for notifier in polls {
        drop(notifier.notify());
    }
}
