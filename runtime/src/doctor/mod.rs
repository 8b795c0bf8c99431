//! Can this host fork machines, and what would make it faster?
//!
//! ```no_run
//! let report = runtime::doctor::examine();
//! for check in &report.checks {
//!     println!("{:?} {}: {}", check.status, check.name, check.found);
//! }
//! ```

mod kernel;
mod kind;
mod kvm;

use serde::{Deserialize, Serialize};

pub use kind::{HostKind, HostSpeed, KindError, host_kind, host_speed};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Forks work, but not as fast or as cheap as they could.
    Warn,
    /// Forks do not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    /// Nothing to do.
    pub fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Ok, found: found.into(), advice: None }
    }

    /// Could be better.
    pub fn warn(
        name: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let advice = Some(advice.into());
        Self { name: name.into(), status: Status::Warn, found: found.into(), advice }
    }

    /// Must be better.
    pub fn fail(
        name: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, found, advice) }
    }
}

/// Everything that was looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What guest code showed, if any could be run.
    pub host: Option<HostSpeed>,
    /// The checks, what matters most first.
    pub checks: Vec<Check>,
    /// `/dev/kvm` is there, and this user may not open it.
    pub denied: bool,
}

impl Report {
    /// Whether nothing failed.
    #[must_use]
    pub fn forks_work(&self) -> bool {
        self.checks.iter().all(|check| check.status != Status::Fail)
    }
}

/// Looks at everything. Takes less than 300 ms and leaves nothing behind.
#[must_use]
pub fn examine() -> Report {
    let mut report = Report { host: None, checks: Vec::new(), denied: false };
    kvm::examine(&mut report);
    if report.forks_work() {
        report.checks.push(match host_speed() {
            Ok(speed) => {
                report.host = Some(speed);
                kind::check(&speed)
            }
            Err(error) => Check::fail(
                "guest code",
                crate::sys::chain(&error),
                "load a KVM module that runs guests on this machine; see the kernel log",
            ),
        });
    }
    kernel::examine(&mut report.checks);
    report.checks.push(probes());
    report
}

/// Whether it can be seen from the kernel's side what a fork costs.
fn probes() -> Check {
    match ebpf_loader::Probes::load(ebpf_loader::Level::Trace) {
        Ok(probes) => {
            let parts = probes.attached().into_iter();
            let parts = parts.map(|part| format!("{} ({})", part.what, part.how));
            let parts = parts.collect::<Vec<_>>().join(", ");
            // Something else does what they were for, or it is not among the parts.
            let refused = probes.refused().iter();
            let refused = refused.map(|refused| format!("; refused by this kernel: {refused}"));
            Check::ok("probes", parts + &refused.collect::<String>())
        }
        Err(error) => Check::warn(
            "probes",
            crate::sys::chain(&error),
            "everything else works without; `stats` shows less, and `trace` nothing",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_check_is_enough() {
        let mut report = Report { host: None, checks: Vec::new(), denied: false };
        assert!(report.forks_work());
        report.checks.push(Check::warn("a", "b", "c"));
        assert!(report.forks_work());
        report.checks.push(Check::fail("a", "b", "c"));
        assert!(!report.forks_work());
    }
}
