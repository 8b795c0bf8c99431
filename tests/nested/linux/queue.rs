//! Threads that fork at once, one more than may wait: who is answered, with what, and in which order.

use std::sync::OnceLock;
use std::sync::mpsc::channel;

use anyhow::{Context, Result, ensure};
use runtime::fork::{FAULT_DELAY, Step};
use runtime::proto::Request;
use uuid::Uuid;

use super::guest::{LONG, QUEUE, ZERO, told, two};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::threads_that_fork_at_once_read_their_own_child", own_child),
        ("libukp::forks_are_made_in_the_order_of_the_requests", in_order),
        ("libukp::as_many_as_configured_may_wait_and_the_next_is_ebusy", busy),
        ("libukp::requests_of_the_parent_are_eio_in_the_child", inherited),
    ]
}

/// More than are needed: the last one that asks is the first that is refused.
const MOST: usize = 10;

/// What the threads of one machine have read, by their numbers.
struct Told {
    read: Vec<String>,
    /// Threads whose write succeeded, in the order in which it returned.
    answered: Vec<usize>,
}

impl Told {
    fn of(said: &str) -> Result<Self> {
        let mut read = Vec::new();
        for (index, word) in told(said, "forks")?.split(' ').enumerate() {
            let (number, value) = word.split_once(':').context("a number")?;
            ensure!(number == index.to_string(), "{said}");
            read.push(value.to_owned());
        }
        let answered = told(said, "answered")?.split_whitespace().map(str::parse);
        Ok(Self { read, answered: answered.collect::<Result<_, _>>()? })
    }

    fn count(&self, value: &str) -> usize {
        self.read.iter().filter(|read| *read == value).count()
    }
}

struct Threads {
    parent: Told,
    /// By the thread that read its UUID in the parent.
    children: Vec<(usize, Uuid, Told)>,
}

fn threads() -> Result<&'static Threads> {
    static THREADS: OnceLock<Result<Threads, String>> = OnceLock::new();
    let happened = THREADS.get_or_init(|| all_fork().map_err(|error| format!("{error:#}")));
    happened.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn all_fork() -> Result<Threads> {
    let guest = two()?;
    let root = guest.root;
    // Arming is not to take that long too.
    guest.owner.ask(root, Request::Standbys { count: 1 })?;
    let slow = |step| Request::Fault { step, errno: FAULT_DELAY, delay_us: 8_000_000 };
    guest.owner.ask(root, slow(Some(Step::Take)))?;
    let (line, lines) = channel();
    let ended = guest.start(root, &format!("ukp-check forks {MOST}"), line);
    // The first fork is under way until all have asked; those behind it are not to take as long.
    let asked = ended.as_ref().ok().map(|_| lines.recv_timeout(LONG));
    guest.owner.ask(root, slow(None))?;
    let asked = asked.context("it did not begin")??;
    ensure!(asked.starts_with("@asked "), "{asked}");
    let output = ended?.recv_timeout(LONG * 3)??;
    ensure!(output.code == 0, "{output:?}");
    let parent = Told::of(&output.out)?;
    let mut children = Vec::new();
    for (thread, read) in parent.read.iter().enumerate() {
        let Ok(uuid) = read.parse::<Uuid>() else { continue };
        let ended = guest.end_of(uuid).with_context(|| format!("{uuid}: {}", output.out));
        let (code, console) = ended?;
        ensure!(code == 0, "{uuid} ended with {code}: {console}");
        children.push((thread, uuid, Told::of(&console)?));
    }
    Ok(Threads { parent, children })
}

/// The thread that read a UUID in the parent is the one that was answered last in that child.
fn own_child() -> Result<()> {
    let Threads { parent, children } = threads()?;
    let mut uuids: Vec<_> = children.iter().map(|(_, uuid, _)| uuid).collect();
    uuids.sort_unstable();
    uuids.dedup();
    ensure!(uuids.len() == children.len() && uuids.len() > QUEUE, "{:?}", parent.read);
    for (thread, uuid, told) in children {
        ensure!(told.answered.last() == Some(thread), "{uuid} of {thread}: {:?}", told.answered);
        ensure!(told.read[*thread] == ZERO, "{uuid} of {thread} reads {:?}", told.read);
        // Nobody has forked there.
        let known = [ZERO, "EIO", "EBUSY"].map(|value| told.count(value));
        ensure!(known.iter().sum::<usize>() == told.read.len(), "{uuid} reads {:?}", told.read);
    }
    Ok(())
}

/// Each thread asked when the one before it waited.
fn in_order() -> Result<()> {
    let Threads { parent, children } = threads()?;
    for (number, (thread, uuid, told)) in children.iter().enumerate() {
        let (answered, own) = (&told.answered, number + 1);
        ensure!(*thread == number, "thread {thread} has the fork {number}");
        ensure!(answered.len() == own && answered.is_sorted(), "{uuid}: {answered:?}");
    }
    ensure!(parent.answered.len() == children.len(), "{:?}", parent.answered);
    Ok(())
}

/// The first of them was under way.
fn busy() -> Result<()> {
    let Threads { parent, .. } = threads()?;
    ensure!(parent.count("EBUSY") == 1, "{:?}", parent.read);
    ensure!(parent.read.last().is_some_and(|last| last == "EBUSY"), "{:?}", parent.read);
    ensure!(parent.read.len() == 1 + QUEUE + 1, "{} asked: {:?}", parent.read.len(), parent.read);
    Ok(())
}

/// In the child of each fork those behind it were waiting.
fn inherited() -> Result<()> {
    let Threads { parent, children } = threads()?;
    let waiting = parent.read.len() - 1;
    for (number, (_, uuid, told)) in children.iter().enumerate() {
        let failed = told.count("EIO");
        ensure!(failed == waiting - (number + 1), "{uuid}, fork {number}: {:?}", told.read);
    }
    Ok(())
}
