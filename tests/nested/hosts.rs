//! The host that the tests run in: a machine under software emulation, or this one.
//!
//! ```text
//!              ┌─ standard KVM ─ this program again, inside ─┐
//!   outside ───┤                                             ├── lines ── what became of each test
//!              └─ else: QEMU ─── this program, inside ───────┘
//! ```

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nested_host::{Place, Program, Stalled, image};
use rustix::process::Signal;

use super::{INSIDE, Inside, cases, lacks, linux};

/// Begins the line that says what became of a test.
const TOLD: &str = "@ukp-test ";
/// How long the host may take, boot and all tests: more than twice what it takes on a quiet machine.
const LIMIT: Duration = Duration::from_mins(25);
/// And for each child that is asked for besides.
const LIMIT_EACH: Duration = Duration::from_secs(5);

/// What became of the tests, by name, and what went wrong with their host.
#[derive(Default)]
pub struct Results {
    pub told: BTreeMap<String, Result<(), String>>,
    pub error: Option<String>,
}

/// Runs all tests in a host.
pub fn outside(place: &Place, wanted: &[&str]) -> Results {
    let mut results = Results::default();
    let mut error = run(place, wanted, &mut results.told).err();
    if let Some(stalled) = error.as_ref().filter(|error| error.is::<Stalled>()) {
        // It is no test that has failed, and none can be told from it. Once: if it is ours after all,
        // it does so again.
        eprintln!("nested: {stalled:#}\nnested: once more, what was not told");
        let told = &results.told;
        let left: Vec<&str> =
            wanted.iter().copied().filter(|name| !told.contains_key(*name)).collect();
        if !left.is_empty() {
            error = run(place, &left, &mut results.told).err();
        }
    }
    results.error = error.map(|error| format!("{error:#}"));
    if let Some(error) = &results.error {
        eprintln!("nested: {error}");
    }
    results
}

fn run(
    place: &Place,
    wanted: &[&str],
    told: &mut BTreeMap<String, Result<(), String>>,
) -> Result<()> {
    let children = std::env::var(linux::CHILDREN_FROM).ok();
    let more = children.as_ref().map_or(Ok(0), |number| number.parse::<u32>());
    let more = more.with_context(|| format!("{} is no number", linux::CHILDREN_FROM))?;
    let mut environment = vec![(INSIDE.to_owned(), wanted.join(","))];
    environment.extend(children.map(|number| (linux::CHILDREN_FROM.to_owned(), number)));
    let with_python = wanted.iter().any(|name| name.starts_with(linux::WITH_PYTHON));
    let limit = LIMIT + LIMIT_EACH * more;
    let begin = Instant::now();
    let hear = |line: &str| {
        eprintln!("nested: {line}");
        if let Some((name, what)) = line.strip_prefix(TOLD).and_then(|line| line.split_once(' ')) {
            let result = if what == "ok" { Ok(()) } else { Err(what.to_owned()) };
            told.insert(name.to_owned(), result);
        }
    };
    eprintln!("nested: {place}");
    match place {
        Place::Emulated { .. } => emulated(environment, with_python, limit, hear)?,
        Place::Here(_) => here(environment, with_python, limit, hear)?,
    }
    eprintln!("nested: all of it took {:.0} s", begin.elapsed().as_secs_f64());
    let silent: Vec<_> = wanted.iter().filter(|name| !told.contains_key(**name)).collect();
    ensure!(silent.is_empty(), "the host ended before it said what became of {silent:?}");
    Ok(())
}

/// What guests boot, by the names that tests look for.
fn files(with_python: bool) -> Result<Vec<(String, PathBuf)>> {
    let guest = linux::image()?;
    let mut files = vec![("vmlinuz".to_owned(), guest.kernel), ("image".to_owned(), guest.path)];
    if with_python {
        files.push(("python".to_owned(), image::python()?.path));
    }
    Ok(files)
}

fn emulated(
    environment: Vec<(String, String)>,
    with_python: bool,
    limit: Duration,
    hear: impl FnMut(&str),
) -> Result<()> {
    let program = Program {
        name: "tests".to_owned(),
        path: std::env::current_exe()?,
        environment,
        files: files(with_python)?,
        others: lacks::runtime().into_iter().collect(),
        ..Program::default()
    };
    let ended = nested_host::run(&[program], limit, hear)?;
    let code = ended.first().context("no program ran")?.code;
    ensure!(code == 0, "the tests' program ended with {code}");
    Ok(())
}

/// In a process of its own, as the other way: it looks whether it leaves any behind.
fn here(
    environment: Vec<(String, String)>,
    with_python: bool,
    limit: Duration,
    mut hear: impl FnMut(&str),
) -> Result<()> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let mut command = Command::new(std::env::current_exe()?);
    if linux::brought().is_none() {
        for (name, path) in files(with_python)? {
            std::os::unix::fs::symlink(path, folder.path().join(name)).context("linking files")?;
        }
        command.env(linux::FILES_IN, folder.path());
    }
    command.envs(environment).stdin(Stdio::null()).stdout(Stdio::piped());
    nested_host::end_with_this_process(&mut command, Signal::KILL);
    let mut process = command.spawn().context("starting the tests' program")?;
    let output = process.stdout.take().context("it has no output")?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    let deadline = Instant::now() + limit;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => hear(&line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                process.kill().context("ending the tests' program")?;
                process.wait().context("waiting for the tests' program")?;
                bail!("after {} s it was still at the tests", limit.as_secs());
            }
        }
    }
    let status = process.wait().context("waiting for the tests' program")?;
    ensure!(status.success(), "the tests' program ended with {status}");
    Ok(())
}

/// Runs those that are wanted, one after the other.
pub fn inside(wanted: &str) {
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

pub fn host_cases() -> Vec<Inside> {
    vec![("host::the_suite_runs_on_a_standard_kvm_without_another_host", without_another)]
}

/// This very program, started as a user starts it on a host whose KVM runs Linux: here is one.
fn without_another() -> Result<()> {
    let kind = runtime::doctor::host_kind()?.name();
    let place = format!("nested: on this machine's KVM ({kind} host)");
    for (filter, passed) in [("nested::forks::a_bare", 1), ("nested::linux::it_boots", 1)] {
        let mut command = Command::new(std::env::current_exe()?);
        command.env_remove(INSIDE).env(linux::FILES_IN, linux::file("")).arg(filter);
        let output = command.output().context("starting the tests")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        let closing = format!("test result: ok. {passed} passed; 0 failed; 0 ignored");
        ensure!(output.status.success(), "{filter}: {}: {said} {errors}", output.status);
        ensure!(said.contains(&closing), "{filter}: {said}");
        ensure!(errors.lines().any(|line| line == place), "{filter}: {errors}");
    }
    Ok(())
}
