//! A Linux guest of ours: booted, asked, and what it says.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use runtime::agent::{Agent, AgentError, Command, Said};
use runtime::owner::Owner;
use runtime::proto::{Event, InstanceConfig};
use uuid::Uuid;

use super::clock::LONG;
use super::world::World;

/// After so long without a line it is looked whether there can be more.
const LOOK: Duration = Duration::from_secs(1);
/// Between two questions to somebody who is not there yet.
const AGAIN: Duration = Duration::from_millis(1);

/// What the agent is told to run: nothing that ends.
const WORKLOAD: [&str; 3] = ["/bin/sh", "-c", "mkfifo /run/end; read code </run/end; exit $code"];

/// Its owner, and lines of the root's console with the time at which each was complete.
pub(super) struct Guest {
    pub(super) owner: Owner,
    pub(super) root: Uuid,
    pub(super) lines: Receiver<(Instant, String)>,
}

impl Guest {
    /// Starts a machine with the kernel and the image.
    pub(super) fn start(world: &World, memory_mib: u32, cmdline: &str) -> Result<Self> {
        let (sender, lines) = channel();
        let mut console = Console::default();
        let console = std::sync::Mutex::new(move |bytes: &[u8]| {
            for line in console.hear(bytes) {
                // Nobody listens any more, otherwise.
                sender.send((Instant::now(), line)).unwrap_or(());
            }
        });
        let root = std::sync::OnceLock::new();
        let owner = Owner::with_listener(Box::new(move |uuid, event| {
            // The first to speak is the root; what its children say is not looked at.
            if let (Event::Console { bytes }, true) = (event, *root.get_or_init(|| uuid) == uuid)
                && let Ok(mut console) = console.lock()
            {
                console(bytes);
            }
        }))?;
        let argv = WORKLOAD.map(str::to_owned).to_vec();
        let root = owner.start(InstanceConfig {
            memory_mib,
            kernel: world.kernel.clone(),
            initrd: world.image.clone(),
            initrd_tail: guest_image::config_segment(&guest_image::Config::command(argv))?,
            cmdline: cmdline.to_owned(),
            ..InstanceConfig::default()
        })?;
        Ok(Self { owner, root, lines })
    }

    /// A connection to the agent of an instance.
    pub(super) fn agent(&self, instance: Uuid) -> Result<Agent, AgentError> {
        Agent::connect(self.owner.folder(), instance)
    }

    /// Waits until the agent of an instance has answered with the instance's UUID.
    pub(super) fn ready(&self, instance: Uuid) -> Result<()> {
        let end = Instant::now() + LONG;
        loop {
            match self.agent(instance).and_then(Agent::ping) {
                Ok((uuid, _)) if uuid == instance => return Ok(()),
                // A root learns who it is from its owner.
                Ok((uuid, _)) if uuid.is_nil() => std::thread::sleep(AGAIN),
                Ok((uuid, _)) => bail!("{instance} answers as {uuid}"),
                Err(error) if Instant::now() > end => {
                    return Err(error).context("waiting for the agent");
                }
                Err(_) => {
                    let exit = self.owner.with(instance, |known| known.exit.clone())?;
                    ensure!(exit.is_none(), "{instance} has ended: {exit:?}");
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }

    /// Runs a program to its end; what it wrote. It must end well.
    pub(super) fn run(&self, instance: Uuid, argv: &[&str]) -> Result<String> {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        let mut running = self.agent(instance)?.exec(&Command { argv, ..Command::default() })?;
        running.input()?.send(&[])?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match running.hear()? {
                Said::Out(bytes) => out.extend(bytes),
                Said::Err(bytes) => err.extend(bytes),
                Said::Exited(0) => return Ok(String::from_utf8_lossy(&out).into_owned()),
                Said::Exited(code) => {
                    bail!("it ended with {code}: {}", String::from_utf8_lossy(&err))
                }
            }
        }
    }

    /// The next line of the root's console that has `what` in it, and when it came.
    pub(super) fn line(&self, what: &str) -> Result<Instant> {
        let ended = || {
            let exit = self.owner.with(self.root, |known| known.exit.clone()).ok().flatten()?;
            Some(format!("it has ended: {exit:?}"))
        };
        line_with(&self.lines, what, ended).map(|(at, _)| at)
    }

    /// Ends an instance and waits until it is gone.
    pub(super) fn end(&self, instance: Uuid) -> Result<()> {
        self.owner.kill(instance)?;
        self.owner.wait_exit(instance, LONG)?;
        self.owner.forget(instance);
        Ok(())
    }
}

/// The next line that has `what` in it. Now and then `ended` is asked whether there can be none.
pub(super) fn line_with(
    lines: &Receiver<(Instant, String)>,
    what: &str,
    ended: impl Fn() -> Option<String>,
) -> Result<(Instant, String)> {
    let end = Instant::now() + LONG;
    let mut last = String::new();
    let why = loop {
        match lines.recv_timeout(LOOK) {
            Ok((at, line)) if line.contains(what) => return Ok((at, line)),
            Ok((_, line)) => last = line,
            Err(RecvTimeoutError::Timeout) => match ended() {
                Some(why) => break why,
                None if Instant::now() > end => break "it takes too long".to_owned(),
                None => {}
            },
            Err(RecvTimeoutError::Disconnected) => break "it has ended".to_owned(),
        }
    };
    bail!("the guest has not said {what:?}, and {why}; it said last: {last:?}")
}

/// Puts lines together.
#[derive(Debug, Default)]
pub(super) struct Console(Vec<u8>);

/// Longest line that is kept whole.
const LINE: usize = 16 * 1024;

impl Console {
    /// The lines that `bytes` complete.
    pub(super) fn hear(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for byte in bytes {
            if *byte == b'\n' || self.0.len() >= LINE {
                lines.push(String::from_utf8_lossy(&self.0).trim_end().to_owned());
                self.0.clear();
            } else {
                self.0.push(*byte);
            }
        }
        lines
    }
}
