//! What needs system calls that no shell makes, or two processors: `ukp-check` makes them.

use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use runtime::fork::{FAULT_DELAY, Step};
use runtime::proto::Request;
use uuid::Uuid;

use super::guest::{Guest, LONG, ZERO, all_told, shell, told, two};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::threads_that_fork_at_once_read_their_own_child", own_child),
        ("libukp::a_full_queue_is_ebusy", busy),
        ("libukp::requests_of_the_parent_are_eio_in_the_child", inherited),
        ("libukp::files_open_across_a_fork_are_estale_in_the_child", stale),
        ("libukp::wait_is_polled_and_is_eagain_before", polled),
        ("libukp::a_fork_that_fails_is_eio_and_harms_nobody", fails),
        ("libukp::a_child_is_gone_after_the_retention_time", retention),
        ("linux::a_fork_under_load_disturbs_neither", load),
    ]
}

/// Three threads fork at once where one fork may wait.
struct Threads {
    parent: Vec<String>,
    /// Each child with what its threads read.
    children: Vec<(String, Vec<String>)>,
}

fn threads() -> Result<&'static Threads> {
    static THREADS: OnceLock<Result<Threads, String>> = OnceLock::new();
    let happened = THREADS.get_or_init(|| three_fork().map_err(|error| format!("{error:#}")));
    happened.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn words(said: &str) -> Result<Vec<String>> {
    Ok(told(said, "forks")?.split(' ').map(str::to_owned).collect())
}

fn three_fork() -> Result<Threads> {
    let guest = two()?;
    let root = guest.root;
    // Arming is not to take that long too.
    guest.owner.ask(root, Request::Standbys { count: 1 })?;
    let slow = |step| Request::Fault { step, errno: FAULT_DELAY, delay_us: 4_000_000 };
    guest.owner.ask(root, slow(Some(Step::Take)))?;
    let said = guest.sh(root, "ukp-check forks 3");
    guest.owner.ask(root, slow(None))?;
    let parent = words(&said?)?;
    let mut children = Vec::new();
    for uuid in parent.iter().filter_map(|word| word.parse::<Uuid>().ok()) {
        let (code, console) = guest.end_of(uuid)?;
        ensure!(code == 0, "{uuid} ended with {code}: {console}");
        children.push((uuid.to_string(), words(&console)?));
    }
    Ok(Threads { parent, children })
}

fn own_child() -> Result<()> {
    let Threads { parent, children } = threads()?;
    ensure!(children.len() == 2 && children[0].0 != children[1].0, "{parent:?}");
    for (uuid, read) in children {
        ensure!(read.iter().any(|read| read == ZERO), "{uuid} reads {read:?}");
        ensure!(!read.contains(uuid), "{uuid} reads its own UUID: {read:?}");
    }
    Ok(())
}

fn busy() -> Result<()> {
    let Threads { parent, .. } = threads()?;
    ensure!(parent.iter().filter(|read| *read == "EBUSY").count() == 1, "{parent:?}");
    Ok(())
}

/// In the child of the first fork, the second was queued.
fn inherited() -> Result<()> {
    let Threads { children, .. } = threads()?;
    let failed = |read: &[String]| read.iter().filter(|read| *read == "EIO").count();
    let failed: Vec<usize> = children.iter().map(|(_, read)| failed(read)).collect();
    ensure!(failed == [1, 0] || failed == [0, 1], "{children:?}");
    Ok(())
}

fn stale() -> Result<()> {
    let guest = two()?;
    let sibling = guest.fork()?;
    let said = guest.sh(guest.root, &format!("ukp-check handles {sibling}"))?;
    all_told(&said, &[("before", "Running"), ("status", "Running"), ("waiter", "waits")])?;
    let child = told(&said, "child")?.parse().context("a UUID")?;
    let (code, console) = guest.end_of(child)?;
    guest.exit(sibling, 0)?;
    ensure!(code == 0, "it ended with {code}: {console}");
    for name in ["status", "wait-read", "wait-write", "folder", "waiter"] {
        all_told(&console, &[(name, "ESTALE")])?;
    }
    all_told(&console, &[("open", "ENOENT"), ("vm", "0")])
}

fn polled() -> Result<()> {
    let guest = two()?;
    let child = guest.fork()?;
    let (line, lines) = channel();
    let ended = guest.start(guest.root, &format!("ukp-check poll {child}"), line)?;
    wait_for(&lines, "@polling")?;
    guest.exit(child, 42)?;
    let said = ended.recv_timeout(LONG)??.out;
    all_told(&said, &[("impatient", "EAGAIN"), ("patient", "empty"), ("before", "none")])?;
    all_told(&said, &[("after", "POLLIN"), ("again", "POLLIN")])?;
    all_told(&said, &[("code", "42"), ("same-code", "42")])
}

fn wait_for(lines: &std::sync::mpsc::Receiver<String>, wanted: &str) -> Result<()> {
    let end = Instant::now() + LONG;
    while let Ok(line) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
        if line.trim() == wanted {
            return Ok(());
        }
    }
    bail!("it did not say {wanted}")
}

fn fails() -> Result<()> {
    let guest = two()?;
    let fault = Request::Fault { step: Some(Step::ApplyPages), errno: 12, delay_us: 0 };
    guest.owner.ask(guest.root, fault)?;
    let output = guest.run(guest.root, &shell("echo 1 > /uk/libukp/fork"), &[])?;
    ensure!(output.code != 0 && output.err.contains("Input/output error"), "{output:?}");
    let child = guest.fork()?;
    guest.exit(child, 0)
}

fn retention() -> Result<()> {
    let guest = two()?;
    let child = guest.fork()?;
    let listed = |guest: &Guest| guest.sh(guest.root, "echo /uk/libukp/vm/*");
    ensure!(listed(&guest)?.contains(&child.to_string()), "it is there");
    guest.exit(child, 0)?;
    let end = Instant::now() + LONG;
    while listed(&guest)?.contains(&child.to_string()) {
        ensure!(Instant::now() < end, "it is still there");
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// Both processors busy, one thread in read(2), an open connection to the host: each goes on as if
/// nothing had happened, in the parent and in the child.
fn load() -> Result<()> {
    let guest = two()?;
    let (line, lines) = channel();
    let ended = guest.start(guest.root, "ukp-check load 8", line)?;
    let (silent, _lines) = channel();
    let slow = "for i in $(seq 1 40); do echo line $i; usleep 100000; done";
    let talking = guest.start(guest.root, slow, silent)?;
    wait_for(&lines, "@working")?;
    let child = guest.sh(guest.root, "echo 1 > /uk/libukp/fork; cat /uk/libukp/fork")?;
    let child: Uuid = child.trim().parse().context("a UUID")?;
    let said = ended.recv_timeout(LONG)??.out;
    let (code, console) = guest.end_of(child)?;
    for (who, text) in [("parent", &said), ("child", &console)] {
        let worked = told(text, "worked")?;
        println!("the {who} worked {worked} rounds in memory, pipe, registers");
        ensure!(!worked.contains("wrong") && !worked.contains("[0,"), "the {who}: {worked}");
    }
    ensure!(code == 0, "the child ended with {code}: {console}");
    let talked = talking.recv_timeout(LONG)??.out;
    ensure!(talked.lines().count() == 40, "the connection lost lines: {talked}");
    Ok(())
}
