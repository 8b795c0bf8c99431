//! What can go wrong in the laboratory.

use runtime::owner::OwnerError;
use runtime::sys::SysError;

use crate::baseline::BaselineError;
use crate::session::LabError;

/// Why a scenario could not be carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// The engine refused or did not answer.
    #[error("{doing}")]
    Engine {
        doing: &'static str,
        #[source]
        source: OwnerError,
    },
    /// A baseline could not be measured.
    #[error(transparent)]
    Baseline(#[from] BaselineError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A signal asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// Processes outlived their owner. They have been killed now.
    #[error("{count} processes were left behind: {names}")]
    Leftover { count: usize, names: String },
    /// The guest said something that it cannot say.
    #[error("the guest answered {words} result words, {needed} are needed")]
    Guest { words: usize, needed: usize },
}

impl From<Trouble> for LabError {
    fn from(trouble: Trouble) -> Self {
        Self::Failed(Box::new(trouble))
    }
}

/// For `map_err`: an error of the engine while `doing` something.
pub(super) fn engine(doing: &'static str) -> impl FnOnce(OwnerError) -> Trouble {
    move |source| Trouble::Engine { doing, source }
}

/// A fork that had the wrong outcome.
pub(super) fn void(reason: String) -> LabError {
    LabError::Void { reason }
}
