//! Scenarios as data: what a bench run asks of the engine.
//!
//! A scenario says what the machine is, what its guest does before the fork, and how many forks to
//! measure. It does not say how: that is a [`Lab`](crate::session::Lab). The definitions are TOML
//! (`scenarios/standard.toml`, built into the binary), one `[[scenario]]` table each, so that a
//! report can repeat them word for word and a reader can check what was asked.
//!
//! ```
//! let catalogue = bench_harness::scenario::Catalogue::standard()?;
//! let quiet = catalogue.get("quiet")?;
//! assert_eq!((quiet.memory_mib, quiet.vcpus), (512, 1));
//! # Ok::<(), bench_harness::scenario::ScenarioError>(())
//! ```

mod check;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The definitions that are built in.
const STANDARD: &str = include_str!("../scenarios/standard.toml");

/// Size of the small page that `dirty` and `check_pages` count in, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Why a scenario cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// The text is not what [`Catalogue::parse`] expects.
    #[error("scenario file {origin} cannot be read")]
    Parse {
        /// Name of the file.
        origin: String,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A field has a value that makes no sense, alone or with the others.
    #[error("scenario {name}: {field} {problem}")]
    Invalid {
        /// Name of the scenario.
        name: String,
        /// The field at fault.
        field: &'static str,
        /// What is wrong, with the numbers.
        problem: String,
    },
    /// Two scenarios have one name.
    #[error("scenario {name} is defined twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// No scenario has that name.
    #[error("no scenario is called {name}; there are: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are, separated by blanks.
        known: String,
    },
}

/// What is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One child per fork, ended before the next fork.
    #[default]
    Fork,
    /// The child forks, and its child, down to `depth`; `forks` chains are made, all
    /// forks are recorded, with their `depth`.
    Depth,
    /// `forks` forks without other children, then until `keep_children` are alive, then `forks` more,
    /// which are what is measured; all are recorded, with their `alive_children`.
    Children,
    /// `children_per_fork` children in one fork, all or none.
    Fanout,
    /// Work over `work_mib` in parent and child after the fork, against an instance never forked.
    Tax,
    /// The steps off the path: arm, prewarm, teardown, an idle instance; `forks` rounds.
    Upkeep,
    /// `forks` forks without probes in the kernel, with those that are on by default, and with all,
    /// in turn; parent and child work over `work_mib` after each.
    Probes,
    /// `forks` forks of a Linux guest from inside.
    #[serde(rename = "linux-fork")]
    LinuxFork,
    /// `forks` boots of Linux.
    #[serde(rename = "linux-boot")]
    LinuxBoot,
    /// `forks` rounds over the socket device of a Linux guest.
    #[serde(rename = "linux-vsock")]
    LinuxVsock,
}

impl Kind {
    /// Whether the guest is Linux.
    #[must_use]
    pub fn is_linux(self) -> bool {
        matches!(self, Self::LinuxFork | Self::LinuxBoot | Self::LinuxVsock)
    }
}

/// What the pages of the image are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// What the engine chooses by itself.
    #[default]
    #[serde(rename = "default")]
    Default,
    /// 4 KiB pages.
    #[serde(rename = "4k")]
    Small,
    /// Shared memory with transparent huge pages.
    #[serde(rename = "thp")]
    Thp,
    /// 2 MiB pages from the hugetlb pool.
    #[serde(rename = "hugetlb")]
    Hugetlb,
}

/// Which pages are dirtied before a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtyMode {
    /// Other pages, chosen at random, in every round.
    Random,
    /// The same pages in every round, scattered at random once.
    Same,
}

/// Pages that the guest dirties just before each fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dirty {
    /// Number of 4 KiB pages.
    pub pages: u32,
    /// Which ones.
    pub mode: DirtyMode,
}

/// One scenario. Its fields are those of the TOML table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Lower case letters, digits and `-`; the name of its files in a report.
    pub name: String,
    /// One line for people.
    pub about: String,
    /// What is measured.
    #[serde(default)]
    pub kind: Kind,
    /// Guest memory in MiB (512).
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// Number of vCPUs (1).
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Pages of the image (the engine's own choice).
    #[serde(default)]
    pub backing: Backing,
    /// Number of forks (rounds, chains) to measure: n.
    pub forks: u32,
    /// Forks made before those, not recorded (20).
    #[serde(default = "default_warmup")]
    pub warmup: u32,
    /// Pages dirtied by the guest just before each fork (none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty: Option<Dirty>,
    /// Random pages that the guest dirties per second for 100 ms before each fork (0: none).
    #[serde(default)]
    pub rate_pages_per_second: u32,
    /// How long before the doorbell the guest announces the fork, in µs (0: not at all).
    #[serde(default)]
    pub announce_us: u32,
    /// Time by which each fork is made slower, in µs: for the proof of the gate (0).
    #[serde(default)]
    pub delay_us: u32,
    /// Whether sync rounds run while the standby is parked (true).
    #[serde(default = "yes")]
    pub sync: bool,
    /// Children per fork (1).
    #[serde(default = "one")]
    pub children_per_fork: u32,
    /// Length of a chain of forks (1).
    #[serde(default = "one")]
    pub depth: u32,
    /// Children that stay alive (0).
    #[serde(default)]
    pub keep_children: u32,
    /// How often a `children` scenario begins again with none alive; `forks` are so many at each end
    /// of each time (1).
    #[serde(default = "one")]
    pub cycles: u32,
    /// Memory in MiB of a second machine, as silent as `quiet`, that is forked after each fork of the
    /// first, to compare in the same moment (0: there is none).
    #[serde(default)]
    pub reference_mib: u32,
    /// That machine is started for the last so many forks only: then it is as young as the first one
    /// was at its first fork (0: it is there from the beginning).
    #[serde(default)]
    pub reference_forks: u32,
    /// Open loop: time between the intended starts of two forks, in µs (0: closed loop).
    #[serde(default)]
    pub interval_us: u32,
    /// Memory that the work of a `tax` or `probes` scenario goes over, in MiB (0).
    #[serde(default)]
    pub work_mib: u32,
    /// Pages whose checksum each child verifies besides its dirty ones (64).
    #[serde(default = "default_check_pages")]
    pub check_pages: u32,
    /// Whether the three-minute run has it (false).
    #[serde(default)]
    pub in_default_set: bool,
}

fn default_memory_mib() -> u32 {
    512
}

fn default_warmup() -> u32 {
    20
}

fn default_check_pages() -> u32 {
    64
}

fn one() -> u32 {
    1
}

fn yes() -> bool {
    true
}

impl Scenario {
    /// Guest memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Pages that the guest dirties just before each fork; 0 if none.
    #[must_use]
    pub fn dirty_pages(&self) -> u32 {
        self.dirty.map_or(0, |dirty| dirty.pages)
    }

    /// Whether one fork after the other is made of a parent that writes nothing.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.kind == Kind::Fork
            && !self.is_open_loop()
            && self.dirty.is_none()
            && self.rate_pages_per_second == 0
    }

    /// The machine to compare with, as a scenario.
    #[must_use]
    pub fn reference(&self) -> Option<Self> {
        (self.reference_mib > 0).then(|| Self {
            memory_mib: self.reference_mib,
            reference_mib: 0,
            reference_forks: 0,
            ..self.clone()
        })
    }

    /// The first fork after which that machine is forked, too.
    #[must_use]
    pub fn reference_from(&self) -> u32 {
        match self.reference_forks {
            0 => 0,
            last => self.forks.saturating_sub(last),
        }
    }

    /// Whether forks start on a fixed schedule.
    #[must_use]
    pub fn is_open_loop(&self) -> bool {
        self.interval_us > 0
    }
}

/// Which part of the catalogue to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Set {
    /// Scenarios with `in_default_set`.
    #[default]
    Default,
    /// All with the bench's own guest.
    All,
    /// All with Linux guests.
    Linux,
}

/// Scenarios by name, in the order of their definition.
#[derive(Clone, Debug)]
pub struct Catalogue {
    scenarios: Vec<Scenario>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    scenario: Vec<Scenario>,
}

impl Catalogue {
    /// The scenarios that are built in.
    ///
    /// # Errors
    ///
    /// As [`Catalogue::parse`]; a test sees to it that there is none.
    pub fn standard() -> Result<Self, ScenarioError> {
        Self::parse("scenarios/standard.toml", STANDARD)
    }

    /// Reads and checks definitions; `origin` is their name in errors.
    ///
    /// # Errors
    ///
    /// [`ScenarioError`] for text that is not TOML, a field that is not known, a value out of
    /// bounds, fields that contradict each other, and a name that is there twice.
    pub fn parse(origin: &str, text: &str) -> Result<Self, ScenarioError> {
        let file: File = toml::from_str(text).map_err(|source| ScenarioError::Parse {
            origin: origin.to_owned(),
            source: Box::new(source),
        })?;
        let mut names = BTreeSet::new();
        for scenario in &file.scenario {
            check::check(scenario)?;
            if !names.insert(scenario.name.clone()) {
                return Err(ScenarioError::Duplicate { name: scenario.name.clone() });
            }
        }
        Ok(Self { scenarios: file.scenario })
    }

    /// All scenarios.
    #[must_use]
    pub fn all(&self) -> &[Scenario] {
        &self.scenarios
    }

    /// The scenario of that name.
    ///
    /// # Errors
    ///
    /// [`ScenarioError::Unknown`].
    pub fn get(&self, name: &str) -> Result<&Scenario, ScenarioError> {
        self.scenarios.iter().find(|scenario| scenario.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.scenarios.iter().map(|s| s.name.as_str()).collect();
            ScenarioError::Unknown { name: name.to_owned(), known: known.join(" ") }
        })
    }

    /// The scenarios of those names, or those of `set` if no name is given.
    ///
    /// # Errors
    ///
    /// [`ScenarioError::Unknown`].
    pub fn select(&self, set: Set, names: &[String]) -> Result<Vec<Scenario>, ScenarioError> {
        if names.is_empty() {
            let wanted = |scenario: &&Scenario| match set {
                Set::Default => scenario.in_default_set,
                Set::All => !scenario.kind.is_linux(),
                Set::Linux => scenario.kind.is_linux(),
            };
            return Ok(self.scenarios.iter().filter(wanted).cloned().collect());
        }
        names.iter().map(|name| self.get(name).cloned()).collect()
    }
}

#[cfg(test)]
mod tests;
