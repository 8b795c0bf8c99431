//! Tests that need a standard KVM: they run inside the nested test host, in this same program.
//!
//! Names are `nested::area::what_holds`. Outside, all of them are run in one host as soon as the
//! first is asked for; inside, each says in one line what became of it.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use tests::nested::{self, LinuxGuest, Program};

mod forks;
mod linux;
mod probes;

/// Set inside.
const INSIDE: &str = "UKP_INSIDE";
/// Begins the line that says what became of a test.
const TOLD: &str = "@ukp-test ";
/// How long the host may take, boot and all tests.
const LIMIT: Duration = Duration::from_mins(5);

/// A test that runs inside.
type Inside = (&'static str, fn() -> Result<()>);

fn cases() -> Vec<Inside> {
    [probes::cases(), forks::cases(), linux::cases()].concat()
}

fn main() {
    runtime::owner::instance_if_asked();
    if let Ok(wanted) = std::env::var(INSIDE) {
        return inside(&wanted);
    }
    let arguments = Arguments::from_args();
    let missing = nested::missing();
    if let Some(missing) = &missing {
        eprintln!("the nested tests are ignored: {missing}");
    }
    let all: Vec<&str> = cases().iter().map(|(name, _)| *name).collect();
    let ignored = missing.is_some();
    let results = Arc::new(OnceLock::new());
    let trials = all.iter().map(|name| {
        let (results, missing, all) = (results.clone(), missing.clone(), all.clone());
        let name = *name;
        let body = move || match missing {
            // Asked for all the same.
            Some(missing) => Err(Failed::from(missing)),
            None => result(results.get_or_init(|| outside(&all)), name),
        };
        Trial::test(format!("nested::{name}"), body).with_ignored_flag(ignored)
    });
    let mut trials: Vec<_> = trials.collect();
    trials.push(
        Trial::test("nested::host::a_program_that_does_not_end_is_stopped", || {
            stopped().map_err(|error| Failed::from(format!("{error:#}")))
        })
        .with_ignored_flag(missing.is_some()),
    );
    libtest_mimic::run(&arguments, trials).exit();
}

/// With everything that was begun for it.
fn stopped() -> Result<()> {
    let sleeper = Program {
        name: "sleeper".to_owned(),
        path: "/bin/sh".into(),
        arguments: vec!["-c".to_owned(), "echo asleep; /bin/busybox sleep 1000".to_owned()],
        environment: Vec::new(),
        files: Vec::new(),
    };
    let limit = Duration::from_secs(25);
    let begin = Instant::now();
    let result = nested::run(&[sleeper], limit, |_| {});
    let error = format!("{:#}", result.err().context("it came to an end")?);
    ensure!(error.starts_with("after 25 s it was at sleeper; it said last:"), "{error}");
    ensure!(error.ends_with("asleep"), "{error}");
    ensure!(begin.elapsed() < limit + Duration::from_secs(5), "it took {:?}", begin.elapsed());
    let own = format!("{}{}-", nested::folder_prefix(), std::process::id());
    let kernels = std::fs::read_dir("/proc")?.flatten().filter(|process| {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(&own)
    });
    // The other tests' host may be there.
    let (folders, hosts) = (folders(&own)?, kernels.count());
    ensure!(folders <= 1 && hosts <= 1, "{folders} folders and {hosts} hosts are left");
    Ok(())
}

fn folders(prefix: &str) -> Result<usize> {
    let all = std::fs::read_dir(std::env::temp_dir())?.flatten();
    Ok(all.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).count())
}

/// What became of the tests, by name; or why nothing did.
type Results = Result<BTreeMap<String, Result<(), String>>, String>;

fn result(results: &Results, name: &str) -> Result<(), Failed> {
    match results {
        Err(error) => Err(error.into()),
        Ok(results) => match results.get(name) {
            None => Err("the host ended before it said what became of it".into()),
            Some(result) => result.clone().map_err(Failed::from),
        },
    }
}

/// Runs all tests in a host.
fn outside(wanted: &[&str]) -> Results {
    run(wanted).map_err(|error| format!("{error:#}"))
}

fn run(wanted: &[&str]) -> Result<BTreeMap<String, Result<(), String>>> {
    let guest = LinuxGuest::new(linux::INIT)?;
    let program = Program {
        name: "tests".to_owned(),
        path: std::env::current_exe()?,
        arguments: Vec::new(),
        environment: vec![(INSIDE.to_owned(), wanted.join(","))],
        files: guest.files(),
    };
    let ended = nested::run(&[program], LIMIT, |line| eprintln!("nested: {line}"))?;
    let output = &ended.first().context("no program ran")?.output;
    let told = output.iter().filter_map(|line| line.strip_prefix(TOLD));
    Ok(told
        .filter_map(|line| {
            let (name, what) = line.split_once(' ')?;
            let result = if what == "ok" { Ok(()) } else { Err(what.to_owned()) };
            Some((name.to_owned(), result))
        })
        .collect())
}

fn inside(wanted: &str) {
    let wanted: Vec<&str> = wanted.split(',').collect();
    for (name, body) in cases().into_iter().filter(|(name, _)| wanted.contains(name)) {
        let what = match body() {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("{error:#}").replace('\n', " | "),
        };
        println!("\n{TOLD}{name} {what}");
    }
}
