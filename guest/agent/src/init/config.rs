//! `/.uk/config.json`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{InitError, cannot};

/// How the machine is to be run. Every part may be left out.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Config {
    /// Program and arguments of the workload; without it a shell on the console.
    pub(super) argv: Vec<String>,
    /// Added to its environment.
    pub(super) env: BTreeMap<String, String>,
    /// Where it runs.
    pub(super) cwd: PathBuf,
    /// Name of the machine; `{uuid}` in it stands for the instance's.
    pub(super) hostname: Option<String>,
    /// Forks that may wait for another.
    pub(super) fork_queue: usize,
    /// How long a child that has stopped is kept, in seconds.
    pub(super) retention_s: u64,
    /// Whether the workload is frozen across forks.
    pub(super) freeze: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            argv: Vec::new(),
            env: BTreeMap::new(),
            cwd: "/".into(),
            hostname: None,
            fork_queue: 16,
            retention_s: 60,
            freeze: false,
        }
    }
}

impl Config {
    /// Reads it; a file that is not there says nothing.
    pub(super) fn read(path: &Path) -> Result<Self, InitError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(cannot(format!("read {}", path.display()))(error)),
        };
        Self::parse(&text)
            .map_err(|error| cannot(format!("understand {}", path.display()))(error.into()))
    }

    fn parse(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    /// Environment of the workload, and of what the host runs.
    pub(super) fn environment(&self) -> BTreeMap<String, String> {
        let usual = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/.uk"),
            ("HOME", "/root"),
            ("TERM", "linux"),
        ];
        let mut env: BTreeMap<_, _> = usual.map(|(name, value)| (name.into(), value.into())).into();
        env.extend(self.env.clone());
        env
    }

    pub(super) fn retention(&self) -> Duration {
        Duration::from_secs(self.retention_s)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn everything_may_be_left_out() {
        assert_eq!(Config::parse("{}").unwrap(), Config::default());
        assert_eq!(Config::read(Path::new("/no/such/file")).unwrap(), Config::default());
        // As the specification has them.
        let Config { fork_queue, retention_s, freeze, .. } = Config::default();
        assert_eq!((fork_queue, retention_s, freeze), (16, 60, false));
    }

    #[test]
    fn everything_may_be_given() {
        let config = Config::parse(
            r#"{"argv":["a","b"],"env":{"PATH":"/x"},"cwd":"/y","hostname":"n-{uuid}",
                "fork_queue":1,"retention_s":2,"freeze":true}"#,
        )
        .unwrap();
        assert_eq!(config.argv, ["a", "b"]);
        assert_eq!(config.environment().get("PATH").map(String::as_str), Some("/x"));
        assert_eq!(config.environment().get("TERM").map(String::as_str), Some("linux"));
        assert_eq!((config.fork_queue, config.retention()), (1, Duration::from_secs(2)));
        assert!(config.freeze && config.hostname.is_some());
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        let error = Config::parse(r#"{"args":["a"]}"#).unwrap_err().to_string();
        assert!(error.contains("args"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_config_or_an_error(text in ".*") {
            drop(Config::parse(&text));
        }
    }
}
