//! `compare`: two recorded runs next to each other.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::report::{RunSummary, ScenarioSummary};

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Folder or summary.json of the earlier run.
    #[arg(value_name = "A")]
    a: PathBuf,
    /// Folder or summary.json of the later run.
    #[arg(value_name = "B")]
    b: PathBuf,
}

pub(super) fn compare(args: &CompareArgs, out: &mut dyn Write) -> Result<ExitCode> {
    let a = RunSummary::read(&args.a).context("first run")?;
    let b = RunSummary::read(&args.b).context("second run")?;
    for (which, run) in [("first", &a), ("second", &b)] {
        if let Some(why) = &run.void {
            bail!("the {which} run is void, and none of its figures counts: {why}");
        }
        if let Some(why) = &run.ended {
            writeln!(out, "The {which} run is incomplete; it ended at {why}")?;
        }
    }
    writeln!(out, "A {} on {}, load {:.1}", a.revision, a.host.kernel, a.load[0][0])?;
    writeln!(out, "B {} on {}, load {:.1}", b.revision, b.host.kernel, b.load[0][0])?;
    writeln!(out, "Runs at different times differ by up to a factor of two on a shared machine;")?;
    writeln!(out, "branch/floor is the column to look at, `ab` is what decides.\n")?;
    writeln!(
        out,
        "{:<18} {:>10} {:>10} {:>8} {:>10} {:>10} {:>8} {:>8} {:>8}",
        "scenario", "A p50", "B p50", "", "A p99", "B p99", "", "A/floor", "B/floor"
    )?;
    for before in &a.scenarios {
        let Some(after) = b.scenario(&before.scenario.name) else {
            writeln!(out, "{:<18} only in A", before.scenario.name)?;
            continue;
        };
        row(before, after, out)?;
    }
    for only in b.scenarios.iter().filter(|s| a.scenario(&s.scenario.name).is_none()) {
        writeln!(out, "{:<18} only in B", only.scenario.name)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(a: &ScenarioSummary, b: &ScenarioSummary, out: &mut dyn Write) -> Result<()> {
    let name = &a.scenario.name;
    if a.scenario != b.scenario {
        writeln!(out, "{name:<18} is defined differently in A and B")?;
        return Ok(());
    }
    if let Some((before, after)) = a.branch().zip(b.branch()) {
        let change = |from: f64, to: f64| format!("{:+.0} %", (to / from - 1.0) * 100.0);
        let floor = |s: &ScenarioSummary| {
            s.branch_per_floor().map_or("–".to_owned(), |ratio| format!("{ratio:.2}"))
        };
        writeln!(
            out,
            "{name:<18} {:>10} {:>10} {:>8} {:>10} {:>10} {:>8} {:>8} {:>8}",
            before.p50,
            after.p50,
            change(before.p50.0, after.p50.0),
            before.p99,
            after.p99,
            change(before.p99.0, after.p99.0),
            floor(a),
            floor(b)
        )?;
    }
    Ok(())
}
