//! `vm/`: what the parent sees of its children.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::guest::{LONG, all_told, one, since_epoch, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::snapshot_creation_time_and_status_are_read_only", files),
        ("libukp::many_wait_and_each_is_told_the_workload_s_exit_code", many_wait),
        ("libukp::wait_returns_at_once_for_a_child_that_was_killed", killed),
        ("libukp::a_workload_that_a_signal_ended_has_128_and_more", by_signal),
    ]
}

fn files() -> Result<()> {
    let guest = one()?;
    let begin = since_epoch()?.as_secs();
    let child = guest.fork()?;
    let end = since_epoch()?.as_secs();
    let script = format!(
        "cd /uk/libukp/vm/{child}; ls | tr '\\n' ' '; echo
        for file in snapshot creation_time status; do
            echo \"@$file $(cat $file)\"
            echo \"@$file-written $( (echo 1 > $file) 2>&1 )\"
        done"
    );
    let said = guest.sh(guest.root, &script)?;
    guest.exit(child, 0)?;
    ensure!(said.starts_with("creation_time snapshot status wait \n"), "{said}");
    let snapshot: Uuid = told(&said, "snapshot")?.parse()?;
    ensure!(snapshot.get_version_num() == 4 && snapshot != child, "{said}");
    let created: u64 = told(&said, "creation_time")?.parse()?;
    ensure!((begin..=end).contains(&created), "made at {created}, between {begin} and {end}");
    all_told(&said, &[("status", "Running")])?;
    for file in ["snapshot", "creation_time", "status"] {
        let written = told(&said, &format!("{file}-written"))?;
        ensure!(written.ends_with("Permission denied"), "{written}");
    }
    Ok(())
}

/// Three shells wait, each by another value; then the workload of the child ends.
fn many_wait() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    let script = format!(
        "cd /uk/libukp/vm/{child}
        for i in 1 2 3; do
            (printf 'any value %d' $i > wait; echo \"@waiter-$i $(cat wait)\") &
        done
        wait; echo \"@left $(ls .. | grep -c {child})\""
    );
    let (line, _lines) = channel();
    let ended = guest.start(guest.root, &script, line)?;
    let early = ended.recv_timeout(Duration::from_secs(2));
    ensure!(matches!(early, Err(RecvTimeoutError::Timeout)), "they did not wait: {early:?}");
    guest.sh(child, "echo 77 > /run/end")?;
    let said = ended.recv_timeout(LONG)??.out;
    let left = "0";
    all_told(&said, &[("waiter-1", "77"), ("waiter-2", "77"), ("waiter-3", "77"), ("left", left)])?;
    let (code, _) = guest.end_of(child)?;
    ensure!(code == 77, "the host heard {code}");
    Ok(())
}

fn killed() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    guest.owner.kill(child)?;
    guest.end_of(child)?;
    let script = format!(
        "cd /uk/libukp/vm/{child}; echo \"@status $(cat status)\"
        echo 1 > wait; echo \"@code $(cat wait)\""
    );
    all_told(&guest.sh(guest.root, &script)?, &[("status", "Stopped"), ("code", "137")])
}

fn by_signal() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    guest.sh(child, "kill -TERM $(ukp status | sed -n 's/.*running, process //p')")?;
    let (code, console) = guest.end_of(child)?;
    ensure!(code == 143, "the host heard {code}: {console}");
    let said = guest.sh(guest.root, &format!("ukp wait {child} || true"))?;
    ensure!(said == "143\n", "{said:?}");
    Ok(())
}
