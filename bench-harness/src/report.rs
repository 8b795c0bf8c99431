//! A run on disk: `results/<run>/`, written once and never edited.
//!
//! ```text
//! <run>/                  2026-01-31T12-00-00Z-1a2b3c4
//!   summary.json          everything below in figures: RunSummary
//!   README.md             the same for people
//!   raw/quiet.csv         one row per fork
//!   raw/quiet.apart.csv   what is not part of a fork (prewarm, teardown, …)
//!   raw/quiet.baselines.csv
//!   hgrm/quiet.branch_us.hgrm
//!   plots/*.svg
//! ```

mod figures;
mod folder;
mod host;
mod json;
mod linux;
mod pictures;
mod readme;
mod sizes;
mod summary;
mod tables;
mod tail;

pub use figures::{FigureVerdict, Met};
pub use folder::write;
pub use host::{HostFacts, Revision, load_average};
pub use json::json_line;
pub use sizes::SizePoint;
pub use summary::{RunSummary, ScenarioSummary, summarize};

use std::path::PathBuf;

/// Why a report could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file or folder.
    #[error("{} cannot be {action}", path.display())]
    File {
        /// `written`, `made`, `read`.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A summary is not what this version writes.
    #[error("{} is not a summary of a run", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A folder of that name is there already.
    #[error("{} is there already; runs are never overwritten", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// A value has no JSON.
    #[error("summary cannot be put into JSON")]
    Json(#[source] serde_json::Error),
    /// A histogram could not be made.
    #[error("histogram file cannot be made")]
    Histogram(#[from] crate::record::hgrm::HistogramError),
}
