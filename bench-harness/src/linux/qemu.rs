//! QEMU's microvm with the same kernel and image, on the same KVM: what ours is compared with.
//!
//! It gets what makes it fast: no firmware but the one that loads a kernel, no option ROMs, no legacy
//! timer and interrupt controller. The clock stays, because Linux looks for one for seconds where the
//! ACPI tables of this machine do not say that there is none.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::clock::LONG;
use super::guest::{Console, line_with};
use super::world::{self, World};

const MACHINE: &str = "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=on,acpi=on";

/// Between two questions.
const AGAIN: Duration = Duration::from_millis(1);

/// How a machine is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config<'a> {
    pub(super) kernel: &'a Path,
    pub(super) memory_mib: u32,
    pub(super) cmdline: &'a str,
    /// Where its state comes from, if it does not boot.
    pub(super) incoming: Option<&'a str>,
    /// Its context id, with a socket device in the kernel.
    pub(super) vsock: Option<u32>,
}

/// A machine; it ends with this value.
pub(super) struct Qemu {
    process: Child,
    serial: std::process::ChildStdin,
    pub(super) lines: Receiver<(Instant, String)>,
    /// When it was started.
    pub(super) started: Instant,
    monitor: PathBuf,
    session: Option<Monitor>,
}

impl Qemu {
    pub(super) fn start(world: &World, config: &Config<'_>) -> Result<Self> {
        let qemu = world.qemu.as_ref().map_err(|missing| anyhow::anyhow!("{missing}"))?;
        let monitor = std::env::temp_dir().join(format!("ukp-qemu-{}", uuid::Uuid::new_v4()));
        let mut command = command(world, qemu, config, &monitor);
        nested_host::end_with_this_process(&mut command, rustix::process::Signal::KILL);
        let started = Instant::now();
        let mut process = command.spawn().context("starting QEMU")?;
        let serial = process.stdin.take().context("QEMU has no input")?;
        let output = process.stdout.take().context("QEMU has no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let (mut output, mut console, mut piece) = (output, Console::default(), [0; 4096]);
            while let Ok(len @ 1..) = output.read(&mut piece) {
                for line in console.hear(&piece[..len]) {
                    // Nobody listens any more, otherwise; QEMU must not wait for it.
                    sender.send((Instant::now(), line)).unwrap_or(());
                }
            }
        });
        Ok(Self { process, serial, lines, started, monitor, session: None })
    }

    /// The next line of its console that has `what` in it, and when it came.
    pub(super) fn line(&mut self, what: &str) -> Result<Instant> {
        match line_with(&self.lines, what, || None) {
            Ok((at, _)) => Ok(at),
            Err(error) => {
                let mut said = String::new();
                if let Some(mut errors) = self.process.stderr.take()
                    && !matches!(self.process.try_wait(), Ok(None))
                {
                    errors.read_to_string(&mut said)?;
                }
                Err(error.context(format!("QEMU says {said:?}")))
            }
        }
    }

    /// Writes a line to its console.
    pub(super) fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.serial, "{line}")?;
        self.serial.flush()?;
        Ok(())
    }

    /// Has the guest's first process say something again.
    pub(super) fn echo(&mut self, word: &str) -> Result<Instant> {
        self.say(word)?;
        self.line(&format!("@echo {word}"))
    }

    /// Asks the monitor for something.
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        if self.session.is_none() {
            self.session = Some(Monitor::open(&self.monitor)?);
        }
        let session = self.session.as_mut().context("a monitor")?;
        session.ask(command, arguments)
    }

    /// Waits until it runs. What is said to it before that would be lost.
    pub(super) fn running(&mut self) -> Result<()> {
        let end = Instant::now() + LONG;
        while !self.monitor.exists() {
            ensure!(Instant::now() < end, "QEMU has no monitor");
            std::thread::sleep(AGAIN);
        }
        loop {
            let state = self.ask("query-status", &json!({}))?;
            match state.get("running").and_then(Value::as_bool) {
                Some(true) => return Ok(()),
                _ => ensure!(Instant::now() < end, "QEMU does not run: {state}"),
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Writes its whole state to a file; it stands still then.
    pub(super) fn snapshot(&mut self, file: &Path) -> Result<()> {
        let uri = format!("exec:cat >{}", file.display());
        self.ask("migrate", &json!({ "uri": uri }))?;
        let end = Instant::now() + LONG;
        loop {
            let state = self.ask("query-migrate", &json!({}))?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU's snapshot failed: {state}"),
                _ => ensure!(Instant::now() < end, "QEMU's snapshot takes too long: {state}"),
            }
            std::thread::sleep(AGAIN);
        }
    }
}

fn command(world: &World, qemu: &world::Qemu, config: &Config<'_>, monitor: &Path) -> Command {
    let mut command = Command::new(&qemu.program);
    command
        .args(["-M", MACHINE, "-cpu", "host", "-nodefaults", "-no-user-config"])
        .args(["-no-reboot", "-nographic", "-serial", "stdio", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", monitor.display()))
        .args(["-m", &format!("{}M", config.memory_mib), "-append", config.cmdline])
        .arg("-bios")
        .arg(&qemu.firmware)
        .arg("-kernel")
        .arg(config.kernel)
        .arg("-initrd")
        .arg(&world.image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(incoming) = config.incoming {
        command.args(["-incoming", incoming]);
    }
    if let Some(cid) = config.vsock {
        command.args(["-device", &format!("vhost-vsock-device,guest-cid={cid}")]);
    }
    command
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.process.kill());
        drop(self.process.wait());
        drop(std::fs::remove_file(&self.monitor));
    }
}

/// A session with a machine's monitor (QMP).
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn open(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context("connecting to QEMU's monitor")?;
        stream.set_read_timeout(Some(LONG))?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.hear()?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "QEMU's monitor has ended");
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{request}")?;
        loop {
            let mut said = self.hear()?;
            if let Some(error) = said.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            // Events come in between.
            if let Some(value) = said.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}
