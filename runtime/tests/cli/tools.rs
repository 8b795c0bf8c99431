//! What the tests share: running the program, in a runtime directory of its own.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::Value;
use uuid::Uuid;

/// The program.
pub const RUNTIME: &str = env!("CARGO_BIN_EXE_runtime");
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A folder that is removed in the end; its path is short enough for sockets in it.
#[derive(Debug)]
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Result<Self, Failed> {
        let (unique, ..) = Uuid::new_v4().as_fields();
        let path = Path::new("/tmp").join(format!("ukp-test-{unique:08x}"));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// The program, with its sockets in this folder.
    pub fn runtime(&self, words: &[&str]) -> Command {
        self.of(Command::new(RUNTIME), words)
    }

    /// The same, started by another program, whose last words it becomes.
    fn runtime_by(&self, by: &[&str], words: &[&str]) -> Command {
        let Some((program, arguments)) = by.split_first() else { return self.runtime(words) };
        let mut command = Command::new(program);
        command.args(arguments).arg(RUNTIME);
        self.of(command, words)
    }

    fn of(&self, mut command: Command, words: &[&str]) -> Command {
        command.args(words).env("XDG_RUNTIME_DIR", &self.0).stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn done(&self, words: &[&str]) -> Result<Done, Failed> {
        let mut command = self.runtime(words);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Done::of(child)
    }

    /// Its output as JSON; it must succeed.
    pub fn json(&self, words: &[&str]) -> Result<Value, Failed> {
        let done = self.done(words)?;
        if done.code != 0 {
            return Err(format!("{words:?}: {done:?}").into());
        }
        Ok(serde_json::from_str(&done.out)?)
    }

    /// Number of owners' folders.
    pub fn owners(&self) -> usize {
        std::fs::read_dir(self.0.join("ukp")).map_or(0, Iterator::count)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Done {
    /// Waits for the end, and kills a program that does not come to one.
    pub fn of(mut child: Child) -> Result<Self, Failed> {
        // All the while: a pipe holds 64 KiB, and whoever writes more waits for a reader.
        let (out, err) = (read_all(child.stdout.take()), read_all(child.stderr.take()));
        let end = Instant::now() + PATIENCE;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break Some(status),
                None if Instant::now() > end => break None,
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        if status.is_none() {
            child.kill()?;
            child.wait()?;
        }
        let text = |reader: JoinHandle<String>| reader.join().map_err(|_| "a reader panicked");
        let (out, err) = (text(out)?, text(err)?);
        let Some(status) = status else {
            let said: String = out.chars().take(2000).collect();
            return Err(format!("no end within {PATIENCE:?}: {said:?}, {err:?}").into());
        };
        Ok(Self { code: status.code().unwrap_or(-1), out, err })
    }
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // Whatever came before an error.
        pipe.map(|mut pipe| pipe.read_to_end(&mut bytes)).transpose().unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// `runtime run --bare` with the bundled guest, up and running.
#[derive(Debug)]
pub struct Owner {
    pub folder: Folder,
    pub child: Child,
    pub root: Uuid,
}

impl Owner {
    pub fn start(more: &[&str]) -> Result<Self, Failed> {
        let folder = Folder::new()?;
        let (child, root) = start(&folder, &[&["--bare"], more].concat())?;
        Ok(Self { folder, child, root })
    }

    /// Started by another program, and what it says until its instance runs.
    pub fn start_by(by: &[&str]) -> Result<(Self, Vec<String>), Failed> {
        let folder = Folder::new()?;
        let (child, root, notes) = start_noting(&folder, by, &["--bare"])?;
        Ok((Self { folder, child, root }, notes))
    }

    /// Processes of its tree: they carry the folder in their environment, and one of our names.
    pub fn processes(&self) -> Vec<i32> {
        let variable = format!("XDG_RUNTIME_DIR={}", self.folder.0.display());
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let ours = environment.split(|byte| *byte == 0).any(|one| one == variable.as_bytes());
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            ours && name.starts_with("ukp-")
        })
        .collect()
    }

    /// Waits until `expected` processes are left.
    pub fn wait_for_processes(&self, expected: usize) -> Result<(), Failed> {
        until("processes", || (self.processes().len() == expected).then_some(()))
    }

    pub fn signal(&self, signal: libc::c_int) -> Result<(), Failed> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let signal = rustix::process::Signal::from_named_raw(signal).ok_or("no such signal")?;
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// The code that it ends with.
    pub fn end(&mut self) -> Result<i32, Failed> {
        until("end of the owner", || self.child.try_wait().ok().flatten())
            .map(|status| status.code().unwrap_or(-1))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Also when a test failed half-way.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Starts an owner and reads from its notes which instance it runs.
pub fn start(folder: &Folder, more: &[&str]) -> Result<(Child, Uuid), Failed> {
    start_noting(folder, &[], more).map(|(child, root, _)| (child, root))
}

/// The same by another program, with the notes before that one: what this host lacks.
fn start_noting(
    folder: &Folder,
    by: &[&str],
    more: &[&str],
) -> Result<(Child, Uuid, Vec<String>), Failed> {
    let words = [&["run", "--memory", "64M"], more].concat();
    let mut command = folder.runtime_by(by, &words);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut reader = BufReader::new(child.stderr.take().ok_or("no stderr")?);
    let mut notes = Vec::new();
    let root = loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            drop(child.kill());
            drop(child.wait());
            return Err(format!("no note of an instance: {notes:?}").into());
        }
        if let Some(root) = line.split(' ').nth(1).and_then(|word| word.parse().ok()) {
            break root;
        }
        notes.push(line);
    };
    // Read to the end, so that the program does not wait for us.
    std::thread::spawn(move || reader.read_to_end(&mut Vec::new()));
    Ok((child, root, notes))
}

/// Asks again and again until there is an answer.
pub fn until<R>(what: &str, mut f: impl FnMut() -> Option<R>) -> Result<R, Failed> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = f() {
            return Ok(result);
        }
        if Instant::now() > end {
            return Err(format!("no {what} within {PATIENCE:?}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Fails with the values, unless they are equal.
pub fn same<T: PartialEq<U> + std::fmt::Debug, U: std::fmt::Debug>(
    left: &T,
    right: &U,
    about: &dyn std::fmt::Debug,
) -> Result<(), Failed> {
    if left == right { Ok(()) } else { Err(format!("{left:?} is not {right:?}: {about:?}").into()) }
}

/// Fails with `about`, unless it holds.
pub fn holds(truth: bool, about: &dyn std::fmt::Debug) -> Result<(), Failed> {
    if truth { Ok(()) } else { Err(format!("{about:?}").into()) }
}
