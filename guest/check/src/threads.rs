//! Threads that fork at the same time.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, Pid, sched_setaffinity};

use crate::say::{self, ZERO, again, libukp, shown};

/// How long a thread may take to ask.
const LIMIT: Duration = Duration::from_secs(30);

/// Who was answered so far.
#[derive(Default)]
struct Answers {
    /// Threads whose write succeeded, in the order in which it returned.
    succeeded: Vec<usize>,
    failed: usize,
    /// Threads that will be answered; not known before the last of them was started.
    expected: Option<usize>,
}

impl Answers {
    fn answered(&self) -> usize {
        self.succeeded.len() + self.failed
    }
}

#[derive(Default)]
struct Shared {
    answers: Mutex<Answers>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread after the other forks, each by a file of its own, while the first fork takes its time:
/// until one is refused, or there are `most`. All of them read when the last one was answered.
///
/// ```text
///  @asked N        so many asked
///  @forks I:READ … what each thread read, or the error of its write
///  @answered I …   whose writes succeeded, in the order in which they returned
/// ```
pub fn forks(most: usize) -> Result<()> {
    apart()?;
    let shared = Shared::default();
    let read = std::thread::scope(|scope| -> Result<Vec<String>> {
        let mut all = Vec::new();
        let mut asked = Ok(());
        for index in 0..most {
            let file = OpenOptions::new().read(true).write(true).open(libukp("fork"))?;
            let tid = Arc::new(AtomicI32::new(0));
            let (shared, own) = (&shared, tid.clone());
            all.push(scope.spawn(move || one(shared, index, &file, &own)));
            asked = waits_or_is_answered(shared, index, &tid);
            if asked.is_err() || shared.lock().failed > 0 {
                break;
            }
        }
        say::here(&[("asked", all.len().to_string())])?;
        shared.lock().expected = Some(all.len());
        shared.changed.notify_all();
        let read = all.into_iter().map(|thread| thread.join().unwrap_or_default()).collect();
        asked.map(|()| read)
    })?;
    let answered: Vec<String> = shared.lock().succeeded.iter().map(usize::to_string).collect();
    let by_index: Vec<String> =
        read.iter().enumerate().map(|(index, read)| format!("{index}:{read}")).collect();
    let found = [("forks", by_index.join(" ")), ("answered", answered.join(" "))];
    if read.iter().any(|read| read == ZERO) { say::in_child(&found) } else { say::here(&found) }
}

/// Puts the agent's thread that forks on the first processor, which stands still when a test makes a
/// fork slow, and its others and this program on the second.
fn apart() -> Result<()> {
    let (mut first, mut second) = (CpuSet::new(), CpuSet::new());
    first.set(0);
    second.set(1);
    for thread in std::fs::read_dir("/proc/1/task")? {
        let thread = thread?;
        let forks = std::fs::read_to_string(thread.path().join("comm"))?.trim() == "ukp-fork";
        let number = thread.file_name().to_string_lossy().parse().context("a thread")?;
        sched_setaffinity(Pid::from_raw(number), if forks { &first } else { &second })?;
    }
    Ok(sched_setaffinity(None, &second)?)
}

/// Asks, waits until everybody was answered, reads.
fn one(shared: &Shared, index: usize, mut file: &File, tid: &AtomicI32) -> String {
    tid.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::SeqCst);
    let written = file.write_all(b"1");
    let mut answers = shared.lock();
    match &written {
        Ok(()) => answers.succeeded.push(index),
        Err(_) => answers.failed += 1,
    }
    shared.changed.notify_all();
    let waits = |answers: &mut Answers| answers.expected.is_none_or(|all| answers.answered() < all);
    drop(shared.changed.wait_while(answers, waits).unwrap_or_else(PoisonError::into_inner));
    shown(written.and_then(|()| again(file)))
}

/// The kernel has the thread's request, and passes on the next one's behind it; or it is answered.
fn waits_or_is_answered(shared: &Shared, index: usize, tid: &AtomicI32) -> Result<()> {
    let begin = Instant::now();
    loop {
        let answers = shared.lock();
        if answers.failed > 0 || answers.succeeded.contains(&index) {
            return Ok(());
        }
        drop(answers);
        let tid = tid.load(Ordering::SeqCst);
        if tid != 0 && waits_for_fuse(tid)? {
            return Ok(());
        }
        ensure!(begin.elapsed() < LIMIT, "thread {index} has not asked");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn waits_for_fuse(tid: i32) -> Result<bool> {
    match std::fs::read_to_string(format!("/proc/self/task/{tid}/wchan")) {
        Ok(place) => Ok(place.contains("request_wait_answer") || place.contains("fuse")),
        // It has ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}
