//! The program that users run, with a Linux guest, from its start to its end.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use uuid::Uuid;

use super::guest::{BOOT, LONG, WORKLOAD, ZERO, file};
use crate::{Inside, lacks};

pub fn cases() -> Vec<Inside> {
    vec![
        ("cli::run_exec_cp_branch_ps_wait_and_stop_a_linux_guest", verbs),
        ("cli::a_kernel_that_is_cut_off_is_one_line", cut_kernel),
        ("cli::an_initrd_that_is_cut_off_is_one_line", cut_initrd),
    ]
}

fn runtime(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(lacks::runtime().context("the program runtime is not there")?);
    command.args(arguments);
    nested_host::end_with_this_process(&mut command, Signal::TERM);
    Ok(command)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a verb with this input.
fn ask(arguments: &[&str], input: &str) -> Result<Output> {
    let mut command = runtime(arguments)?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn()?;
    process.stdin.take().context("no input")?.write_all(input.as_bytes())?;
    Ok(process.wait_with_output()?)
}

/// What a verb prints; it must end with that code.
fn ends(code: i32, arguments: &[&str], input: &str) -> Result<String> {
    let output = ask(arguments, input)?;
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.code() == Some(code), "{arguments:?}: {}: {out} {errors}", output.status);
    Ok(out)
}

fn json(arguments: &[&str]) -> Result<Value> {
    let said = ends(0, arguments, "")?;
    serde_json::from_str(&said).with_context(|| format!("{arguments:?}: {said}"))
}

/// `runtime run --json`, and what it tells.
struct Run {
    process: Child,
    events: Receiver<Value>,
    root: Uuid,
}

impl Run {
    fn start() -> Result<Self> {
        let (kernel, image) = (file("vmlinuz"), file("image"));
        let (kernel, image) = (path(&kernel)?, path(&image)?);
        let fixed = ["run", "--json", "--memory", "192M", "--kernel", kernel, "--image", image];
        let command = ["--cmdline", "loglevel=3", "--", "/bin/sh", "-c", WORKLOAD];
        let mut command = runtime(&[&fixed[..], &command[..]].concat())?;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let lines = BufReader::new(process.stdout.take().context("no output")?).lines();
        let (sender, events) = channel();
        std::thread::spawn(move || {
            let events = lines.map_while(|line| serde_json::from_str(&line.ok()?).ok());
            events.map(|event| sender.send(event)).all(|sent| sent.is_ok())
        });
        let mut run = Self { process, events, root: Uuid::nil() };
        let started = run.event("started", None)?;
        run.root = uuid(&started["instance"])?;
        Ok(run)
    }

    /// The next event of that kind, of that instance.
    fn event(&self, kind: &str, instance: Option<Uuid>) -> Result<Value> {
        let end = Instant::now() + LONG;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).with_context(|| format!("no {kind}"))?;
            let of = instance.is_none_or(|uuid| event["instance"] == uuid.to_string());
            if event["event"] == kind && of {
                return Ok(event);
            }
        }
    }

    /// What it has said and nobody has asked for.
    fn said(&self) -> Vec<String> {
        self.events.try_iter().map(|event| event.to_string()).collect()
    }

    /// Its code, once it has ended.
    fn end(&mut self, limit: Duration) -> Result<Option<i32>> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(status) = self.process.try_wait()? {
                return Ok(status.code());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("it goes on")
    }
}

impl Drop for Run {
    /// With all of its instances.
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let pid = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw);
            pid.map(|pid| kill_process(pid, Signal::TERM)).transpose().unwrap_or_default();
            if self.end(LONG / 4).is_err() {
                // It has ended meanwhile, otherwise.
                drop(self.process.kill());
            }
        }
    }
}

fn uuid(value: &Value) -> Result<Uuid> {
    Ok(value.as_str().with_context(|| format!("{value} is no text"))?.parse()?)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn verbs() -> Result<()> {
    let mut run = Run::start()?;
    let root = run.root.to_string();
    let end = Instant::now() + BOOT;
    while !ask(&["exec", &root, "true"], "")?.status.success() {
        ensure!(Instant::now() < end, "its agent does not answer");
        std::thread::sleep(Duration::from_millis(500));
    }
    // exec: input, environment, folder, output, code.
    let script = "read line; echo \"$line $NAME $(pwd)\"; exit 3";
    let exec = ["exec", "-i", "-e", "NAME=value", "-w", "/etc", &root, "/bin/sh", "-c", script];
    ensure!(ends(3, &exec, "typed\n")? == "typed value /etc\n");
    // cp: there and back.
    let folder = tempfile::tempdir()?;
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let bytes: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&from, &bytes)?;
    let there = format!("{root}:/tmp/copied");
    ends(0, &["cp", path(&from)?, &there], "")?;
    ends(0, &["cp", &there, path(&to)?], "")?;
    ensure!(std::fs::read(&to)? == bytes, "another file came back");
    // branch, ps: both children go on with the copy, and know that they are children.
    let branched = json(&["branch", "-n", "2", "--json", &root])?;
    ensure!(uuid(&branched["parent"])? == run.root, "{branched}");
    let children = branched["children"].as_array().context("children")?;
    let children = children.iter().map(uuid).collect::<Result<Vec<_>>>()?;
    let listed = json(&["ps", "--json"])?;
    let parents = listed.as_array().context("a list")?.iter().map(|one| {
        let parent = one["parent"].as_str().map(str::parse).transpose()?;
        Ok((uuid(&one["uuid"])?, parent))
    });
    let mut parents = parents.collect::<Result<Vec<(Uuid, Option<Uuid>)>>>()?;
    let mut expected = vec![(run.root, None)];
    expected.extend(children.iter().map(|child| (*child, Some(run.root))));
    expected.sort_unstable();
    parents.sort_unstable();
    if parents != expected {
        let (all, said) = (json(&["ps", "--all", "--json"])?, run.said());
        bail!("{branched} made, {listed} listed, of {all}; {said:?}");
    }
    let [one, other] = children[..] else { bail!("{branched}") };
    let (one, other) = (one.to_string(), other.to_string());
    for child in [&one, &other] {
        let script = "cat /uk/libukp/fork; wc -c < /tmp/copied";
        let said = ends(0, &["exec", child, "/bin/sh", "-c", script], "")?;
        ensure!(said == format!("{ZERO}\n{}\n", bytes.len()), "{said}");
    }
    // wait: the code that the child's workload ends with.
    ends(0, &["exec", &one, "/bin/sh", "-c", "echo 4 > /run/end"], "")?;
    ensure!(ends(4, &["wait", &one], "")? == "4\n");
    // stop: by SIGTERM, of a child and of the first one, whose code is that of `run`.
    let stopped = json(&["stop", "--json", &other])?;
    ensure!(
        stopped["code"] == 143 && uuid(&stopped["instance"])?.to_string() == other,
        "{stopped}"
    );
    json(&["stop", "--json", &root])?;
    let exited = run.event("exited", Some(run.root))?;
    ensure!(exited["code"] == 143, "{exited}");
    let code = run.end(LONG)?;
    ensure!(code == Some(143), "run ended with {code:?}");
    ensure!(json(&["ps", "--json"])?.as_array().is_some_and(Vec::is_empty), "some are left");
    Ok(())
}

/// The first so many bytes of what was brought along.
fn cut(name: &str, to: &Path) -> Result<()> {
    let whole = std::fs::File::open(file(name))?;
    let bytes = whole.metadata()?.len() / 2;
    std::io::copy(&mut whole.take(bytes), &mut std::fs::File::create(to)?)?;
    Ok(())
}

fn cut_kernel() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("vmlinuz");
    cut("vmlinuz", &kernel)?;
    let image = file("image");
    let output = ask(&["run", "--kernel", path(&kernel)?, "--image", path(&image)?], "")?;
    let errors = text(&output.stderr);
    ensure!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    ensure!(errors.lines().count() == 1 && errors.starts_with("error: "), "{errors:?}");
    ensure!(errors.contains("cut off"), "{errors:?}");
    Ok(())
}

/// Not an image of ours, so that only the guest's kernel can tell.
fn cut_initrd() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let initrd = folder.path().join("initrd");
    cut("image", &initrd)?;
    let kernel = file("vmlinuz");
    let line = "console=ttyS0 quiet panic=-1 rdinit=/.uk/init";
    let fixed = ["run", "--json", "--memory", "192M", "--kernel", path(&kernel)?];
    let more = ["--initrd", path(&initrd)?, "--cmdline", line];
    let output = ask(&[&fixed[..], &more[..]].concat(), "")?;
    let said = text(&output.stdout);
    let events = said.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>();
    let events = events.with_context(|| said.clone())?;
    let exited: Vec<&Value> = events.iter().filter(|event| event["event"] == "exited").collect();
    ensure!(!output.status.success() && exited.len() == 1, "{}: {said}", output.status);
    // As far as the archive goes there are files, and the agent may be one of them.
    let console: String = events.iter().filter_map(|event| event["text"].as_str()).collect();
    let agents = console.lines().filter(|line| line.starts_with("ukp-agent: "));
    let lines: Vec<&str> = exited[0]["reason"].as_str().into_iter().chain(agents).collect();
    ensure!(lines.len() == 1 && !lines[0].contains('\n'), "{lines:?}: {said}");
    println!("an initrd that is cut off: {}", lines[0]);
    Ok(())
}
