//! `/uk/libukp`, mounted on a folder of this machine, with a doorbell and a host of the test.
//!
//! Where FUSE cannot be mounted every test is listed as ignored, with the reason.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use anyhow::Result;
use libtest_mimic::{Arguments, Trial};

mod children;
mod forks;
mod interface;
mod rig;

/// A test: its name and what it does.
type Case = (&'static str, fn() -> Result<()>);

fn main() {
    let arguments = Arguments::from_args();
    let missing = rig::missing();
    if let Some(reason) = &missing {
        eprintln!("ignored: {reason}");
    }
    let cases = [forks::CASES, children::CASES, interface::CASES].concat();
    let trials = cases.into_iter().map(|(name, body)| {
        let reason = missing.clone();
        let run = move || match reason {
            Some(reason) => Err(reason.into()),
            None => body().map_err(|error| format!("{error:#}").into()),
        };
        Trial::test(format!("mounted::{name}"), run).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}
