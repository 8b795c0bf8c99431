//! How long calls to KVM take: this process times its own.
//!
//! ```text
//!   a call ends ──> LATEST[next] ──what lay there before──> CELLS[role][bucket] += 1
//!                      └────────── counted() takes all ─────────^
//! ```
//!
//! Two readings of the clock and an exchange are 0.06 µs. The kernel's side of it would be two
//! tracepoints of every system call, or two kprobes: a fork became 27 % slower by them, so they are
//! for looking at single forks (`runtime trace`). A child's calls fall into a page that its standby
//! has written to already: no page fault.
//!
//! `KVM_RUN` is no call here: its time is the guest's, and its end is an exit.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use ebpf_common::{BUCKETS, Cell, Metric, Role, Sample, bucket};
use ebpf_loader::{Counted, Histogram};

use crate::beacon;
use crate::sys::now_ns;

/// Calls that are kept as they are: more than a standby makes until it is an instance.
const KEPT: usize = 128;
/// Every [`Role`].
const ROLES: usize = Role::Young as usize + 1;

/// The latest calls: [`Sample::word`]s, 0 where there is none.
struct Latest {
    next: AtomicU32,
    calls: [AtomicU64; KEPT],
}

static LATEST: Latest =
    Latest { next: AtomicU32::new(0), calls: [const { AtomicU64::new(0) }; KEPT] };

/// As `ebpf_common::Cell`.
struct Counter {
    count: AtomicU64,
    ns: AtomicU64,
}

/// All others. A page of it that nobody needs takes no memory.
static CELLS: [[Counter; BUCKETS as usize]; ROLES] = [const {
    [const { Counter { count: AtomicU64::new(0), ns: AtomicU64::new(0) } }; BUCKETS as usize]
}; ROLES];

/// Makes a call, and counts how long it took.
pub(super) fn timed<T>(call: impl FnOnce() -> T) -> T {
    let begin = now_ns();
    let result = call();
    let end = now_ns();
    let value = end.saturating_sub(begin);
    keep(Sample { role: beacon::role_at(end), metric: Metric::Ioctl as u8, value }.word());
    result
}

fn keep(word: u64) {
    let at = LATEST.next.fetch_add(1, Relaxed) as usize % KEPT;
    file(LATEST.calls[at].swap(word, Relaxed));
}

fn file(word: u64) {
    if word == 0 {
        return;
    }
    let Sample { role, value, .. } = Sample::from_word(word);
    let counter =
        CELLS.get(usize::from(role)).and_then(|cells| cells.get(usize::from(bucket(value))));
    if let Some(counter) = counter {
        counter.count.fetch_add(1, Relaxed);
        counter.ns.fetch_add(value, Relaxed);
    }
}

/// The calls of this process so far, by what it was when it made them.
#[must_use]
pub fn counted() -> Counted {
    LATEST.calls.iter().for_each(|call| file(call.swap(0, Relaxed)));
    let mut counted = Counted::new();
    for (role, cells) in (0..).zip(&CELLS) {
        let mut histogram = Histogram::default();
        for (bucket, counter) in (0..).zip(cells) {
            let (count, sum) = (counter.count.load(Relaxed), counter.ns.load(Relaxed));
            if count > 0 {
                histogram.add(bucket, Cell { count, sum });
            }
        }
        if let Some(role) = Role::from_number(role).filter(|_| histogram.count() > 0) {
            counted.insert((role, Metric::Ioctl), histogram);
        }
    }
    counted
}

/// What counting a call takes, in ns: the mean of `calls` that do nothing. They are counted.
#[must_use]
pub fn cost_ns(calls: u32) -> u64 {
    let begin = now_ns();
    (0..calls).for_each(|_| timed(|| ()));
    (now_ns() - begin) / u64::from(calls.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_lost_or_counted_twice() {
        let ours = |counted: &Counted| {
            counted
                .get(&(Role::Unknown, Metric::Ioctl))
                .map_or((0, 0), |histogram| (histogram.count(), histogram.sum_ns()))
        };
        let before = ours(&counted());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    for _ in 0..10_000 {
                        timed(std::hint::spin_loop);
                    }
                })
            })
            .collect();
        // Whoever reads meanwhile takes nothing away.
        while threads.iter().any(|thread| !thread.is_finished()) {
            assert!(ours(&counted()).0 >= before.0);
        }
        let after = ours(&counted());
        // Other tests of this process may call KVM.
        assert!(after.0 >= before.0 + 40_000, "{before:?}, {after:?}");
        assert!(after.1 > before.1, "{before:?}, {after:?}");
    }
}
