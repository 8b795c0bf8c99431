//! `ab`: two executables of this program, measured in turn.
//!
//! Each batch is a process of its own: `EXECUTABLE samples SCENARIO`. A timing alarm is measured
//! again with other coins before it counts; an exact count that differs counts at once.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::plot::{Curve, percentile_curves};
use crate::stats::{Batch, Judgement, Plan, Thresholds, Unit, interleave, judge};

#[derive(Debug, Args)]
pub(super) struct AbArgs {
    /// Executable of the base.
    #[arg(long, value_name = "FILE")]
    base: PathBuf,
    /// Executable of the change.
    #[arg(long, value_name = "FILE")]
    change: PathBuf,
    /// Scenarios to compare.
    #[arg(value_name = "SCENARIO", default_values_t = ["quiet".to_owned(), "dirty-100".to_owned()])]
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
}

pub(super) fn ab(args: &AbArgs, scenarios: Option<&Path>, out: &mut dyn Write) -> Result<ExitCode> {
    let mut alarms = Vec::new();
    for name in &args.names {
        let mut judgement = round(args, scenarios, name, args.seed, out)?;
        if judgement.timing_alarm() && !judgement.exact_alarm() {
            writeln!(out, "{name}: measuring the alarm again")?;
            judgement = round(args, scenarios, name, !args.seed, out)?;
        }
        if judgement.timing_alarm() || judgement.exact_alarm() {
            alarms.push(name.as_str());
        }
    }
    if alarms.is_empty() {
        writeln!(out, "no alarm")?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "ALARM: {}", alarms.join(", "))?;
    Ok(ExitCode::FAILURE)
}

/// One scenario once.
fn round(
    args: &AbArgs,
    scenarios: Option<&Path>,
    name: &str,
    seed: u64,
    out: &mut dyn Write,
) -> Result<Judgement> {
    let plan = Plan { units: args.units, seed };
    let side = |executable: &Path| batch(executable, scenarios, name, args.forks);
    let units = interleave(&plan, || side(&args.base), || side(&args.change), |_, _| ())?;
    let metrics: Vec<&str> = args.metrics.iter().map(String::as_str).collect();
    let thresholds =
        Thresholds { p: args.p, absolute_us: args.absolute_us, relative: args.relative };
    let judgement = judge(&units, &metrics, metrics.len() * args.names.len(), &thresholds);
    for metric in &judgement.metrics {
        writeln!(out, "{name} {metric}")?;
    }
    for count in &judgement.counts {
        writeln!(out, "{name} {count}")?;
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
fn batch(executable: &Path, scenarios: Option<&Path>, name: &str, forks: u32) -> Result<Batch> {
    let mut command = Command::new(executable);
    command.args(["samples", name, "--forks", &forks.to_string()]);
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
