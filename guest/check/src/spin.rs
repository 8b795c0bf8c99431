//! A program that never waits, and looks again and again which machine it runs in.
//!
//! The host changes the generation id of ACPI before a child executes anything; the agent writes the
//! generation file when the child is another machine. What sees the new id and the old file runs in a
//! child that is still its parent: *early*.

use std::fs::{File, read};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::say;

const GENERATION: &str = "/run/ukp/generation";
/// What the agent writes before it is moved there. As a pipe it keeps the agent waiting.
const NEW: &str = "/run/ukp/generation.new";
/// Where the generation id of ACPI is.
const ID: u64 = 0xfe000;
/// Nobody forks after so long.
const LIMIT: Duration = Duration::from_mins(2);
/// Early rounds that are enough.
const ENOUGH: u32 = 100;

/// In the child: how often this ran early, how long it did not run until it saw the new generation,
/// and how long making this another machine took. The parent's ends with its connection to the host.
pub fn until_another_machine() -> Result<()> {
    let spin = Spin::begin()?;
    let begin = Instant::now();
    let mut last = Instant::now();
    let mut early = 0_u32;
    loop {
        let now = Instant::now();
        // The id first: whoever is stopped in between sees the new file.
        let id = spin.id()?;
        let other = read(GENERATION)? != spin.old;
        early = early.saturating_add(u32::from(id != spin.old_id && !other));
        if other {
            ensure!(spin.id()? != spin.old_id, "the generation changed and the id did not");
            // It may have stopped within the read that gave the old one.
            let gap = last.elapsed().as_micros().to_string();
            let early = early.to_string();
            return say::in_child(&[("early", early), ("gap", gap), ("renewing", renewing()?)]);
        }
        if begin.elapsed() > LIMIT {
            bail!("nobody has forked this machine");
        }
        last = now;
    }
}

/// The same where nobody is frozen and the agent of the child has to wait, for this opens the pipe
/// that it writes the generation to only after some early rounds.
pub fn early() -> Result<()> {
    let spin = Spin::begin()?;
    let begin = Instant::now();
    let mut early = 0;
    while early < ENOUGH {
        early += u32::from(spin.id()? != spin.old_id && read(GENERATION)? == spin.old);
        if begin.elapsed() > LIMIT {
            bail!("{early} early rounds only");
        }
    }
    let generation = std::fs::read_to_string(NEW).context("letting the agent go on")?;
    say::in_child(&[("early", early.to_string()), ("written", generation.trim().to_owned())])
}

struct Spin {
    memory: File,
    old: Vec<u8>,
    old_id: [u8; 16],
}

impl Spin {
    fn begin() -> Result<Self> {
        let memory = File::open("/dev/mem").context("opening memory")?;
        let mut spin = Self { memory, old: read(GENERATION)?, old_id: [0; 16] };
        spin.old_id = spin.id()?;
        ensure!(spin.old_id != [0; 16], "there is no generation id");
        say::here(&[("spinning", String::new())])?;
        Ok(spin)
    }

    fn id(&self) -> Result<[u8; 16]> {
        let mut id = [0; 16];
        self.memory.read_exact_at(&mut id, ID).context("reading memory")?;
        Ok(id)
    }
}

/// In microseconds, as the agent has measured it.
fn renewing() -> Result<String> {
    let output = Command::new("/.uk/ukp").arg("status").output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find_map(|line| line.strip_prefix("of that, renewing"));
    let time = line.with_context(|| format!("no such line: {text}"))?;
    Ok(time.trim().trim_end_matches(" us").to_owned())
}
