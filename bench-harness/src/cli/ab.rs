//! `ab`: two executables of this program, measured in turn.
//!
//! They are given as files, or as two revisions that are built first. Each batch is a process of its
//! own: `EXECUTABLE samples SCENARIO`. A timing alarm is measured again with other coins before it
//! counts; more failed forks count at once.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::plot::{Curve, percentile_curves};
use crate::progress::Terminal;
use crate::session::Progress as _;
use crate::stats::{Batch, Judgement, Plan, Thresholds, Unit, interleave, judge};

#[derive(Debug, Args)]
pub(super) struct AbArgs {
    /// Revisions of base and change, to be built in worktrees of their own.
    #[arg(value_name = "REVISION", num_args = 2, required_unless_present = "base")]
    revisions: Vec<String>,
    /// Executable of the base.
    #[arg(long, value_name = "FILE", conflicts_with = "revisions", requires = "change")]
    base: Option<PathBuf>,
    /// Executable of the change.
    #[arg(long, value_name = "FILE", conflicts_with = "revisions", requires = "base")]
    change: Option<PathBuf>,
    /// Scenarios to compare.
    #[arg(long = "scenario", value_name = "NAME", default_values_t = SCENARIOS.map(str::to_owned))]
    names: Vec<String>,
    /// Metrics to decide on; each makes the others' p stricter.
    #[arg(long = "metric", value_name = "NAME", default_values_t = ["branch_us".to_owned()])]
    metrics: Vec<String>,
    /// Units of four batches, per scenario.
    #[arg(long, default_value_t = Plan::default().units)]
    units: u32,
    /// Forks per batch.
    #[arg(long, default_value_t = 25)]
    forks: u32,
    /// Seed of the coins that order the batches.
    #[arg(long, default_value_t = Plan::default().seed)]
    seed: u64,
    /// Largest p of a false alarm.
    #[arg(long, default_value_t = Thresholds::default().p)]
    p: f64,
    /// Smallest slow-down that alarms, in µs.
    #[arg(long, default_value_t = Thresholds::default().absolute_us)]
    absolute_us: f64,
    /// Smallest slow-down that alarms, as a fraction.
    #[arg(long, default_value_t = Thresholds::default().relative)]
    relative: f64,
    /// Write all units (JSON) and a plot per scenario and metric into this folder.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Time by which each fork of the change is made slower, in µs.
    #[arg(long, default_value_t = 0, hide = true)]
    delay_us: u32,
}

/// Scenarios that are compared if nobody says which.
const SCENARIOS: [&str; 2] = ["quiet", "dirty-100"];

impl AbArgs {
    /// Two executables, and for everything else what the command line has by default.
    pub(super) fn new(base: PathBuf, change: PathBuf, units: u32) -> Self {
        let Thresholds { p, absolute_us, relative } = Thresholds::default();
        Self {
            revisions: Vec::new(),
            base: Some(base),
            change: Some(change),
            names: SCENARIOS.map(str::to_owned).to_vec(),
            metrics: vec!["branch_us".to_owned()],
            units,
            forks: 25,
            seed: Plan::default().seed,
            p,
            absolute_us,
            relative,
            out: None,
            delay_us: 0,
        }
    }

    /// One scenario of those of the gate, with other coins, and a slower change. Thresholds stay
    /// those of all.
    pub(super) fn of_one(self, name: &str, seed: u64, delay_us: u32) -> Self {
        let all = self.names.len();
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let p = self.p / all as f64;
        Self { names: vec![name.to_owned()], seed, delay_us, p, ..self }
    }

    /// The executables of base and change.
    fn sides(&self) -> Result<[PathBuf; 2]> {
        if let (Some(base), Some(change)) = (&self.base, &self.change) {
            return Ok([base.clone(), change.clone()]);
        }
        let mut built = super::gate::executables(&self.revisions)?.into_iter();
        built.next().zip(built.next()).map(<[_; 2]>::from).context("two revisions are compared")
    }
}

pub(super) fn ab(args: &AbArgs, scenarios: Option<&Path>, out: &mut dyn Write) -> Result<ExitCode> {
    Ok(if compare(args, scenarios, out)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Compares; `false` is an alarm.
pub(super) fn compare(
    args: &AbArgs,
    scenarios: Option<&Path>,
    out: &mut dyn Write,
) -> Result<bool> {
    judged(args, scenarios, out).map(|(good, _)| good)
}

/// The same with the p50 of base, of the last scenario.
pub(super) fn judged(
    args: &AbArgs,
    scenarios: Option<&Path>,
    out: &mut dyn Write,
) -> Result<(bool, f64)> {
    let sides = args.sides()?;
    let mut alarms = Vec::new();
    let mut base_us = f64::NAN;
    for name in &args.names {
        let mut judgement = round(args, &sides, scenarios, (name, args.seed), out)?;
        if judgement.timing_alarm() && !judgement.failure_alarm() {
            writeln!(out, "{name}: measuring the alarm again")?;
            judgement = round(args, &sides, scenarios, (name, !args.seed), out)?;
        }
        if judgement.timing_alarm() || judgement.failure_alarm() {
            alarms.push(name.as_str());
        }
        base_us = judgement.metrics.first().map_or(f64::NAN, |metric| metric.a_us);
    }
    if alarms.is_empty() {
        writeln!(out, "no alarm")?;
        return Ok((true, base_us));
    }
    writeln!(out, "ALARM: {}", alarms.join(", "))?;
    Ok((false, base_us))
}

/// One scenario once.
fn round(
    args: &AbArgs,
    [base, change]: &[PathBuf; 2],
    scenarios: Option<&Path>,
    (name, seed): (&str, u64),
    out: &mut dyn Write,
) -> Result<Judgement> {
    let plan = Plan { units: args.units, seed };
    let side =
        |executable: &Path, delay_us| batch(executable, scenarios, name, (args.forks, delay_us));
    let mut progress = Terminal::new();
    progress.title(name);
    // Each unit has four batches.
    progress.phase("batches", 4 * u64::from(args.units));
    let measured = |_, _: &Batch| progress.advance(1);
    let units = interleave(&plan, || side(base, 0), || side(change, args.delay_us), measured)?;
    drop(progress);
    let metrics: Vec<&str> = args.metrics.iter().map(String::as_str).collect();
    let thresholds =
        Thresholds { p: args.p, absolute_us: args.absolute_us, relative: args.relative };
    let judgement = judge(&units, &metrics, metrics.len() * args.names.len(), &thresholds);
    for metric in &judgement.metrics {
        writeln!(out, "{name} {metric}")?;
    }
    if judgement.failed != (0, 0) {
        let (a, b) = judgement.failed;
        writeln!(out, "{name} failed forks: {a} in A, {b} in B")?;
    }
    if let Some(folder) = &args.out {
        keep(folder, name, seed, &units, &metrics)?;
    }
    Ok(judgement)
}

/// Measures one batch in a process of its own.
fn batch(
    executable: &Path,
    scenarios: Option<&Path>,
    name: &str,
    (forks, delay_us): (u32, u32),
) -> Result<Batch> {
    let mut command = Command::new(executable);
    command.args(["samples", name, "--forks", &forks.to_string()]);
    if delay_us > 0 {
        // Bases from before this option know of no delay.
        command.args(["--delay-us", &delay_us.to_string()]);
    }
    if let Some(path) = scenarios {
        command.arg("--scenarios").arg(path);
    }
    let output =
        command.output().with_context(|| format!("{} cannot be started", executable.display()))?;
    if !output.status.success() {
        let mut text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        // Writing to a String cannot fail.
        let _infallible = write!(text, " ({})", output.status);
        bail!("{} samples {name}: {text}", executable.display());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line)
        .with_context(|| format!("{} samples {name}: not a batch", executable.display()))
}

/// Keeps what was measured.
fn keep(folder: &Path, name: &str, seed: u64, units: &[Unit], metrics: &[&str]) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("{} cannot be made", folder.display()))?;
    let write = |file: String, text: String| {
        let path = folder.join(file);
        std::fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
    };
    write(format!("ab-{name}-{seed:x}.json"), serde_json::to_string(units)?)?;
    for metric in metrics {
        let side = |batches: fn(&Unit) -> &Vec<Batch>| -> Vec<f64> {
            let batches = units.iter().flat_map(batches);
            batches.filter_map(|batch| batch.metrics.get(*metric)).flatten().copied().collect()
        };
        let (a, b) = (side(|unit| &unit.a), side(|unit| &unit.b));
        let curves = [Curve { label: "A", samples_us: &a }, Curve { label: "B", samples_us: &b }];
        let about = "all batches pooled: for looking, the verdict is by units";
        let text = percentile_curves(&format!("{name}: A against B"), about, metric, &curves);
        write(format!("ab-{name}-{metric}-{seed:x}.svg"), text)?;
    }
    Ok(())
}
