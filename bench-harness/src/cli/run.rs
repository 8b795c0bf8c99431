//! The commands that measure: `run`, `json`, `samples`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::{OpenLab, Purpose, SetArg};
use crate::progress::Terminal;
use crate::report::{Revision, ScenarioSummary, json_line, write};
use crate::scenario::{Catalogue, Scenario};
use crate::session::{self, LabError, Outcome, ScenarioRun, Session, Silent};
use crate::stats::Batch;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Scenarios to run; without any, those of the set.
    #[arg(value_name = "SCENARIO")]
    names: Vec<String>,
    /// Which set to run.
    #[arg(long, value_enum, default_value_t)]
    set: SetArg,
    /// Folder that gets the folder of this run.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    out: PathBuf,
    /// Print each scenario as one JSON object per line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct JsonArgs {
    /// Scenario to run.
    #[arg(value_name = "SCENARIO")]
    name: String,
    /// Also write a report below this folder.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct InsideArgs {
    /// The scenario as JSON.
    scenario: String,
}

#[derive(Debug, Args)]
pub(super) struct SamplesArgs {
    /// Scenario to run.
    #[arg(value_name = "SCENARIO")]
    name: String,
    /// Forks of the batch.
    #[arg(long, default_value_t = 25)]
    forks: u32,
    /// Forks before them that are not counted.
    #[arg(long, default_value_t = 5)]
    warmup: u32,
    /// Time by which each fork is made slower, in µs.
    #[arg(long, default_value_t = 0, hide = true)]
    delay_us: u32,
}

pub(super) fn run(
    args: &RunArgs,
    catalogue: &Catalogue,
    open_lab: OpenLab<'_>,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let scenarios = catalogue.select(args.set.into(), &args.names)?;
    // Before the run, as it would be a pity to learn it afterwards.
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("{} cannot be made", args.out.display()))?;
    // Likewise: what is edited while it runs is not what was measured.
    let revision = Revision::read();
    let session = measure(&scenarios, open_lab)?;
    let (folder, summary) = write(&session, revision, &args.out)?;
    if args.json {
        for scenario in &summary.scenarios {
            writeln!(out, "{}", json_line(scenario)?)?;
        }
    } else {
        writeln!(out, "{}", folder.join("README.md").display())?;
    }
    finish(&session)
}

pub(super) fn json(
    args: &JsonArgs,
    catalogue: &Catalogue,
    open_lab: OpenLab<'_>,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let scenario = catalogue.get(&args.name)?.clone();
    let revision = Revision::read();
    let session = measure(std::slice::from_ref(&scenario), open_lab)?;
    if let Some(folder) = &args.out {
        write(&session, revision, folder)?;
    }
    finish(&session)?;
    let (_, outcome) = session.outcomes.first().context("nothing was measured")?;
    match outcome {
        Outcome::Done(run) => {
            let summary = ScenarioSummary::new(&scenario, &session.host_kind, run);
            writeln!(out, "{}", json_line(&summary)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Unavailable(reason) => bail!("{} cannot run on this host: {reason}", args.name),
    }
}

pub(super) fn inside(args: &InsideArgs, out: &mut dyn Write) -> Result<ExitCode> {
    let scenario = serde_json::from_str(&args.scenario).context("the scenario")?;
    crate::linux::inside(&scenario, out)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn samples(
    args: &SamplesArgs,
    catalogue: &Catalogue,
    open_lab: OpenLab<'_>,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let mut scenario = catalogue.get(&args.name)?.clone();
    scenario.forks = args.forks;
    scenario.warmup = args.warmup;
    scenario.delay_us = args.delay_us;
    let run = open_lab(Purpose::Batch)?.run(&scenario, &mut Silent).map_err(without_layer)?;
    writeln!(out, "{}", serde_json::to_string(&batch(&run))?)?;
    Ok(ExitCode::SUCCESS)
}

/// What `ab` needs of a run.
fn batch(run: &ScenarioRun) -> Batch {
    let recorder = &run.recorder;
    let finite = |name: &str| {
        let samples = recorder.samples(name).into_iter().filter(|sample| sample.is_finite());
        (name.to_owned(), samples.collect())
    };
    let metrics: BTreeMap<String, Vec<f64>> = recorder.metrics().map(finite).collect();
    Batch { metrics, failed: recorder.failed() as u64 }
}

fn measure(scenarios: &[Scenario], open_lab: OpenLab<'_>) -> Result<Session> {
    let mut lab = open_lab(Purpose::Report)?;
    let command = std::env::args().collect::<Vec<_>>();
    // The program's name only: its path says where somebody keeps their files.
    let name = command.first().and_then(|path| path.rsplit('/').next()).unwrap_or("bench-harness");
    let command = [&[name.to_owned()], command.get(1..).unwrap_or_default()].concat().join(" ");
    session::run(&mut *lab, scenarios, &command, &mut Terminal::new()).map_err(without_layer)
}

/// The laboratory's own error, without "scenario failed" around it if it says more.
fn without_layer(error: LabError) -> anyhow::Error {
    match error {
        LabError::Failed(source) => anyhow::Error::from_boxed(source),
        other => other.into(),
    }
}

fn finish(session: &Session) -> Result<ExitCode> {
    match (&session.void, &session.ended) {
        (Some(why), _) => bail!("void run: {why}"),
        (_, Some(why)) => bail!("the run is incomplete; it ended at {why}"),
        (None, None) => Ok(ExitCode::SUCCESS),
    }
}
