//! How long calls to KVM take, and why guests came back from it: this process counts its own.
//!
//! ```text
//!   a call ends ──> LATEST[next] ──what lay there before──> CELLS[role][bucket] += 1
//!   KVM_RUN ends ──────^                └─────────────────> EXITS[role][reason] += 1
//!                      └────────── counted() takes all ─────────^
//! ```
//!
//! Two readings of the clock and an exchange are 0.06 µs, an exit takes less. The kernel's side of it would
//! be two tracepoints of every system call, or two kprobes: a fork became 27 % slower by them, and an exit
//! 1.8 µs by a probe of it, so they are for looking at single forks (`runtime trace`). What a child counts
//! falls into a page that its standby has written to already, and has emptied last of all
//! ([`make_room`]): no page fault.
//!
//! `KVM_RUN` is no call here: its time is the guest's.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use ebpf_common::{BUCKETS, Cell, Metric, Role, Sample, bucket};
use ebpf_loader::{Counted, Histogram};

use crate::beacon;
use crate::sys::now_ns;

/// What is kept as it is: more than a child does until its first exit.
const KEPT: usize = 128;
/// Every [`Role`].
const ROLES: usize = Role::Young as usize + 1;

/// Reasons of exits; the last one stands for all that come after it.
const REASONS: usize = 256;
/// No reason: interrupted before there was one.
const INTERRUPTED: u64 = REASONS as u64 - 1;

/// The latest ones: [`Sample::word`]s, 0 where there is none.
struct Latest {
    next: AtomicU32,
    samples: [AtomicU64; KEPT],
}

static LATEST: Latest =
    Latest { next: AtomicU32::new(0), samples: [const { AtomicU64::new(0) }; KEPT] };

/// As `ebpf_common::Cell`.
struct Counter {
    count: AtomicU64,
    ns: AtomicU64,
}

/// All others. A page of it that nobody needs takes no memory.
static CELLS: [[Counter; BUCKETS as usize]; ROLES] = [const {
    [const { Counter { count: AtomicU64::new(0), ns: AtomicU64::new(0) } }; BUCKETS as usize]
}; ROLES];

static EXITS: [[AtomicU64; REASONS]; ROLES] =
    [const { [const { AtomicU64::new(0) }; REASONS] }; ROLES];

/// Makes a call, and counts how long it took.
pub(super) fn timed<T>(call: impl FnOnce() -> T) -> T {
    let begin = now_ns();
    let result = call();
    let end = now_ns();
    let value = end.saturating_sub(begin);
    keep(Sample { role: beacon::role_at(end), metric: Metric::Ioctl as u8, value }.word());
    result
}

/// Counts an end of `KVM_RUN`: its reason, if it has one.
pub(super) fn exited(reason: Option<u32>) {
    let value = reason.map_or(INTERRUPTED, |reason| u64::from(reason).min(INTERRUPTED));
    keep(Sample { role: beacon::role_now(), metric: Metric::Exits as u8, value }.word());
}

fn keep(word: u64) {
    let at = LATEST.next.fetch_add(1, Relaxed) as usize % KEPT;
    file(LATEST.samples[at].swap(word, Relaxed));
}

fn file(word: u64) {
    if word == 0 {
        return;
    }
    let Sample { role, metric, value } = Sample::from_word(word);
    let role = usize::from(role);
    if metric == Metric::Exits as u8 {
        let reason = usize::try_from(value).unwrap_or(REASONS);
        if let Some(count) = EXITS.get(role).and_then(|exits| exits.get(reason)) {
            count.fetch_add(1, Relaxed);
        }
    } else if let Some(counter) =
        CELLS.get(role).and_then(|cells| cells.get(usize::from(bucket(value))))
    {
        counter.count.fetch_add(1, Relaxed);
        counter.ns.fetch_add(value, Relaxed);
    }
}

/// Puts what is kept where it belongs.
pub fn make_room() {
    LATEST.samples.iter().for_each(|sample| file(sample.swap(0, Relaxed)));
}

/// Calls and exits of this process so far, by what it was when they ended.
#[must_use]
pub fn counted() -> Counted {
    make_room();
    let calls = CELLS.iter().map(|cells| {
        let cell = |it: &Counter| Cell { count: it.count.load(Relaxed), sum: it.ns.load(Relaxed) };
        (Metric::Ioctl, histogram(cells.iter().map(cell)))
    });
    let exits = EXITS.iter().map(|reasons| {
        let cell = |count: &AtomicU64| Cell { count: count.load(Relaxed), sum: 0 };
        (Metric::Exits, histogram(reasons.iter().map(cell)))
    });
    let of_roles = (0..).zip(calls).chain((0..).zip(exits));
    let mut counted = Counted::new();
    for (role, (metric, histogram)) in of_roles.filter(|(_, (_, it))| it.count() > 0) {
        if let Some(role) = Role::from_number(role) {
            counted.insert((role, metric), histogram);
        }
    }
    counted
}

fn histogram(cells: impl Iterator<Item = Cell>) -> Histogram {
    let mut histogram = Histogram::default();
    for (bucket, cell) in (0..).zip(cells).filter(|(_, cell)| cell.count > 0) {
        histogram.add(bucket, cell);
    }
    histogram
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
    fn exits_are_counted_by_their_reason() {
        // Other tests of this process may run guests, of which none has these reasons.
        let of = |reason: u16| -> u64 {
            let counted = counted();
            let exits = counted.iter().filter(|((_, metric), _)| *metric == Metric::Exits);
            let cells = exits.flat_map(|(_, histogram)| histogram.cells());
            cells.filter(|(it, ..)| *it == reason).map(|(.., cell)| cell.count).sum()
        };
        for _ in 0..300 {
            exited(Some(200));
        }
        exited(Some(201));
        exited(Some(u32::MAX));
        assert_eq!((of(200), of(201)), (300, 1));
        assert!(of(255) >= 1);
    }

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
