//! Plots as SVG texts: percentile curves, stacked stages, and trends.
//!
//! Written by hand, because what there is does not fit: `plotters` rests since 2024, and
//! `charts-rs` 2.3 has no logarithmic axis, let alone one of nines. Each function takes data and
//! gives a complete file; none of them fails. Infinite samples (failed forks) cannot be drawn: the
//! curve ends before them and its legend says how many there are.

mod axis;
mod heat;
mod percentile;
mod stages;
mod svg;
mod trend;

pub use heat::heat_map;
pub use percentile::{Curve, percentile_curves};
pub use stages::{StageRow, stage_stack};
pub use trend::{TrendPoint, trend};

/// Width of all plots in px.
const WIDTH: f64 = 860.0;
/// Where the plotting area starts, in px from the left.
const LEFT: f64 = 78.0;
/// Where it ends.
const RIGHT: f64 = WIDTH - 30.0;

/// Colours that stay apart for colour-blind eyes and in print (after M. Okabe and K. Ito).
const COLOURS: [&str; 11] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31",
    "#6b7785", "#b2bf3f", "#8fd0c3",
];

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

#[cfg(test)]
mod tests;
