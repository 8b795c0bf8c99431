//! `doctor`: the library's checks, and one real fork.

use std::time::Duration;

use runtime::doctor::{self, Check, Report, Status};
use runtime::owner::{Owner, OwnerError};
use runtime::proto::{InstanceConfig, Request};
use runtime::sys;
use serde_json::json;

use super::args::DoctorArgs;
use super::error::{CliError, PERMISSION, UNAVAILABLE};
use super::{print, print_json};

/// How long the fork's report may take.
const REPORT: Duration = Duration::from_secs(5);

pub fn run(args: &DoctorArgs) -> Result<u8, CliError> {
    let mut report = doctor::examine();
    if report.forks_work() {
        report.checks.push(try_fork());
    }
    let works = report.forks_work();
    if args.json {
        let kind = report.host.map(|host| host.kind);
        print_json(&json!({
            "forks_work": works,
            "host_kind": kind,
            "host": report.host,
            "checks": report.checks,
        }))?;
    } else {
        print(table(&report).as_bytes())?;
    }
    Ok(match (works, report.denied) {
        (true, _) => 0,
        (false, true) => PERMISSION,
        (false, false) => UNAVAILABLE,
    })
}

fn table(report: &Report) -> String {
    let width = report.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut text: String = report.checks.iter().map(|check| row(check, width)).collect();
    text.push_str(if report.forks_work() {
        "This host can fork machines.\n"
    } else {
        "This host cannot fork machines; see the lines with FAIL.\n"
    });
    text
}

fn row(check: &Check, width: usize) -> String {
    let Check { name, found, .. } = check;
    let status = match check.status {
        Status::Ok => "ok  ",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    };
    let advice = check.advice.as_ref().map_or_else(String::new, |advice| format!("; {advice}"));
    format!("{status}  {name:width$}  {found}{advice}\n")
}

/// Forks a small machine once, as every fork is made.
fn try_fork() -> Check {
    let name = "a fork";
    match fork_once() {
        Ok(Some(us)) => {
            Check::ok(name, format!("made in {us} µs (one, of 64 MiB; see `./just bench`)"))
        }
        Ok(None) => Check::ok(name, "made"),
        Err(error) => Check::fail(name, sys::chain(&error), "report this, with this output"),
    }
}

fn fork_once() -> Result<Option<u64>, OwnerError> {
    let owner = Owner::new()?;
    let root = owner.start(InstanceConfig { memory_mib: 64, ..InstanceConfig::default() })?;
    // The one-time work first: what is timed is a fork like any later one.
    owner.ask(root, Request::Standbys { count: 1 })?;
    owner.branch(root, 1)?;
    let report = owner.next_fork(root, REPORT)?;
    Ok(report.branch_ns().map(|ns| ns / 1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_to_do() {
        let check = Check::warn("a", "found", "do that");
        assert_eq!(row(&check, 3), "warn  a    found; do that\n");
    }
}
