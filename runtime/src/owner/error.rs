//! What can go wrong for an owner.

use uuid::Uuid;

use crate::agent::AgentError;
use crate::fork::Step;
use crate::proto::Failure;
use crate::sys::SysError;

/// What an owner can hear.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// An instance refused.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// A guest does not fork itself.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A Linux guest cannot be told that it was forked.
    #[error(
        "no agent answers in the guest: it was booted without one (see `runtime image`), or is not \
         up yet. A child would not know that it is another machine, and have the same random numbers; \
         `runtime branch --unaware` makes it all the same"
    )]
    Unaware,
    /// There is no such instance, or no more.
    #[error("there is no instance {0}")]
    Unknown(Uuid),
    /// An instance ended while it was waited for.
    #[error("instance {uuid} ended with code {code}{}", reason(.why.as_deref()))]
    Ended {
        /// The instance.
        uuid: Uuid,
        /// Its exit code.
        code: i32,
        /// Why, if it did not end by itself.
        why: Option<String>,
    },
    /// Nothing came in time.
    #[error("no {what} within {waited_ms} ms")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited_ms: u128,
    },
}

fn reason(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!(": {why}"))
}

impl OwnerError {
    /// The step and errno of a fork that failed.
    #[must_use]
    pub fn fork_failure(&self) -> Option<(Step, i32)> {
        match self {
            Self::Refused(failure) => failure.step.map(|step| (step, failure.errno)),
            _ => None,
        }
    }
}
