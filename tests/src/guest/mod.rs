//! A Linux instance on whatever host this is, and what it and its descendants say.
//!
//! ```text
//!              ┌─ standard KVM ───────────── runtime run --json ─┐
//!   Ask ── Place                                                 ├── lines of JSON ── Event
//!              └─ else: nested host (QEMU) ─ runtime run --json ─┘
//! ```

pub mod host;
pub mod image;
pub mod lines;
pub mod tree;

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use uuid::Uuid;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The program `runtime`.
    pub runtime: PathBuf,
    /// What the instance boots; busybox if absent.
    pub image: Option<PathBuf>,
    /// Its kernel; the one that `./just` fetches if absent.
    pub kernel: Option<PathBuf>,
    /// Its memory.
    pub memory_mib: u32,
    /// Its vCPUs.
    pub vcpus: u32,
    /// What its shell runs.
    pub command: String,
    /// How long everything may take.
    pub limit: Duration,
}

/// Why there is no exit code of an instance.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Something that `./just` fetches.
    #[error("{0}")]
    Missing(String),
    /// It was ended.
    #[error(
        "still running after {} s, so it was ended; --limit SECONDS gives it more", limit.as_secs()
    )]
    Limit {
        /// How long it might have taken.
        limit: Duration,
    },
    /// Anything else.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl GuestError {
    /// What a program ends with: as `runtime` does, and timeout(1).
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Missing(_) => 69,
            Self::Limit { .. } => 124,
            Self::Other(_) => 70,
        }
    }
}

/// What `runtime run --json` tells: one object on each line.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// An instance began.
    Started {
        /// Its UUID.
        instance: Uuid,
        /// Whose child it is.
        parent: Option<Uuid>,
    },
    /// It wrote to its console.
    Console {
        /// Its UUID.
        instance: Uuid,
        /// What it wrote.
        text: String,
    },
    /// Something that somebody should know of.
    Note {
        /// Its UUID.
        instance: Uuid,
        /// What happened.
        text: String,
    },
    /// It forked, or tried to.
    Forked {
        /// Its UUID.
        instance: Uuid,
        /// The children.
        children: Vec<Uuid>,
        /// From its request until all run.
        branch_us: Option<u64>,
        /// At which step it failed.
        failed: Option<Failure>,
    },
    /// It ended.
    Exited {
        /// Its UUID.
        instance: Uuid,
        /// Its exit code.
        code: i32,
        /// Why, if it did not end by itself.
        reason: Option<String>,
    },
}

/// How a fork failed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Failure {
    /// At which step.
    pub step: serde_json::Value,
    /// Why.
    pub errno: i32,
}

/// The first digits of an instance's UUID, by which people know it.
#[must_use]
pub fn short(uuid: Uuid) -> String {
    let mut digits = uuid.simple().to_string();
    digits.truncate(8);
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_as_the_runtime_writes_them() -> serde_json::Result<()> {
        let id = "4e188ead-0e28-4a50-a092-af69093fc86e";
        let read = |text: String| serde_json::from_str::<Event>(&text);
        let event =
            read(format!(r#"{{"event":"started","instance":"{id}","parent":null,"pid":7}}"#))?;
        let instance = Uuid::from_u128(0x4e18_8ead_0e28_4a50_a092_af69_093f_c86e);
        assert_eq!(event, Event::Started { instance, parent: None });
        assert_eq!(short(instance), "4e188ead");
        let event = read(format!(
            r#"{{"event":"forked","instance":"{id}","children":[],"branch_us":null,
                "failed":{{"step":"Capture","errno":12}}}}"#
        ))?;
        let failed = Some(Failure { step: "Capture".into(), errno: 12 });
        assert_eq!(event, Event::Forked { instance, children: vec![], branch_us: None, failed });
        assert!(read("{}".to_owned()).is_err());
        Ok(())
    }
}
