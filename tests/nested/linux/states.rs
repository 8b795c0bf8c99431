//! `status` in every state that can be seen, templates, and what stands still across a fork.

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use guest_wire::HOST_PORT;
use uuid::Uuid;

use super::guest::{Guest, LONG, ZERO, all_told, frozen, one, told, two};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::a_child_is_starting_until_its_agent_has_called", starting),
        ("libukp::a_child_that_ends_in_its_own_time_is_draining", draining),
        ("libukp::a_write_to_template_instance_returns_in_each_clone", template),
        ("libukp::scale_to_zero_disable_is_counted", scale_to_zero),
        ("identity::a_frozen_workload_runs_only_when_the_child_is_another", frozen_across),
        ("identity::one_that_is_not_frozen_may_run_before", runs_early),
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

/// Children cannot call the host as long as its socket has another name; those connected already,
/// which the parent is, notice nothing.
struct Unreachable(PathBuf);

impl Unreachable {
    fn make(guest: &Guest) -> Result<Self> {
        let socket = guest.owner.folder().join(format!("port_{HOST_PORT}"));
        std::fs::rename(&socket, socket.with_extension("away")).context("hiding the socket")?;
        Ok(Self(socket))
    }
}

impl Drop for Unreachable {
    fn drop(&mut self) {
        // The tests behind this one would tell.
        std::fs::rename(self.0.with_extension("away"), &self.0).unwrap_or_default();
    }
}

/// Read again and again while its agent calls in vain, and until it has called.
fn starting() -> Result<()> {
    let guest = one()?;
    let unreachable = Unreachable::make(&guest)?;
    let script = r#"
cd /uk/libukp
echo 1 > fork; read child < fork
[ $child = 00000000-0000-0000-0000-000000000000 ] && exec sleep 1000
echo "@child $child"
for i in 1 2 3 4 5; do read status < vm/$child/status; seen="$seen $status"; usleep 200000; done
echo "@seen$seen"
"#;
    let said = guest.sh(guest.root, script)?;
    let child: Uuid = told(&said, "child")?.parse()?;
    let read = guest.sh(guest.root, &format!("cat /uk/libukp/vm/{child}/status"))?;
    drop(unreachable);
    status_becomes(&guest, child, "Running")?;
    guest.owner.kill(child)?;
    guest.end_of(child)?;
    ensure!(told(&said, "seen")? == ["Starting"; 5].join(" "), "{said}");
    ensure!(read == "Starting\n", "{read:?}");
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
/// the child it stands still for as long as it takes to make that another one: it never sees the
/// child's generation id of ACPI together with the parent's generation file.
fn frozen_across() -> Result<()> {
    let guest = frozen()?;
    let console = spin(&guest, "exec ukp-check spin")?;
    println!(
        "frozen: nothing ran for {} us, {} us of that the child became another machine",
        told(&console, "gap")?,
        told(&console, "renewing")?
    );
    all_told(&console, &[("early", "0")])
}

/// The same program, where the agent of the child has to wait and nobody is frozen: it does see that.
fn runs_early() -> Result<()> {
    let guest = two()?;
    guest.sh(guest.root, "mkfifo /run/ukp/generation.new")?;
    let console = spin(&guest, "exec ukp-check early");
    guest.sh(guest.root, "rm /run/ukp/generation.new")?;
    let console = console?;
    ensure!(told(&console, "early")?.parse::<u32>()? > 0, "{console}");
    ensure!(told(&console, "written")?.parse::<u64>()? > 0, "{console}");
    Ok(())
}

/// Forks while a program runs; what that says in the child.
fn spin(guest: &Guest, program: &str) -> Result<String> {
    let (line, lines) = channel();
    let ended = guest.start(guest.root, program, line)?;
    let said = lines.recv_timeout(LONG).context("it does not begin")?;
    ensure!(said.trim() == "@spinning", "{said}");
    let child = guest.sh(guest.root, "echo 1 > /uk/libukp/fork; cat /uk/libukp/fork")?;
    let child: Uuid = child.trim().parse().context("a UUID")?;
    let (code, console) = guest.end_of(child)?;
    guest.sh(guest.root, "killall ukp-check")?;
    drop(ended.recv_timeout(LONG)?);
    ensure!(code == 0, "the child ended with {code}: {console}");
    Ok(console)
}
