//! Tests that need a standard KVM: they run inside the nested test host, in this same program.
//!
//! Names are `nested::area::what_holds`. Outside, all that are asked for are run in one host as soon
//! as the first is; inside, each says in one line what became of it.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use nested_host::{Program, image};

mod forks;
mod linux;
mod probes;

/// Set inside.
const INSIDE: &str = "UKP_INSIDE";
/// Begins the line that says what became of a test.
const TOLD: &str = "@ukp-test ";
/// How long the host may take, boot and all tests: four times what it takes on a quiet machine.
const LIMIT: Duration = Duration::from_mins(20);
/// And for each child that is asked for besides.
const LIMIT_EACH: Duration = Duration::from_secs(10);

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
    let missing = nested_host::missing().or_else(image::missing);
    if let Some(missing) = &missing {
        eprintln!("the nested tests are ignored: {missing}");
    }
    let without_python = image::python_root().err().map(|error| error.to_string());
    if let (None, Some(missing)) = (&missing, &without_python) {
        eprintln!("the nested tests with Python are ignored: {missing}");
    }
    let lacks = |name: &str| {
        let python = name.starts_with(linux::WITH_PYTHON);
        missing.clone().or_else(|| without_python.clone().filter(|_| python))
    };
    let all: Vec<&str> = cases().iter().map(|(name, _)| *name).collect();
    let can = all.iter().copied().filter(|name| lacks(name).is_none() && asked(&arguments, name));
    let can: Vec<&str> = can.collect();
    let results = Arc::new(OnceLock::new());
    let trials = all.iter().map(|name| {
        let (results, missing, all) = (results.clone(), lacks(name), can.clone());
        let (name, ignored) = (*name, missing.is_some());
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

/// Whether a test is among those that the arguments name.
fn asked(arguments: &Arguments, name: &str) -> bool {
    let name = format!("nested::{name}");
    let is = |wanted: &String| {
        if arguments.exact { name == *wanted } else { name.contains(wanted.as_str()) }
    };
    arguments.filter.as_ref().is_none_or(is) && !arguments.skip.iter().any(is)
}

/// With everything that was begun for it.
fn stopped() -> Result<()> {
    let sleeper = Program {
        name: "sleeper".to_owned(),
        path: "/bin/sh".into(),
        arguments: vec!["-c".to_owned(), "echo asleep; /bin/busybox sleep 1000".to_owned()],
        ..Program::default()
    };
    let limit = Duration::from_secs(25);
    let begin = Instant::now();
    let result = nested_host::run(&[sleeper], limit, |_| {});
    let error = format!("{:#}", result.err().context("it came to an end")?);
    ensure!(error.starts_with("after 25 s it was at sleeper; it said last:"), "{error}");
    ensure!(error.ends_with("asleep"), "{error}");
    ensure!(begin.elapsed() < limit + Duration::from_secs(5), "it took {:?}", begin.elapsed());
    let own = format!("{}{}-", nested_host::folder_prefix(), std::process::id());
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

/// What became of the tests, by name, and why the host did not come to the end of them.
#[derive(Default)]
struct Results {
    told: BTreeMap<String, Result<(), String>>,
    error: Option<String>,
}

fn result(results: &Results, name: &str) -> Result<(), Failed> {
    match (results.told.get(name), &results.error) {
        (Some(result), _) => result.clone().map_err(Failed::from),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err("the host ended before it said what became of it".into()),
    }
}

/// Runs all tests in a host.
fn outside(wanted: &[&str]) -> Results {
    let mut results = Results::default();
    let error = run(wanted, &mut results.told).err();
    results.error = error.map(|error| format!("{error:#}"));
    results
}

fn run(wanted: &[&str], told: &mut BTreeMap<String, Result<(), String>>) -> Result<()> {
    let guest = linux::image()?;
    let mut files = vec![("vmlinuz".to_owned(), guest.kernel), ("image".to_owned(), guest.path)];
    if wanted.iter().any(|name| name.starts_with(linux::WITH_PYTHON)) {
        files.push(("python".to_owned(), image::python()?.path));
    }
    let mut environment = vec![(INSIDE.to_owned(), wanted.join(","))];
    let children = std::env::var(linux::CHILDREN_FROM).ok();
    let more = children.as_ref().map_or(Ok(0), |number| number.parse::<u32>());
    let more = more.with_context(|| format!("{} is no number", linux::CHILDREN_FROM))?;
    environment.extend(children.map(|number| (linux::CHILDREN_FROM.to_owned(), number)));
    let program = Program {
        name: "tests".to_owned(),
        path: std::env::current_exe()?,
        environment,
        files,
        ..Program::default()
    };
    let begin = Instant::now();
    let limit = LIMIT + LIMIT_EACH * more;
    nested_host::run(&[program], limit, |line| {
        eprintln!("nested: {line}");
        if let Some((name, what)) = line.strip_prefix(TOLD).and_then(|line| line.split_once(' ')) {
            let result = if what == "ok" { Ok(()) } else { Err(what.to_owned()) };
            told.insert(name.to_owned(), result);
        }
    })?;
    eprintln!("nested: all of it took {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

fn inside(wanted: &str) {
    let wanted: Vec<&str> = wanted.split(',').collect();
    for (name, body) in cases().into_iter().filter(|(name, _)| wanted.contains(name)) {
        let begin = Instant::now();
        let what = match body() {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("{error:#}").replace('\n', " | "),
        };
        println!("{name} took {:.1} s", begin.elapsed().as_secs_f64());
        println!("\n{TOLD}{name} {what}");
    }
}
