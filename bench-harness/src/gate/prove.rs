//! Shows that the gate does not cry wolf, and that it sees.
//!
//! The same executable on both sides of the gate's own comparison, on the scenario `quiet`: first as
//! it is, many times; then with forks that are made 15 % slower in B (an injected delay at the first
//! step). And one more ioctl per fork (dirty pages from the bitmap instead of the ring).

use std::io::Write;

use anyhow::{Context as _, Result};

use super::budgets::Budgets;
use super::count::count;
use super::workload::{ALL, Variant};

/// By how much forks are made slower, in per cent.
const SLOWER: f64 = 15.0;

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Runs of A against A.
    pub runs: u32,
    /// Runs of A against a slower A.
    pub slower: u32,
}

/// Shows it; `false` if one run was not as it should be. `compare` runs the comparison with a seed
/// and a delay of B in µs, and gives whether that passes and the p50 of A.
///
/// # Errors
///
/// What the engine or the tracer says.
pub fn prove(
    extent: &Extent,
    budgets: &Budgets,
    out: &mut dyn Write,
    mut compare: impl FnMut(u64, u32, &mut dyn Write) -> Result<(bool, f64)>,
) -> Result<bool> {
    let ioctl = one_more_ioctl(budgets, out)?;
    let mut wolves = 0;
    let mut p50 = Vec::new();
    for seed in 1..=u64::from(extent.runs.max(1)) {
        writeln!(out, "A against A, run {seed}")?;
        let (passed, base_us) = compare(seed, 0, out)?;
        wolves += u32::from(!passed);
        p50.push(base_us);
        out.flush()?;
    }
    p50.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some ten µs")]
    let delay_us = (p50[p50.len() / 2] * SLOWER / 100.0).round() as u32;
    let mut missed = 0;
    for seed in 1..=u64::from(extent.slower) {
        writeln!(out, "B {delay_us} µs slower, run {seed}")?;
        let (passed, _) = compare(1000 + seed, delay_us, out)?;
        missed += u32::from(passed);
        out.flush()?;
    }
    writeln!(
        out,
        "A against A: {wolves} alarms in {} runs; {SLOWER} % slower: {} alarms in {} runs; \
         one more ioctl: {}",
        extent.runs.max(1),
        extent.slower - missed,
        extent.slower,
        if ioctl { "an alarm" } else { "NO alarm" },
    )?;
    Ok(wolves == 0 && missed == 0 && ioctl)
}

fn one_more_ioctl(budgets: &Budgets, out: &mut dyn Write) -> Result<bool> {
    let quiet = ALL.first().context("there are no workloads")?;
    let variant = Variant { bitmap: true, ..Variant::default() };
    let lines = budgets.differences(quiet.name, &count(quiet, &variant)?);
    for line in &lines {
        writeln!(out, "bitmap instead of ring: {line}")?;
    }
    Ok(lines.iter().any(|line| line.contains("parent: ioctl KVM_GET_DIRTY_LOG")))
}
