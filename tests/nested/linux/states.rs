//! `status` in every state that can be seen, templates, and what stands still across a fork.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::guest::{Guest, LONG, ZERO, all_told, frozen, one, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::a_child_is_starting_until_its_agent_has_called", starting),
        ("libukp::a_child_that_ends_in_its_own_time_is_draining", draining),
        ("libukp::a_write_to_template_instance_returns_in_each_clone", template),
        ("libukp::scale_to_zero_disable_is_counted", scale_to_zero),
        ("identity::a_frozen_workload_runs_only_when_the_child_is_another", frozen_across),
    ]
}

/// Waits until `vm/` of the root shows this.
fn status_becomes(guest: &Guest, child: Uuid, wanted: &str) -> Result<()> {
    let end = Instant::now() + LONG;
    loop {
        let read = guest.sh(guest.root, &format!("cat /uk/libukp/vm/{child}/status"))?;
        if read.trim() == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{child} is {read:?}, not {wanted}");
    }
}

/// Read by the shell itself, as fast as it can.
fn starting() -> Result<()> {
    let guest = one()?;
    let script = r#"
cd /uk/libukp
echo 1 > fork; read child < fork
[ $child = 00000000-0000-0000-0000-000000000000 ] && exec sleep 1000
while [ "$status" != Running ]; do read status < vm/$child/status; seen="$seen $status"; done
echo "@child $child"
echo "@seen$seen"
"#;
    let said = guest.sh(guest.root, script)?;
    let child: Uuid = told(&said, "child")?.parse()?;
    guest.owner.kill(child)?;
    guest.end_of(child)?;
    let mut seen: Vec<&str> = told(&said, "seen")?.split(' ').collect();
    println!("a child was seen {} times before its agent had called", seen.len() - 1);
    seen.dedup();
    // It may have called before it was asked for.
    ensure!(seen == ["Starting", "Running"] || seen == ["Running"], "{said}");
    Ok(())
}

fn draining() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    guest.sh(child, "touch /run/slow")?;
    let drained = std::thread::scope(|scope| {
        let draining = scope.spawn(|| guest.owner.drain(child, LONG));
        status_becomes(&guest, child, "Draining")?;
        draining.join().ok().context("it panicked")?.context("draining")
    })?;
    ensure!(drained, "it has not ended");
    let (code, console) = guest.end_of(child)?;
    ensure!(code == 9, "its workload ended with {code}: {console}");
    status_becomes(&guest, child, "Stopped")?;
    ensure!(guest.sh(guest.root, &format!("ukp wait {child} || true"))? == "9\n");
    Ok(())
}

fn template() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    status_becomes(&guest, child, "Running")?;
    let script = r#"
exec > /dev/console 2>&1
echo 1 > /uk/libukp/template_instance || ukp exit 1
echo "@fork $(cat /uk/libukp/fork)"
echo "@children $(ls /uk/libukp/vm | wc -l)"
ukp exit 6
sleep 1000
"#;
    let (line, _lines) = channel();
    let blocked = guest.start(child, script, line)?;
    status_becomes(&guest, child, "Template")?;
    for clone in guest.owner.branch(child, 2)? {
        let (code, console) = guest.end_of(clone)?;
        ensure!(code == 6, "{clone} ended with {code}: {console}");
        all_told(&console, &[("fork", ZERO), ("children", "0")])?;
    }
    status_becomes(&guest, child, "Template")?;
    ensure!(blocked.try_recv().is_err(), "the write returned in the template");
    guest.owner.kill(child)?;
    guest.end_of(child)?;
    status_becomes(&guest, child, "Stopped")
}

fn scale_to_zero() -> Result<()> {
    let guest = one()?;
    let script = "cd /uk/libukp; for value in + + - =7 -; do
        echo $value > scale_to_zero_disable; cat scale_to_zero_disable; done
        echo nonsense > scale_to_zero_disable || echo refused; echo =0 > scale_to_zero_disable";
    let output = guest.sh(guest.root, script)?;
    ensure!(output == "1\n2\n1\n7\n6\nrefused\n", "{output:?}");
    Ok(())
}

/// A program on another processor than the agent's looks again and again which machine it is in. In
/// the child it stands still for as long as it takes to make that another one.
fn frozen_across() -> Result<()> {
    let guest = frozen()?;
    let (line, lines) = channel();
    let ended = guest.start(guest.root, "exec ukp-check spin", line)?;
    let said = lines.recv_timeout(LONG).context("it does not begin")?;
    ensure!(said.trim() == "@spinning", "{said}");
    let child = guest.sh(guest.root, "echo 1 > /uk/libukp/fork; cat /uk/libukp/fork")?;
    let child: Uuid = child.trim().parse().context("a UUID")?;
    let (code, console) = guest.end_of(child)?;
    guest.sh(guest.root, "killall ukp-check")?;
    drop(ended.recv_timeout(LONG)?);
    ensure!(code == 0, "the child ended with {code}: {console}");
    let time = |name| -> Result<Duration> {
        Ok(Duration::from_micros(told(&console, name)?.parse().context("microseconds")?))
    };
    let (gap, renewing) = (time("gap")?, time("renewing")?);
    println!(
        "frozen: nothing ran for {gap:?}, {renewing:?} of that the child became another machine"
    );
    ensure!(gap >= renewing, "it ran {gap:?} before it was another, which took {renewing:?}");
    Ok(())
}
