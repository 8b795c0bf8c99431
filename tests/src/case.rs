//! A test of a suite.

use std::sync::{PoisonError, RwLock};

use anyhow::Result;
use libtest_mimic::{Failed, Trial};

/// Tests that judge times run while no other test does.
static MACHINE: RwLock<()> = RwLock::new(());

/// A test: its name, what it does, and what is missing to run it.
pub struct Case {
    name: String,
    body: Box<dyn FnOnce() -> Result<()> + Send>,
    missing: Option<String>,
    alone: bool,
}

impl Case {
    /// A test called `name`.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        body: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Self {
        Self { name: name.into(), body: Box::new(body), missing: None, alone: false }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// It runs while no other test does.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    /// It cannot run if something is missing. The first reason is kept.
    #[must_use]
    pub fn needs(self, missing: Option<String>) -> Self {
        Self { missing: self.missing.or(missing), ..self }
    }

    /// As libtest-mimic wants it. A test that cannot run is ignored and says why; asked for all the
    /// same, it fails with the reason.
    #[must_use]
    pub fn into_trial(self, suite: &str) -> Trial {
        let Self { name, body, missing, alone } = self;
        let name = format!("{suite}::{name}");
        if let Some(reason) = missing {
            eprintln!("ignored {name}: {reason}");
            return Trial::test(name, move || Err(Failed::from(reason))).with_ignored_flag(true);
        }
        Trial::test(name, move || run(body, alone).map_err(|error| format!("{error:#}").into()))
    }
}

fn run(body: Box<dyn FnOnce() -> Result<()> + Send>, alone: bool) -> Result<()> {
    // Poisoned by a test that panicked: the lock guards nothing but time.
    if alone {
        let _machine = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
        body()
    } else {
        let _machine = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
        body()
    }
}
