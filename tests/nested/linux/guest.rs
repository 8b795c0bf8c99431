//! The guests of the tests, and how they are asked.

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_image::Built;
use nested_host::image::{self, File};
use nested_host::{CHECK, FILES};
use runtime::agent::{Agent, Command, Said};
use runtime::owner::Owner;
use runtime::proto::InstanceConfig;
use serde_json::json;
use uuid::Uuid;

/// What a machine reads that is a child.
pub const ZERO: &str = "00000000-0000-0000-0000-000000000000";
/// How long anything may take: guest and its kernel are emulated twice, on a shared machine.
pub const LONG: Duration = Duration::from_mins(1);
/// How long the guest `two` keeps a child that has stopped.
pub const RETENTION: Duration = Duration::from_secs(4);
/// Forks that may wait for another in the guest `two`.
pub const QUEUE: usize = 3;
/// How long a boot may take.
pub const BOOT: Duration = Duration::from_mins(3);
/// Where each program of a test finds what guests boot, if not in [`FILES`].
pub const FILES_IN: &str = "UKP_FILES";
/// Lists processes, and where in the kernel each of them is.
const LIST: &str = r#"cat /proc/uptime; for p in /proc/[0-9]*; do
    line=$(tr '\0' ' ' < $p/cmdline); [ -n "$line" ] && echo $p in $(cat $p/wchan): $line
done"#;
/// What the workload of `frozen` does first; a child ends with 66.
const FIRST_ACT: &str = "fs=$(grep -c ' /uk/libukp fuse' /proc/mounts)
echo 1 > /uk/libukp/fork; child=$(cat /uk/libukp/fork)
[ $child = 00000000-0000-0000-0000-000000000000 ] && exit 66
echo \"@mounted $fs\" > /tmp/first; echo \"@child $child\" >> /tmp/first; mv /tmp/first /run/first
";
/// Waits for an exit code, and ends with it.
/// Told to end it does so at once, unless it is to take its time.
pub const WORKLOAD: &str = "mkfifo /run/end
trap '[ -e /run/slow ] || { trap - TERM; kill $$; }; sleep 5; exit 9' TERM
read code < /run/end; exit $code";

/// The image of all guests but the one with Python.
pub fn image() -> Result<Built> {
    let check = File { path: "bin/ukp-check", bytes: CHECK, mode: 0o755 };
    let machine_id = File { path: "etc/machine-id", bytes: &[b'0'; 33], mode: 0o644 };
    image::busybox(&[check, machine_id], &[])
}

/// A guest and what it forks.
pub struct Guest {
    pub owner: Owner,
    pub root: Uuid,
}

type Slot = Mutex<Option<Result<Arc<Guest>, String>>>;

static ONE: Slot = Mutex::new(None);
static TWO: Slot = Mutex::new(None);
static FROZEN: Slot = Mutex::new(None);
static PYTHON: Slot = Mutex::new(None);

fn lock(slot: &'static Slot) -> MutexGuard<'static, Option<Result<Arc<Guest>, String>>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn held(slot: &'static Slot, boot: fn() -> Result<Guest>) -> Result<Arc<Guest>> {
    let booted = || boot().map(Arc::new).map_err(|error| format!("the guest: {error:#}"));
    lock(slot).get_or_insert_with(booted).clone().map_err(anyhow::Error::msg)
}

/// The guest with one vCPU.
pub fn one() -> Result<Arc<Guest>> {
    held(&ONE, || Guest::boot(small(), &json!({ "hostname": "node-{uuid}" })))
}

/// The guest with two vCPUs, where two threads run at the same time.
pub fn two() -> Result<Arc<Guest>> {
    held(&TWO, || {
        Guest::boot(twofold(), &json!({ "fork_queue": QUEUE, "retention_s": RETENTION.as_secs() }))
    })
}

/// The guest with two vCPUs whose programs stand still across forks: threads that ask at the same time
/// elsewhere ask one after the other here.
pub fn frozen() -> Result<Arc<Guest>> {
    held(&FROZEN, || {
        let argv = ["/bin/sh", "-c", &format!("{FIRST_ACT}{WORKLOAD}")].map(str::to_owned);
        Guest::boot(twofold(), &json!({ "freeze": true, "argv": argv }))
    })
}

/// Not as a real-time thread: a vCPU that waits in the fork path would keep the other from the only
/// processor.
fn twofold() -> InstanceConfig {
    InstanceConfig { vcpus: 2, realtime: false, ..small() }
}

/// The guest with Python and `SQLite`.
pub fn python() -> Result<Arc<Guest>> {
    held(&PYTHON, || {
        let initrd = file("python");
        let config = InstanceConfig { memory_mib: 320, initrd, ..small() };
        Guest::boot(config, &json!({}))
    })
}

fn small() -> InstanceConfig {
    InstanceConfig { memory_mib: 192, initrd: file("image"), ..<_>::default() }
}

/// What was brought along by this name.
pub fn file(name: &str) -> PathBuf {
    brought().unwrap_or_else(|| PathBuf::from(FILES)).join(name)
}

/// The folder that the environment names for it.
pub fn brought() -> Option<PathBuf> {
    std::env::var_os(FILES_IN).map(PathBuf::from)
}

/// Ends guests that no later test asks for (it would boot them anew): each that does nothing takes a
/// tenth of the only processor.
pub fn end_frozen() {
    drop(lock(&FROZEN).take());
}

/// See [`end_frozen`].
pub fn end_two() {
    drop(lock(&TWO).take());
}

/// Ends all of them; returns their folders.
pub fn end_all() -> Vec<PathBuf> {
    let guests =
        [&ONE, &TWO, &FROZEN, &PYTHON].into_iter().filter_map(|slot| lock(slot).take()?.ok());
    guests.map(|guest| guest.owner.folder().to_owned()).collect()
}

/// What a program has said.
#[derive(Debug, Default)]
pub struct Output {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Guest {
    fn boot(config: InstanceConfig, more: &serde_json::Value) -> Result<Self> {
        let owner = Owner::new()?;
        let begin = Instant::now();
        let mut init = json!({ "argv": ["/bin/sh", "-c", WORKLOAD] });
        for (name, value) in more.as_object().into_iter().flatten() {
            init[name] = value.clone();
        }
        let vcpus = config.vcpus;
        let root = owner.start(InstanceConfig {
            kernel: file("vmlinuz"),
            initrd_tail: config_archive(&init)?,
            // `ukp-check garbage` reaches for registers that have a driver.
            cmdline: "console=ttyS0 quiet panic=-1 iomem=relaxed rdinit=/.uk/init".to_owned(),
            ..config
        })?;
        let guest = Self { owner, root };
        guest.ready_within(BOOT, root)?;
        println!("Linux with {vcpus} vCPU: its agent answers after {:?}", begin.elapsed());
        Ok(guest)
    }

    /// Waits until the agent of an instance answers with its UUID; returns its generation.
    pub fn ready(&self, instance: Uuid) -> Result<u64> {
        self.ready_within(LONG, instance)
    }

    fn ready_within(&self, limit: Duration, instance: Uuid) -> Result<u64> {
        self.owner.wait_for(instance, limit)?;
        let end = Instant::now() + limit;
        loop {
            // Until it has heard from the host who it is, it says so.
            let known = |(uuid, generation): (Uuid, u64)| {
                ensure!(!uuid.is_nil(), "it does not know who it is");
                Ok((uuid, generation))
            };
            match self.agent(instance).and_then(|agent| known(agent.ping()?)) {
                Ok((uuid, generation)) if uuid == instance => return Ok(generation),
                // It has not yet heard who it is.
                Ok((uuid, _)) if uuid.is_nil() && Instant::now() < end => {}
                Ok((uuid, _)) => bail!("{instance} answers as {uuid}"),
                Err(error) => {
                    let exit = self.owner.with(instance, |known| known.exit.clone())?;
                    if exit.is_some() || Instant::now() > end {
                        let said = self.console(instance)?;
                        let last: Vec<&str> = said.lines().rev().take(20).collect();
                        bail!("{error:#}; exit {exit:?}; its console, last line first: {last:#?}");
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A connection to the agent of an instance.
    pub fn agent(&self, instance: Uuid) -> Result<Agent> {
        Ok(Agent::connect(self.owner.folder(), instance)?)
    }

    /// Runs a program; without input, unless `input` gives some.
    pub fn run(&self, instance: Uuid, command: &Command, input: &[u8]) -> Result<Output> {
        if let Some(output) = self.run_for(LONG, instance, command, input)? {
            return Ok(output);
        }
        let argv = &command.argv;
        let list = shell(LIST);
        let seen = self.run_for(Duration::from_secs(20), instance, &list, &[]);
        let console = self.console(instance)?;
        bail!("{argv:?} does not end in {instance}; there run: {seen:?}; its console: {console}")
    }

    fn run_for(
        &self,
        limit: Duration,
        instance: Uuid,
        command: &Command,
        input: &[u8],
    ) -> Result<Option<Output>> {
        let mut running = self.agent(instance)?.exec(command)?;
        let mut to = running.input()?;
        if !input.is_empty() {
            to.send(input)?;
        }
        to.send(&[])?;
        let (sender, heard) = channel();
        std::thread::spawn(move || {
            // Nobody waits any more, otherwise.
            sender.send(listen(&mut || Ok(running.hear()?))).unwrap_or(());
        });
        heard.recv_timeout(limit).ok().transpose()
    }

    /// Runs a script that takes longer.
    pub fn run_long(&self, instance: Uuid, script: &str, limit: Duration) -> Result<Output> {
        let output = self.run_for(limit, instance, &shell(script), &[])?;
        output.with_context(|| format!("{script:?} does not end within {limit:?}"))
    }

    /// What a script writes; it must end well.
    pub fn sh(&self, instance: Uuid, script: &str) -> Result<String> {
        let output = self.run(instance, &shell(script), &[])?;
        ensure!(output.code == 0, "{script:?} ended with {}: {output:?}", output.code);
        Ok(output.out)
    }

    /// Starts a script; the receiver has what becomes of it. `line` is told each `@name` line when it
    /// comes.
    pub fn start(
        &self,
        instance: Uuid,
        script: &str,
        line: Sender<String>,
    ) -> Result<Receiver<Result<Output>>> {
        let mut running = self.agent(instance)?.exec(&shell(script))?;
        running.input()?.send(&[])?;
        let (sender, ended) = channel();
        std::thread::spawn(move || {
            let mut hear = || {
                let said = running.hear()?;
                if let Said::Out(bytes) = &said {
                    for told in String::from_utf8_lossy(bytes).lines() {
                        line.send(told.to_owned()).unwrap_or(());
                    }
                }
                Ok(said)
            };
            sender.send(listen(&mut hear)).unwrap_or(());
        });
        Ok(ended)
    }

    /// What an instance has written to its console.
    pub fn console(&self, instance: Uuid) -> Result<String> {
        let bytes = self.owner.with(instance, |known| known.console.clone())?;
        Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
    }

    /// Waits until an instance has ended; its exit code and what is on its console.
    pub fn end_of(&self, instance: Uuid) -> Result<(i32, String)> {
        self.owner.wait_for(instance, LONG)?;
        let (code, _) = self.owner.wait_exit(instance, LONG)?;
        Ok((code, self.console(instance)?))
    }

    /// Forks from inside, by a shell that exists in the child no longer; returns the child, whose
    /// agent answers.
    pub fn fork(&self) -> Result<Uuid> {
        let script = "echo 1 > /uk/libukp/fork; cat /uk/libukp/fork";
        let child = self.sh(self.root, script)?.trim().parse().context("the UUID of a child")?;
        self.ready(child)?;
        Ok(child)
    }

    /// Ends an instance by `ukp exit`.
    pub fn exit(&self, instance: Uuid, code: u8) -> Result<()> {
        // The machine may be gone before it can tell how the command ended.
        let asked = self.sh(instance, &format!("ukp exit {code}"));
        let (ended, _) = self.end_of(instance)?;
        ensure!(ended == i32::from(code), "ended with {ended} instead of {code}: {asked:?}");
        Ok(())
    }
}

fn listen(hear: &mut dyn FnMut() -> Result<Said>) -> Result<Output> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    loop {
        match hear()? {
            Said::Out(bytes) => out.extend(bytes),
            Said::Err(bytes) => err.extend(bytes),
            Said::Exited(code) => return Ok(Output { code, out: text(&out), err: text(&err) }),
        }
    }
}

/// A script for the guest's shell.
pub fn shell(script: &str) -> Command {
    let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    Command { argv, ..Command::default() }
}

/// The value of the line `@name value`.
pub fn told<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let mut values = text.lines().filter_map(|line| {
        let (found, value) = line.strip_prefix('@')?.split_once(' ')?;
        (found == name).then_some(value.trim())
    });
    values.next().with_context(|| format!("nobody told {name:?}: {text:?}"))
}

/// Checks several such lines.
pub fn all_told(text: &str, expected: &[(&str, &str)]) -> Result<()> {
    for (name, value) in expected {
        let found = told(text, name)?;
        ensure!(found == *value, "{name} is {found:?} instead of {value:?}: {text:?}");
    }
    Ok(())
}

/// The host's wall clock.
pub fn since_epoch() -> Result<Duration> {
    Ok(std::time::SystemTime::UNIX_EPOCH.elapsed()?)
}

/// An archive behind the image, with what init is to do.
fn config_archive(config: &serde_json::Value) -> Result<Vec<u8>> {
    let json = config.to_string();
    let entry = cpio::NewcBuilder::new(".uk/config.json").mode(0o100_644);
    let input = [(entry, Cursor::new(json.into_bytes()))];
    let mut archive = cpio::write_cpio(input.into_iter(), Vec::new())?;
    archive.resize(archive.len().next_multiple_of(512), 0);
    Ok(archive)
}
