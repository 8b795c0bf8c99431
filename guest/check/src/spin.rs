//! A program that never waits, and looks again and again which machine it runs in.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::say;

const GENERATION: &str = "/run/ukp/generation";
/// Nobody forks after so long.
const LIMIT: Duration = Duration::from_mins(2);

/// In the child: how long this did not run until it saw the new generation, and how long making this
/// another machine took. The parent's ends with its connection to the host.
pub fn until_another_machine() -> Result<()> {
    let old = std::fs::read(GENERATION)?;
    say::here(&[("spinning", String::new())])?;
    let begin = Instant::now();
    let mut last = Instant::now();
    loop {
        let now = Instant::now();
        let read = std::fs::read(GENERATION)?;
        if read != old {
            // It may have stopped within the read that gave the old one.
            let gap = last.elapsed().as_micros().to_string();
            return say::in_child(&[("gap", gap), ("renewing", renewing()?)]);
        }
        if begin.elapsed() > LIMIT {
            bail!("nobody has forked this machine");
        }
        last = now;
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
