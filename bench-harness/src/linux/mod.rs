//! Linux guests: forks, boots and sockets of ours, and what QEMU does on the same host, in turn.
//!
//! ```text
//!   Scenario ── world: kernel, image, QEMU ──┬─ this KVM runs Linux ─── inside ───┐
//!                                            └─ else: nested host ── the same ────┤
//!                                                    program, as `inside`         │
//!                                ScenarioRun <── told: messages, there as lines <─┘
//! ```
//!
//! In the nested host everything is emulated and about fifty times slower than on hardware: figures
//! from there are ratios.

mod boot;
mod clock;
mod fork;
mod guest;
mod qemu;
mod told;
mod vsock;
mod world;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nested_host::{Place, Program};

use crate::scenario::{Kind, Scenario};
use crate::session::{LabError, Progress, ScenarioRun};
use told::{Listener, Told};
use world::World;

/// What the nested host may take for one scenario.
const LIMIT: Duration = Duration::from_mins(20);
/// Begins a message on the serial line.
const MARK: &str = "@bench ";

/// Carries a scenario out where Linux runs.
///
/// # Errors
///
/// As [`crate::session::Lab::run`].
pub fn run(scenario: &Scenario, progress: &mut dyn Progress) -> Result<ScenarioRun, LabError> {
    let world = World::find().map_err(|missing| LabError::Unavailable { reason: missing })?;
    let place = Place::choose();
    let mut listener = Listener::new(progress);
    let done = match &place {
        Place::Here(kind) => {
            listener.run.host = Some(kind.name().to_owned());
            measure(scenario, &world, &mut |told| listener.hear(told))
        }
        Place::Emulated { why } => {
            if let Some(missing) = nested_host::missing() {
                return Err(LabError::Unavailable { reason: missing });
            }
            listener.run.host = Some("nested".to_owned());
            listener.run.notes.push(format!(
                "{why}, so this ran in the nested test host, under software emulation with one \
                 processor: its figures are ratios and say nothing about hardware"
            ));
            nested(scenario, &world, &mut listener)
        }
    };
    listener.finish(done)
}

fn measure(scenario: &Scenario, world: &World, tell: &mut dyn FnMut(Told)) -> Result<()> {
    match scenario.kind {
        Kind::LinuxBoot => boot::boots(scenario, world, tell),
        Kind::LinuxVsock => vsock::sockets(scenario, world, tell),
        _ => fork::forks(scenario, world, tell),
    }
}

/// Runs this program again, in the nested host.
fn nested(scenario: &Scenario, world: &World, listener: &mut Listener<'_>) -> Result<()> {
    listener.hear(Told::Phase { what: "nested host".to_owned(), total: 1 });
    let program = Program {
        name: "bench".to_owned(),
        path: std::env::current_exe().context("looking for this program")?,
        arguments: vec!["inside".to_owned(), serde_json::to_string(scenario)?],
        ..world.packed()
    };
    let mut last = Vec::new();
    let ended = nested_host::run(&[program], LIMIT, |line| {
        let told = line.strip_prefix(MARK).and_then(|text| serde_json::from_str(text).ok());
        match told {
            Some(told) => listener.hear(told),
            None if line.is_empty() => {}
            None => {
                last.push(line.to_owned());
                let many = last.len().saturating_sub(20);
                last.drain(..many);
            }
        }
    })?;
    let code = ended.first().context("no program ran")?.code;
    ensure!(code == 0, "the program in the nested host ended with {code}: {}", last.join(" | "));
    Ok(())
}

/// The part that runs in the nested host: tells everything on the output.
///
/// # Errors
///
/// What could not be told. What went wrong before is a message.
pub fn inside(scenario: &Scenario, out: &mut dyn std::io::Write) -> Result<()> {
    let mut written = Ok(());
    let mut tell = |told: Told| {
        if written.is_ok() {
            written = write_line(&told, out);
        }
    };
    if let Err(error) = measure(scenario, &World::inside(), &mut tell) {
        tell(Told::Failed { why: format!("{error:#}").replace('\n', " | ") });
    }
    written
}

fn write_line(told: &Told, out: &mut dyn std::io::Write) -> Result<()> {
    // Somebody else may have left half a line.
    writeln!(out, "\n{MARK}{}", serde_json::to_string(told)?)?;
    out.flush()?;
    Ok(())
}
