//! What needs system calls that no shell makes, or two processors: `ukp-check` makes them.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use runtime::fork::Step;
use runtime::proto::Request;
use uuid::Uuid;

use super::guest::{Guest, LONG, RETENTION, all_told, shell, told, two};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::files_open_across_a_fork_are_estale_in_the_child", stale),
        ("libukp::wait_is_polled_and_is_eagain_before", polled),
        ("libukp::a_fork_that_fails_is_eio_and_harms_nobody", fails),
        ("libukp::a_child_is_gone_after_the_retention_time", retention),
        ("libukp::a_file_of_a_child_that_was_cleaned_up_is_estale", cleaned_up),
        ("identity::the_generation_file_can_be_watched", watched),
    ]
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
    let listed = |guest: &Guest| -> Result<bool> {
        Ok(guest.sh(guest.root, "echo /uk/libukp/vm/*")?.contains(&child.to_string()))
    };
    ensure!(listed(&guest)?, "it is not there");
    // It stops later than that, and is kept from then on.
    let begin = Instant::now();
    guest.exit(child, 0)?;
    let mut seen = Duration::ZERO;
    while listed(&guest)? {
        seen = begin.elapsed();
        ensure!(seen < LONG, "it is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("a child was kept, and last seen {seen:.1?} after it was told to end");
    ensure!(begin.elapsed() >= RETENTION, "it was gone after {:?}", begin.elapsed());
    Ok(())
}

/// The status is open when the last one has read the code.
fn cleaned_up() -> Result<()> {
    let guest = two()?;
    let child = guest.fork()?;
    guest.exit(child, 3)?;
    let script = format!(
        "cd /uk/libukp/vm
        exec 3< {child}/status
        echo 1 > {child}/wait; echo \"@code $(cat {child}/wait)\"
        echo \"@left $(ls | grep -c {child})\"
        echo \"@open $(cat <&3 2>&1)\"
        echo \"@anew $(cat {child}/status 2>&1)\""
    );
    let said = guest.sh(guest.root, &script)?;
    all_told(&said, &[("code", "3"), ("left", "0")])?;
    let open = told(&said, "open")?;
    ensure!(open.contains("Stale file handle") || open.contains("tale NFS"), "{said}");
    ensure!(told(&said, "anew")?.contains("No such file"), "{said}");
    Ok(())
}

/// As programs are told that this is another machine.
fn watched() -> Result<()> {
    let guest = two()?;
    let said = guest.sh(guest.root, "ukp-check watch")?;
    all_told(&said, &[("before", "false"), ("after", "false")])?;
    let child: Uuid = told(&said, "child")?.parse()?;
    let (code, console) = guest.end_of(child)?;
    ensure!(code == 0, "it ended with {code}: {console}");
    all_told(&console, &[("after", "true"), ("name", "generation")])?;
    let generation: u64 = told(&console, "generation")?.parse()?;
    ensure!(generation > 0, "{console}");
    Ok(())
}
