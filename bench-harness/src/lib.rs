//! The bench of the fork engine: scenarios, samples, statistics, plots and reports.
//!
//! ```text
//! scenarios/*.toml ──> scenario ──> session ──> report ──> results/<run>/
//!                                     │  ▲        │
//!                                     ▼  │        ├── record: raw samples, percentiles, .hgrm
//!                              Lab: the engine    └── plot: SVG
//!
//! ab: two executables ──> stats::interleave ──> stats::judge ──> alarm or not
//! ```
//!
//! Nothing here knows how a machine is forked, except [`lab`] and, for Linux guests, [`linux`], behind
//! [`session::Lab`]. What
//! its figures are compared with, in the same run, is timed by [`baseline`].
//! What the figures mean is in `METHODOLOGY.md`, what they cannot say in `BIAS.md`.

#![warn(clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that fails should say where"))]

pub mod baseline;
pub mod cli;
pub mod gate;
pub mod lab;
pub mod linux;
pub mod plot;
pub mod progress;
pub mod record;
pub mod report;
pub mod scenario;
pub mod schedule;
pub mod session;
pub mod stats;
