//! `gate`: fails if a fork does more, or takes longer, than recorded.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Args;

use super::ab::{self, AbArgs};
use super::{OpenLab, Purpose};
use crate::gate::base::{Base, FILE, Repository};
use crate::gate::budgets::{Budgets, stragglers};
use crate::gate::count::{Scratch, count};
use crate::gate::prove::{Extent, prove};
use crate::gate::workload::{self, Variant, Workload};

/// The recorded counts, from the top of the repository.
const BUDGETS: &str = "bench-harness/budgets.toml";
/// Scenarios of the comparison: small instances, so that many batches fit into CI's time.
const SCENARIOS: &str = include_str!("../../scenarios/gate.toml");

#[derive(Debug, Args)]
pub(super) struct GateArgs {
    /// Write what is counted into bench-harness/budgets.toml instead of comparing with it.
    #[arg(long)]
    record: bool,
    /// Count only; do not compare with the base.
    #[arg(long, conflicts_with = "prove")]
    counts: bool,
    /// Show that the gate does not cry wolf and that it sees: A against A, then injected changes.
    #[arg(long, conflicts_with = "record")]
    prove: bool,
    /// Units of four batches, per comparison.
    #[arg(long, default_value_t = 20)]
    units: u32,
    /// With --prove: runs of A against A.
    #[arg(long, default_value_t = 20)]
    runs: u32,
    /// With --prove: runs against a slower B.
    #[arg(long, default_value_t = 3)]
    slower: u32,
}

#[derive(Debug, Args)]
pub(super) struct WorkloadArgs {
    name: String,
    #[arg(long, default_value_t = Variant::default().warmup)]
    warmup: u32,
    #[arg(long, default_value_t = Variant::default().forks)]
    forks: u32,
    #[arg(long)]
    bitmap: bool,
}

/// Runs one workload: the part of the gate that is traced.
pub(super) fn workload(args: &WorkloadArgs, out: &mut dyn Write) -> Result<ExitCode> {
    let known = workload::ALL.iter().find(|known| known.name == args.name);
    let known = known.with_context(|| format!("there is no workload {}", args.name))?;
    let &WorkloadArgs { warmup, forks, bitmap, .. } = args;
    workload::run(known, &Variant { warmup, forks, bitmap }, out)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn gate(
    args: &GateArgs,
    open_lab: OpenLab<'_>,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let repository = Repository::here()?;
    let file = repository.file(BUDGETS);
    if args.prove {
        let extent = Extent { runs: args.runs, slower: args.slower };
        let own = std::env::current_exe().context("this program is gone")?;
        let (_scratch, scenarios) = scenarios()?;
        let proved = prove(&extent, &read(&file)?, out, |seed, delay_us, out| {
            let args = AbArgs::new(own.clone(), own.clone(), args.units);
            ab::judged(&args.of_one("quiet", seed, delay_us), Some(&scenarios), out)
        })?;
        return Ok(code(proved));
    }
    // From here on a signal ends this in good order: nothing that was made stays.
    drop(open_lab(Purpose::Batch)?);
    let counted = if args.record { record(&file, out)? } else { compare(&file, out)? };
    let timed = args.record || args.counts || time(args, &repository, out)?;
    writeln!(out, "gate: {}", if counted && timed { "passed" } else { "FAILED" })?;
    Ok(code(counted && timed))
}

fn code(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn read(file: &Path) -> Result<Budgets> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("{} cannot be read", file.display()))?;
    Budgets::parse(&text).with_context(|| format!("{} cannot be read", file.display()))
}

/// Counts every workload and hands the counts on.
fn counts(
    out: &mut dyn Write,
    mut take: impl FnMut(&Workload, &crate::gate::count::Seen) -> Vec<String>,
) -> Result<bool> {
    let mut good = true;
    for workload in &workload::ALL {
        let seen = count(workload, &Variant::default())?;
        for line in stragglers(&seen) {
            writeln!(out, "{} straggler: {line}", workload.name)?;
        }
        let lines = take(workload, &seen);
        good &= lines.is_empty();
        for line in &lines {
            writeln!(out, "{line}")?;
        }
        let verdict = if lines.is_empty() { "counts agree" } else { "counts do NOT agree" };
        writeln!(out, "{}: {verdict} ({} forks)", workload.name, seen.forks)?;
        out.flush()?;
    }
    Ok(good)
}

fn compare(file: &Path, out: &mut dyn Write) -> Result<bool> {
    let budgets = read(file)?;
    counts(out, |workload, seen| budgets.differences(workload.name, seen))
}

fn record(file: &Path, out: &mut dyn Write) -> Result<bool> {
    // One that cannot be read has no limits to keep.
    let old = read(file).unwrap_or_default();
    let mut budgets = Budgets::default();
    let good = counts(out, |workload, seen| {
        budgets.record(workload.name, seen, &old).err().unwrap_or_default()
    })?;
    if good {
        std::fs::write(file, budgets.text())
            .with_context(|| format!("{} cannot be written", file.display()))?;
        writeln!(out, "written: {}", file.display())?;
    }
    Ok(good)
}

/// The scenarios of the comparison, as a file in a folder that is removed when it is dropped.
fn scenarios() -> Result<(Scratch, PathBuf)> {
    let scratch = Scratch::new()?;
    let file = scratch.path().join("gate.toml");
    std::fs::write(&file, SCENARIOS)?;
    Ok((scratch, file))
}

/// Base against this executable.
fn time(args: &GateArgs, repository: &Repository, out: &mut dyn Write) -> Result<bool> {
    let text = std::fs::read_to_string(repository.file(FILE))
        .with_context(|| format!("{FILE} is missing: it names the revision to compare with"))?;
    let hash = match Base::parse(&text)? {
        Base::Revision(hash) => repository.resolve(&hash).context(FILE)?,
        Base::None(reason) => {
            writeln!(out, "gate: base and change were NOT compared: {reason}")?;
            return Ok(true);
        }
    };
    if hash == repository.resolve("HEAD")? && !repository.is_changed()? {
        writeln!(out, "gate: base and change were NOT compared: {FILE} names HEAD itself")?;
        return Ok(true);
    }
    let base = repository.build(&hash)?;
    let (_scratch, scenarios) = scenarios()?;
    let change = std::env::current_exe().context("this program is gone")?;
    writeln!(out, "base {hash} against this executable, {} units", args.units)?;
    out.flush()?;
    let args = AbArgs::new(base, change, args.units);
    let verdict = ab::compare(&args, Some(&scenarios), out)
        .context("base and change cannot be compared (was the base able to measure?)")?;
    Ok(verdict)
}

/// The executables of two revisions.
pub(super) fn executables(revisions: &[String]) -> Result<Vec<PathBuf>> {
    let repository = Repository::here()?;
    let build = |revision: &String| repository.build(&repository.resolve(revision)?);
    revisions.iter().map(build).collect()
}
