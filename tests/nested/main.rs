//! Tests that need a standard KVM: they run inside the nested test host, in this same program.
//!
//! Names are `nested::area::what_holds`. Outside, all that are asked for are run in one host as soon
//! as the first is; inside, each says in one line what became of it. Where this machine's own KVM runs
//! Linux it is the host, and "inside" is another process.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use nested_host::{Place, Program};

mod forks;
mod hosts;
mod lacks;
mod linux;
mod probes;

use hosts::{Results, outside};
use lacks::Lacks;

/// Set inside.
const INSIDE: &str = "UKP_INSIDE";

/// A test that runs inside.
type Inside = (&'static str, fn() -> Result<()>);

fn cases() -> Vec<Inside> {
    [probes::cases(), forks::cases(), hosts::host_cases(), linux::cases()].concat()
}

fn main() {
    runtime::owner::instance_if_asked();
    if let Ok(wanted) = std::env::var(INSIDE) {
        return hosts::inside(&wanted);
    }
    let arguments = Arguments::from_args();
    let place = Place::choose();
    let lacks = Lacks::at(&place);
    lacks.print();
    let all: Vec<&str> = cases().iter().map(|(name, _)| *name).collect();
    let can = all.iter().copied().filter(|name| lacks.of(name).is_none());
    let can: Vec<&str> = can.filter(|name| asked(&arguments, name)).collect();
    let results = Arc::new(OnceLock::new());
    let host = Arc::new(move || outside(&place, &can));
    let trials = all.iter().map(|name| {
        let (results, host, missing, name) = (results.clone(), host.clone(), lacks.of(name), *name);
        let ignored = missing.is_some();
        let body = move || match missing {
            // Asked for all the same.
            Some(missing) => Err(Failed::from(missing)),
            None => result(results.get_or_init(&*host), name),
        };
        Trial::test(format!("nested::{name}"), body).with_ignored_flag(ignored)
    });
    let mut trials: Vec<_> = trials.collect();
    let missing = lacks.all().cloned();
    let ignored = missing.is_some();
    let body = move || match missing {
        Some(missing) => Err(Failed::from(missing)),
        None => ends(results.get_or_init(&*host)),
    };
    trials.push(Trial::test("nested::host::it_ends_well", body).with_ignored_flag(ignored));
    let missing = nested_host::missing();
    let ignored = missing.is_some();
    let body = move || match missing {
        Some(missing) => Err(Failed::from(missing)),
        None => stopped().map_err(|error| Failed::from(format!("{error:#}"))),
    };
    let name = "nested::host::a_program_that_does_not_end_is_stopped";
    trials.push(Trial::test(name, body).with_ignored_flag(ignored));
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether a test is among those that the arguments name.
fn asked(arguments: &Arguments, name: &str) -> bool {
    let name = format!("nested::{name}");
    let is = |wanted: &String| {
        if arguments.exact { name == *wanted } else { name.contains(wanted.as_str()) }
    };
    arguments.filter.as_ref().is_none_or(is) && !arguments.skip.iter().any(is)
}

/// With everything that was begun for it. A machine that is busy may need more than the first limit to
/// come as far as the program.
fn stopped() -> Result<()> {
    for seconds in [25, 100, 400] {
        if stopped_within(Duration::from_secs(seconds))? {
            return Ok(());
        }
        eprintln!("nested: the host of a program that does not end was not up after {seconds} s");
    }
    anyhow::bail!("it never was at the program")
}

/// Whether it came as far as the program.
fn stopped_within(limit: Duration) -> Result<bool> {
    let sleeper = Program {
        name: "sleeper".to_owned(),
        path: "/bin/sh".into(),
        arguments: vec!["-c".to_owned(), "echo asleep; /bin/busybox sleep 100000".to_owned()],
        ..Program::default()
    };
    let begin = Instant::now();
    let result = nested_host::run(&[sleeper], limit, |_| {});
    let took = begin.elapsed();
    let error = format!("{:#}", result.err().context("it came to an end")?);
    let own = format!("{}{}-", nested_host::folder_prefix(), std::process::id());
    let kernels = std::fs::read_dir("/proc")?.flatten().filter(|process| {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(&own)
    });
    // The other tests' host may be there.
    let (folders, hosts) = (folders(&own)?, kernels.count());
    ensure!(folders <= 1 && hosts <= 1, "{folders} folders and {hosts} hosts are left");
    // It would sleep for a day.
    ensure!(took < limit + Duration::from_mins(1), "it took {took:?}");
    let seconds = limit.as_secs();
    if error.starts_with(&format!("after {seconds} s it was at booting")) {
        return Ok(false);
    }
    let at = format!("after {seconds} s it was at sleeper; it said last:");
    ensure!(error.starts_with(&at), "{error}");
    // Its line may still be on its way.
    Ok(error.ends_with("asleep"))
}

fn folders(prefix: &str) -> Result<usize> {
    let all = std::fs::read_dir(std::env::temp_dir())?.flatten();
    Ok(all.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).count())
}

fn result(results: &Results, name: &str) -> Result<(), Failed> {
    match (results.told.get(name), &results.error) {
        (Some(result), _) => result.clone().map_err(Failed::from),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err("the host ended before it said what became of it".into()),
    }
}

/// The host came to its end behind the last test, by itself and without an error.
fn ends(results: &Results) -> Result<(), Failed> {
    results.error.as_ref().map_or(Ok(()), |error| Err(error.into()))
}
