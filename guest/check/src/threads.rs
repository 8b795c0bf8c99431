//! Threads that fork at the same time.

use std::sync::Barrier;

use anyhow::Result;

use crate::say::{self, ZERO, fork, shown};

/// Each thread forks once; says what each of them read, in alphabetic order.
pub fn forks(threads: usize) -> Result<()> {
    let start = Barrier::new(threads);
    let mut read: Vec<String> = std::thread::scope(|scope| {
        let forking = |_| {
            scope.spawn(|| {
                start.wait();
                shown(fork())
            })
        };
        let all: Vec<_> = (0..threads).map(forking).collect();
        all.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
    });
    read.sort();
    let found = [("forks", read.join(" "))];
    if read.iter().any(|read| read == ZERO) { say::in_child(&found) } else { say::here(&found) }
}
