//! The fork path in a trace: which calls belong to one fork, and to whom.
//!
//! ```text
//!  vCPU thread of the parent          leader of a standby
//!    KVM_RUN (the doorbell)             futex wait without limit  <- asleep
//!  ┌ …                                  │
//!  │ futex wake of that word ---------> ┴
//!  │ …                                ┌ …
//!  └ …                                │ …
//!    KVM_RUN (guest again)            └ KVM_RUN (first run, until it returns)
//! ```
//!
//! The marker is the wake: the thread that ran the guest wakes a thread that becomes a child. It
//! holds for every way to fork in which standbys sleep; nothing else of the engine is assumed.
//! Calls that depend on who was faster are counted apart, see [`Counts::timing`].

use std::collections::{BTreeMap, BTreeSet};

use super::heap;
use super::trace::Call;

/// Names of the calls that depend on timing: waits with a time limit (a standby that was faster than
/// the parent and spun in vain), wakes of such a sleeper, locks that were found taken, and, in
/// children, entries into KVM that return at once (a standby keeps it warm while it waits).
pub const TIMING: [&str; 4] = [LIMITED, SLEEPER, LOCK, AT_ONCE];
const LIMITED: &str = "futex wait with time limit";
const SLEEPER: &str = "futex wake of a sleeper";
const LOCK: &str = "futex of a lock";
const AT_ONCE: &str = "ioctl KVM_RUN, at once";

/// Calls by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that every fork makes.
    pub exact: BTreeMap<String, u64>,
    /// Those that depend on timing, see [`TIMING`].
    pub timing: BTreeMap<String, u64>,
}

/// The calls of one fork.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// The parent's vCPU thread, between the doorbell and the guest.
    pub parent: Counts,
    /// All vCPU threads of all children, from waking up to the end of their first run.
    pub children: Counts,
}

/// What a trace lacks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The parent's first thread never woke the child's.
    #[error("process {parent} did not wake {child} between two runs of its guest")]
    NoWake {
        /// Process of the parent.
        parent: i32,
        /// Process of the child.
        child: i32,
    },
    /// A thread did not come to an end of its part of the path.
    #[error("thread {tid} did not run its guest after the fork")]
    NoEnd {
        /// The thread.
        tid: i32,
    },
}

/// A trace, sorted for looking up.
#[derive(Debug)]
pub struct Threads<'a> {
    calls: BTreeMap<i32, Vec<&'a Call>>,
    /// Threads of a process besides its first.
    started: BTreeMap<i32, Vec<i32>>,
    /// Words that threads slept on for a limited time.
    slept_on: BTreeMap<&'a str, BTreeSet<i32>>,
}

/// Half-open range of lines.
type Span = (usize, usize);

impl<'a> Threads<'a> {
    /// Sorts the calls by thread.
    #[must_use]
    pub fn new(calls: &'a [Call]) -> Self {
        let mut by_thread: BTreeMap<i32, Vec<&Call>> = BTreeMap::new();
        let mut started: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        let mut slept_on: BTreeMap<&str, BTreeSet<i32>> = BTreeMap::new();
        for call in calls {
            if call.futex_wait() == Some(false) {
                slept_on.entry(call.arg(0)).or_default().insert(call.tid);
            }
            by_thread.entry(call.tid).or_default().push(call);
            if call.name.starts_with("clone")
                && call.args.contains("CLONE_THREAD")
                && let Some(tid) = call.result.split(' ').next().and_then(|tid| tid.parse().ok())
            {
                started.entry(call.tid).or_default().push(tid);
            }
        }
        Self { calls: by_thread, started, slept_on }
    }

    fn of(&self, tid: i32) -> impl DoubleEndedIterator<Item = &'a Call> + '_ {
        self.calls.get(&tid).into_iter().flatten().copied()
    }

    /// The calls of the fork in which the instance `parent` made `children` (process ids).
    ///
    /// # Errors
    ///
    /// If the trace does not show such a fork from its beginning to its end.
    pub fn fork(&self, parent: i32, children: &[i32]) -> Result<Path, PathError> {
        let mut first_wake = usize::MAX;
        let mut spans: Vec<(i32, Span)> = Vec::new();
        for child in children {
            let (wake, sleep) =
                self.wake(parent, *child).ok_or(PathError::NoWake { parent, child: *child })?;
            first_wake = first_wake.min(wake.begin);
            let awake = sleep.end.unwrap_or(sleep.begin);
            spans.push((*child, (awake, self.first_run(*child, awake)?)));
            for tid in self.started.get(child).into_iter().flatten() {
                // Of the other threads those of vCPUs. Of a killed thread strace may tell a call that
                // another one made, without an end.
                if self.of(*tid).any(|call| call.is_ioctl("KVM_RUN") && call.end.is_some()) {
                    spans.push((*tid, (wake.begin, self.first_run(*tid, wake.begin)?)));
                }
            }
        }
        let doorbell = self.of(parent).filter(|call| call.is_guest_run());
        let doorbell = doorbell.filter_map(|call| call.end).take_while(|end| *end < first_wake);
        let begin = doorbell.last().ok_or(PathError::NoEnd { tid: parent })?;
        let end = self
            .of(parent)
            .find(|call| call.begin > first_wake && call.is_guest_run())
            .ok_or(PathError::NoEnd { tid: parent })?
            .begin;
        let mut path = Path::default();
        for call in self.within(parent, (begin, end)) {
            // Whether somebody sleeps is asked before the wake: it may be for one who just woke up.
            let sleepers = self.slept_on.get(call.arg(0)).into_iter().flatten();
            let asked = call.is_futex_wake() && sleepers.into_iter().any(|tid| *tid != parent);
            path.parent.add(call, if asked { Some(SLEEPER) } else { None });
        }
        for (tid, span) in spans {
            for call in self.within(tid, span) {
                let at_once = call.is_ioctl("KVM_RUN") && !call.is_guest_run();
                path.children.add(call, at_once.then_some(AT_ONCE));
            }
        }
        Ok(path)
    }

    /// The wake that ended the sleep of a child's leader, and that sleep.
    fn wake(&self, parent: i32, child: i32) -> Option<(&'a Call, &'a Call)> {
        let sleeps: Vec<&Call> =
            self.of(child).filter(|call| call.futex_wait() == Some(true)).collect();
        self.of(parent).filter(|call| call.is_futex_wake()).find_map(|wake| {
            let ends = |sleep: &&&Call| {
                sleep.arg(0) == wake.arg(0)
                    && sleep.begin < wake.begin
                    && sleep.end.is_some_and(|end| end > wake.begin)
            };
            sleeps.iter().find(ends).map(|sleep| (wake, *sleep))
        })
    }

    /// End of the first run of the guest that began after a line.
    fn first_run(&self, tid: i32, after: usize) -> Result<usize, PathError> {
        let mut runs = self.of(tid).filter(|call| call.begin > after && call.is_guest_run());
        runs.next().and_then(|run| run.end).map(|end| end + 1).ok_or(PathError::NoEnd { tid })
    }

    fn within(&self, tid: i32, (begin, end): Span) -> impl Iterator<Item = &'a Call> + '_ {
        self.of(tid).filter(move |call| call.begin > begin && call.begin < end)
    }
}

impl Counts {
    /// Counts a call, under the name `timing` if it depends on that.
    fn add(&mut self, call: &Call, timing: Option<&str>) {
        let marks = || call.arg(0) == format!("{:#x}", heap::MARK);
        let (exact, name) = match (call.name.as_str(), call.futex_wait()) {
            _ if timing.is_some() => (false, timing.unwrap_or_default().to_owned()),
            ("ioctl", _) => (true, format!("ioctl {}", call.arg(1))),
            ("madvise", _) if marks() => (true, "heap allocation".to_owned()),
            (_, Some(true)) => (true, "futex wait".to_owned()),
            (_, Some(false)) => (false, LIMITED.to_owned()),
            ("futex", None) if call.is_futex_wake() => (true, "futex wake".to_owned()),
            ("futex", None) => (false, LOCK.to_owned()),
            (name, _) => (true, name.to_owned()),
        };
        let counts = if exact { &mut self.exact } else { &mut self.timing };
        *counts.entry(name).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::parse;
    use super::*;

    /// Process 10 forks 20, whose second vCPU is thread 22.
    const TRACE: &str = "\
20 clone3({flags=CLONE_VM|CLONE_THREAD, stack=0x1}, 88) = 22
20 clone3({flags=CLONE_VM|CLONE_THREAD, stack=0x2}, 88) = 23
22 ioctl(13, KVM_RUN, 0) = 0
22 futex(0x900, FUTEX_WAIT, 0, NULL <unfinished ...>
20 ioctl(12, KVM_RUN, 0) = 0
20 futex(0x700, FUTEX_WAIT, 2, NULL <unfinished ...>
11 futex(0x700, FUTEX_WAKE, 2147483647) = 1
20 <... futex resumed>) = 0
20 futex(0x700, FUTEX_WAIT, 2, NULL <unfinished ...>
10 ioctl(11, KVM_GET_XCRS, 0x1) = 0
10 ioctl(11, KVM_RUN, 0) = 0
10 madvise(0xa110c000, 0, MADV_NORMAL) = 0
10 futex(0x55, FUTEX_WAIT_BITSET_PRIVATE, 2, NULL, FUTEX_BITSET_MATCH_ANY) = 0
10 futex(0x700, FUTEX_WAKE, 2147483647 <unfinished ...>
20 <... futex resumed>) = 0
10 <... futex resumed>) = 1
20 futex(0x900, FUTEX_WAKE, 2147483647) = 1
22 <... futex resumed>) = 0
20 futex(0x708, FUTEX_WAIT, 5, {tv_sec=0, tv_nsec=10000000} <unfinished ...>
10 ioctl(11, KVM_RUN, 0) = -1 EINTR (Interrupted system call)
10 ioctl(11, KVM_GET_MSRS, 0x1) = 39
10 futex(0x708, FUTEX_WAKE, 2147483647) = 1
20 <... futex resumed>) = 0
10 futex(0x70c, FUTEX_WAKE, 2147483647) = 0
10 ioctl(11, KVM_RUN <unfinished ...>
20 ioctl(12, KVM_RUN, 0) = 0
20 getrusage(RUSAGE_SELF, {}) = 0
10 <... ioctl resumed>, 0) = 0
22 ioctl(13, KVM_SET_MSRS, 0x1) = 2
22 ioctl(13, KVM_RUN, 0) = 0
23 ioctl(13, KVM_RUN <unfinished ...>
23 +++ killed by SIGKILL +++
";

    #[test]
    fn the_calls_of_a_fork_are_found() {
        let calls = parse(TRACE);
        let path = Threads::new(&calls).fork(10, &[20]).unwrap();
        let list = |counts: &BTreeMap<String, u64>| {
            counts.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>()
        };
        assert_eq!(
            list(&path.parent.exact),
            ["futex wake 2", "heap allocation 1", "ioctl KVM_GET_MSRS 1", "ioctl KVM_RUN 1"]
        );
        assert_eq!(list(&path.parent.timing), ["futex of a lock 1", "futex wake of a sleeper 1"]);
        assert_eq!(
            list(&path.children.exact),
            ["futex wake 1", "ioctl KVM_RUN 2", "ioctl KVM_SET_MSRS 1"]
        );
        assert_eq!(list(&path.children.timing), ["futex wait with time limit 1"]);
    }

    #[test]
    fn what_is_not_there_is_said() {
        let calls = parse(TRACE);
        let threads = Threads::new(&calls);
        assert_eq!(threads.fork(10, &[22]), Err(PathError::NoWake { parent: 10, child: 22 }));
        let cut: Vec<&str> = TRACE.lines().take(26).collect();
        let calls = parse(&cut.join("\n"));
        assert_eq!(Threads::new(&calls).fork(10, &[20]), Err(PathError::NoEnd { tid: 22 }));
    }
}
