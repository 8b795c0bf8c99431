//! Guests that mean harm, or have come to harm: they stop themselves at most.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::guest::{Guest, LONG, one};
use crate::Inside;

/// What `ukp-check garbage` ends its machine with.
const CODE: i32 = 77;
/// What an instance ends with whose guest did what no guest may do.
const CRASHED: i32 = runtime::proto::CRASHED;
/// How often each part of it writes.
const WRITES: u32 = 3000;

pub fn cases() -> Vec<Inside> {
    vec![
        ("hostile::garbage_in_every_register_harms_nobody_else", garbage),
        ("hostile::a_kernel_that_panics_ends_with_its_reason", panics),
        ("hostile::a_restart_ends_the_instance", restarts),
    ]
}

/// A child writes garbage; its parent, its sibling and their host go on.
fn garbage() -> Result<()> {
    let guest = one()?;
    let sibling = guest.fork()?;
    let child = guest.fork()?;
    // What is written to the serial line may come back, and would then be Ctrl-C now and then.
    let script = format!(
        "stty -isig < /dev/console
        setsid ukp-check garbage {WRITES} < /dev/null > /dev/console 2>&1 &"
    );
    guest.sh(child, &script)?;
    let (ended, console) = fate(&guest, child)?;
    ensure!(console.contains("@garbage begins"), "it did not begin: {console}");
    match &ended {
        Some((CODE, None)) => ensure!(console.contains("@garbage all"), "{console}"),
        Some((CRASHED, why)) => {
            let clear = why.as_ref().is_some_and(|why| !why.is_empty() && !why.contains('\n'));
            ensure!(clear, "it does not say why: {why:?}");
        }
        // Its workload was told to end, or its power was switched off.
        Some(_) => {}
        // It stands still, as it likes.
        None => {
            guest.owner.kill(child)?;
            guest.end_of(child)?;
        }
    }
    println!("a guest that wrote garbage: {ended:?}");
    for instance in [guest.root, sibling] {
        ensure!(guest.sh(instance, "echo well")? == "well\n", "{instance}");
    }
    let next = guest.fork()?;
    guest.exit(next, 3)?;
    guest.exit(sibling, 4)
}

/// How an instance ended: its code, and why.
type Ended = (i32, Option<String>);

/// How the instance ended, if it did, and what it said.
fn fate(guest: &Guest, instance: Uuid) -> Result<(Option<Ended>, String)> {
    let end = Instant::now() + LONG / 2;
    loop {
        let ended = guest.owner.wait_exit(instance, Duration::from_secs(1)).ok();
        if ended.is_some() || Instant::now() > end {
            return Ok((ended, guest.console(instance)?));
        }
    }
}

fn trigger(what: &str) -> Result<(i32, Option<String>, String)> {
    let guest = one()?;
    let child = guest.fork()?;
    let script =
        format!("(sleep 1; echo {what} > /proc/sysrq-trigger) < /dev/null > /dev/null 2>&1 &");
    guest.sh(child, &script)?;
    let (code, why) = guest.owner.wait_exit(child, LONG)?;
    Ok((code, why, guest.console(child)?))
}

fn panics() -> Result<()> {
    let (code, why, console) = trigger("c")?;
    ensure!(code == CRASHED, "{code} {why:?}: {console}");
    let why = why.unwrap_or_default();
    ensure!(why.contains("Kernel panic - not syncing: sysrq triggered crash"), "{why}");
    ensure!(!why.contains('\n'), "{why}");
    Ok(())
}

fn restarts() -> Result<()> {
    let (code, why, console) = trigger("b")?;
    ensure!((code, &why) == (0, &None), "{code} {why:?}: {console}");
    Ok(())
}
