//! Kind `linux-fork`: what a fork is for those who ask for it, in the guest and on the host.
//!
//! | | from | to |
//! | --- | --- | --- |
//! | `guest_fork_us` | the write to `/uk/libukp/fork` | it returns, in the parent |
//! | `guest_fork_child_us` | the same | it returns, in the child, by the guest's clock |
//! | `ready_us` | the vCPU has left the guest with the request | the child's agent has answered a ping with the child's UUID |
//! | `exec_us` | the same | the exit code of `true`, which was run in the child after that ping |
//!
//! The same guest times fork(2), exec and wait of `/bin/true`: before it was ever forked
//! (`guest_true_unforked_us`), and before each fork, when its standby is ready (`guest_true_us`). QEMU
//! writes the state of a guest to a file and takes it up again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use runtime::agent::{Agent, Command, Said};
use runtime::fork::ForkReport;
use runtime::proto::Request;
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::clock::{LONG, monotonic_ns, us, us_between};
use super::guest::Guest;
use super::qemu::{self, Qemu};
use super::told::Told;
use super::world::{HELPER, World};
use crate::scenario::Scenario;

/// Says nothing of what is not wrong; there is no PCI.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/.uk/init";
const QEMU_CMDLINE: &str =
    "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/bin/ukp-check -- init";
/// Forks in a session of its own, for the one that asked for it is gone in the child.
const FORK: &str = "setsid sh -c 'ukp fork --json >/run/forked; echo >/run/done' \
    </dev/null >/dev/null 2>&1 & read x </run/done; cat /run/forked";
/// How often `true` is timed before a fork.
const TRUES: &str = "3";
/// So many forks for each snapshot of QEMU's.
const FORKS_PER_SNAPSHOT: u32 = 4;
/// After so long it is looked whether the fork has failed.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks at a child.
const AGAIN: Duration = Duration::from_millis(2);

/// What `ukp fork --json` says.
#[derive(Debug, Deserialize)]
struct Forked {
    child: Uuid,
    guest_fork_us: f64,
}

pub(super) fn forks(scenario: &Scenario, world: &World, tell: &mut dyn FnMut(Told)) -> Result<()> {
    tell(Told::Phase { what: "boot".to_owned(), total: 1 });
    let guest = Guest::start(world, scenario.memory_mib, CMDLINE)?;
    guest.ready(guest.root)?;
    guest.run(guest.root, &["/bin/mkfifo", "/run/done"])?;
    tell_trues(&guest, "guest_true_unforked_us", tell)?;
    tell(Told::Phase { what: "QEMU boots".to_owned(), total: 1 });
    let mut snapshots = match Snapshots::start(world, scenario.memory_mib) {
        Ok(snapshots) => Some(snapshots),
        Err(error) => {
            let text = format!("no snapshots of QEMU's to compare with: {error:#}");
            tell(Told::Note { text });
            None
        }
    };
    tell(Told::Phase { what: "warm-up".to_owned(), total: scenario.warmup.into() });
    for _ in 0..scenario.warmup {
        fork(&guest)?;
        tell(Told::Step);
    }
    tell(Told::Phase { what: "forks".to_owned(), total: scenario.forks.into() });
    for index in 0..scenario.forks {
        standby(&guest)?;
        tell_trues(&guest, "guest_true_us", tell)?;
        let fork = fork(&guest)?;
        if let Some(why) = fork.wrong {
            tell(Told::Void { why });
            return Ok(());
        }
        tell(fork.told);
        if let (Some(snapshots), 0) = (&mut snapshots, index % FORKS_PER_SNAPSHOT) {
            let [save_us, restore_us] = snapshots.round()?;
            let mut baseline = |name: &str, value| {
                tell(Told::Baseline { name: name.to_owned(), value });
            };
            baseline("qemu_snapshot_us", save_us);
            baseline("qemu_restore_us", restore_us);
            baseline("qemu_snapshot_restore_us", save_us + restore_us);
        }
        tell(Told::Step);
    }
    Ok(())
}

/// What became of a fork, and what is wrong with it.
struct Fork {
    told: Told,
    wrong: Option<String>,
}

fn fork(guest: &Guest) -> Result<Fork> {
    let root = guest.root;
    standby(guest)?;
    let known: BTreeSet<Uuid> = guest.owner.alive().into_iter().collect();
    let argv = ["/bin/sh", "-c", FORK].map(str::to_owned).to_vec();
    let mut running = guest.agent(root)?.exec(&Command { argv, ..Command::default() })?;
    running.input()?.send(&[])?;
    let Some(child) = born(guest, &known)? else {
        let report = guest.owner.next_fork(root, LONG)?;
        let why = crate::lab::sample(&report).failure().unwrap_or("no child called").to_owned();
        return Ok(Fork { told: Told::ForkFailed { why }, wrong: None });
    };
    let who = ping(guest, child)?;
    let ready = monotonic_ns();
    guest.run(child, &["/bin/true"]).context("running true in the child")?;
    let done = monotonic_ns();
    let report = guest.owner.next_fork(root, LONG)?;
    let in_parent = heard(&mut running).context("the fork, in the parent")?;
    let in_child = read(guest, child).context("the fork, in the child")?;
    guest.end(child)?;
    let wrong = (who != child || in_parent.child != child || !in_child.child.is_nil()).then(|| {
        format!(
            "child {child} answers as {who}; its parent reads {} and it {} itself",
            in_parent.child, in_child.child
        )
    });
    Ok(Fork { told: told(&report, (ready, done), (&in_parent, &in_child)), wrong })
}

/// What is left to do for the next fork is done.
fn standby(guest: &Guest) -> Result<()> {
    let asked = guest.owner.ask(guest.root, Request::Standbys { count: 1 });
    asked.map(drop).context("waiting for a standby")
}

/// The child, unless the fork has failed.
fn born(guest: &Guest, known: &BTreeSet<Uuid>) -> Result<Option<Uuid>> {
    let end = Instant::now() + LONG;
    loop {
        let child = |alive: &[Uuid]| alive.iter().find(|uuid| !known.contains(*uuid)).copied();
        if let Ok(child) = guest.owner.wait_until("a child", LOOK, child) {
            return Ok(Some(child));
        }
        let failed = |report: &ForkReport| report.failed.is_some();
        if guest.owner.with(guest.root, |it| it.forks.front().is_some_and(failed))? {
            return Ok(None);
        }
        ensure!(Instant::now() < end, "the fork takes too long");
    }
}

fn told(report: &ForkReport, at: (u64, u64), guests: (&Forked, &Forked)) -> Told {
    let begin = report.parent.doorbell_ns;
    let mut values: Vec<(String, f64)> =
        crate::lab::sample(report).values().map(|(name, value)| (name.to_owned(), value)).collect();
    let mut add = |name: &str, value| values.push((name.to_owned(), value));
    add("guest_fork_us", guests.0.guest_fork_us);
    add("guest_fork_child_us", guests.1.guest_fork_us);
    add("ready_us", us_between(begin, at.0));
    add("exec_us", us_between(begin, at.1));
    Told::Fork { values }
}

/// Who answers in a child, which may not listen yet.
fn ping(guest: &Guest, child: Uuid) -> Result<Uuid> {
    let end = Instant::now() + LONG;
    loop {
        match guest.agent(child).and_then(Agent::ping) {
            Ok((uuid, _)) => return Ok(uuid),
            Err(error) if Instant::now() > end => return Err(error).context("a ping"),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// What the fork's command says in the parent.
fn heard(running: &mut runtime::agent::Running) -> Result<Forked> {
    let mut out = Vec::new();
    loop {
        match running.hear()? {
            Said::Out(bytes) => out.extend(bytes),
            Said::Err(bytes) => bail!("it says {}", String::from_utf8_lossy(&bytes)),
            Said::Exited(0) => return Ok(serde_json::from_slice(&out)?),
            Said::Exited(code) => bail!("it ended with {code}"),
        }
    }
}

/// What it wrote in the child, which may still be at it.
fn read(guest: &Guest, child: Uuid) -> Result<Forked> {
    let end = Instant::now() + LONG;
    loop {
        let text = guest.agent(child)?.read("/run/forked", |_| Ok(Vec::new()))?;
        if text.ends_with(b"\n") {
            return Ok(serde_json::from_slice(&text)?);
        }
        ensure!(Instant::now() < end, "the write to fork has not returned");
        std::thread::sleep(AGAIN);
    }
}

/// fork(2), exec and wait of `/bin/true`, in the parent.
fn tell_trues(guest: &Guest, name: &str, tell: &mut dyn FnMut(Told)) -> Result<()> {
    let said = guest.run(guest.root, &[HELPER, "true", TRUES])?;
    let values = said.trim().strip_prefix("@true_us ").context("no times")?;
    for us in values.split(' ') {
        let value = us.parse().with_context(|| format!("{us:?}"))?;
        tell(Told::Baseline { name: name.to_owned(), value });
    }
    Ok(())
}

/// A machine of QEMU's that is written to a file and taken up again.
struct Snapshots<'a> {
    world: &'a World,
    memory_mib: u32,
    qemu: Qemu,
    file: tempfile::TempPath,
    rounds: u32,
}

impl<'a> Snapshots<'a> {
    fn start(world: &'a World, memory_mib: u32) -> Result<Self> {
        let file = tempfile::NamedTempFile::new()?.into_temp_path();
        let mut qemu = Qemu::start(world, &config(world, memory_mib, None))?;
        qemu.line("@init")?;
        qemu.echo("hello")?;
        Ok(Self { world, memory_mib, qemu, file, rounds: 0 })
    }

    /// Times in µs until the state is in the file, and until a machine made from that has answered.
    fn round(&mut self) -> Result<[f64; 2]> {
        self.rounds += 1;
        // As fast as it can: by default it thinks of a network.
        self.qemu.ask("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 40 }))?;
        let begin = Instant::now();
        self.qemu.snapshot(&self.file)?;
        let save = begin.elapsed();
        let incoming = format!("exec:cat {}", self.file.display());
        let config = config(self.world, self.memory_mib, Some(&incoming));
        let begin = Instant::now();
        let mut qemu = Qemu::start(self.world, &config)?;
        qemu.running()?;
        let answered = qemu.echo(&format!("round-{}", self.rounds))?;
        let restore = answered.duration_since(begin);
        self.qemu = qemu;
        Ok([us(save), us(restore)])
    }
}

fn config<'a>(world: &'a World, memory_mib: u32, incoming: Option<&'a str>) -> qemu::Config<'a> {
    let kernel = &world.kernel;
    qemu::Config { kernel, memory_mib, cmdline: QEMU_CMDLINE, incoming, vsock: None }
}
