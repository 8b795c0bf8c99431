//! Shows that the gate does not cry wolf, and that it sees.
//!
//! The same executable on both sides, on the workload `quiet`: first as it is, many times; then
//! with forks that are made 15 % slower in B (an injected delay at the first step), and with one
//! more ioctl per fork (dirty pages from the bitmap instead of the ring).

use std::io::Write;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::budgets::Budgets;
use super::count::{count, run};
use super::workload::{ALL, Variant, Workload};
use crate::stats::{Batch, Judgement, Plan, Thresholds, interleave, judge};

/// By how much forks are made slower, in per cent.
const SLOWER: f64 = 15.0;
/// Comparisons of the gate: its thresholds count as many.
const COMPARISONS: usize = 2;

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Runs of A against A.
    pub runs: u32,
    /// Runs of A against a slower A.
    pub slower: u32,
    /// Units per run.
    pub units: u32,
    /// Forks per batch.
    pub forks: u32,
}

/// Shows it; `false` if one run was not as it should be.
///
/// # Errors
///
/// What the engine or the tracer says.
pub fn prove(extent: &Extent, budgets: &Budgets, out: &mut dyn Write) -> Result<bool> {
    let quiet = ALL.first().context("there are no workloads")?;
    let mut wolves = 0;
    let mut p50 = Vec::new();
    for seed in 0..u64::from(extent.runs) {
        let (alarm, judgement) = compare(quiet, extent, 0, seed)?;
        wolves += u32::from(alarm);
        p50.extend(judgement.metrics.iter().map(|metric| metric.a_us));
        tell(out, &format!("A against A, run {}", seed + 1), alarm, &judgement)?;
    }
    p50.sort_by(f64::total_cmp);
    let base_us = match p50.get(p50.len() / 2) {
        Some(us) => *us,
        None => batch(quiet, extent, 0)?.median("branch_us").context("a batch without forks")?,
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some ten µs")]
    let delay_us = (base_us * SLOWER / 100.0).round() as u32;
    let mut missed = 0;
    for seed in 0..u64::from(extent.slower) {
        let (alarm, judgement) = compare(quiet, extent, delay_us, 1000 + seed)?;
        missed += u32::from(!alarm);
        let what = format!("B {delay_us} µs slower, run {}", seed + 1);
        tell(out, &what, alarm, &judgement)?;
    }
    let ioctl = one_more_ioctl(quiet, budgets, out)?;
    writeln!(
        out,
        "A against A: {wolves} alarms in {} runs; {SLOWER} % slower: {} alarms in {} runs; \
         one more ioctl: {}",
        extent.runs,
        extent.slower - missed,
        extent.slower,
        if ioctl { "an alarm" } else { "NO alarm" },
    )?;
    Ok(wolves == 0 && missed == 0 && ioctl)
}

/// Compares once, and again with other coins if that alarms.
fn compare(
    workload: &Workload,
    extent: &Extent,
    delay_us: u32,
    seed: u64,
) -> Result<(bool, Judgement)> {
    let once = |seed| -> Result<Judgement> {
        let plan = Plan { units: extent.units, seed };
        let side = |delay_us| batch(workload, extent, delay_us);
        let units = interleave(&plan, || side(0), || side(delay_us), |_, _| ())?;
        Ok(judge(&units, &["branch_us"], COMPARISONS, &Thresholds::default()))
    };
    let first = once(seed)?;
    if !first.timing_alarm() {
        return Ok((false, first));
    }
    let second = once(!seed)?;
    Ok((second.timing_alarm(), second))
}

fn batch(workload: &Workload, extent: &Extent, delay_us: u32) -> Result<Batch> {
    // Exact counts need more calm than times do.
    let calm = Duration::from_millis(2);
    let variant = Variant { warmup: 5, forks: extent.forks, delay_us, bitmap: false, calm };
    let forks = run(workload, &variant, None)?;
    let samples = forks.iter().map(|fork| fork.branch_us).collect();
    Ok(Batch { metrics: [("branch_us".to_owned(), samples)].into(), ..Batch::default() })
}

fn tell(out: &mut dyn Write, what: &str, alarm: bool, judgement: &Judgement) -> Result<()> {
    for metric in &judgement.metrics {
        writeln!(out, "{what}: {}: {metric}", if alarm { "ALARM" } else { "no alarm" })?;
    }
    Ok(out.flush()?)
}

fn one_more_ioctl(quiet: &Workload, budgets: &Budgets, out: &mut dyn Write) -> Result<bool> {
    let variant = Variant { bitmap: true, ..Variant::default() };
    let lines = budgets.differences(quiet.name, &count(quiet, &variant)?);
    for line in &lines {
        writeln!(out, "bitmap instead of ring: {line}")?;
    }
    Ok(lines.iter().any(|line| line.contains("parent: ioctl KVM_GET_DIRTY_LOG")))
}
