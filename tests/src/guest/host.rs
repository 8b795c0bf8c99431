//! Where the instance runs, and how it is run there.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use nested_host::{Place, Program};
use rustix::process::{Pid, Signal, kill_process};

use super::{Ask, Event, GuestError, image};

/// What the nested host can spare for the image and the guest's memory, of its own memory.
const ROOM_MIB: u64 = 2048;
/// How long a runtime may take to end its instances.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Runs the instance until no descendant is left; returns its exit code. What is no event goes to
/// stderr.
///
/// # Errors
///
/// If there is no such code.
pub fn run(ask: &Ask, place: &Place, mut told: impl FnMut(Event)) -> Result<i32, GuestError> {
    if let (None, Some(missing)) = (&ask.image, nested_host::image::missing()) {
        return Err(GuestError::Missing(missing));
    }
    let kernel = ask.kernel.clone().map_or_else(usual_kernel, Ok)?;
    match place {
        Place::Here(_) => here(ask, &kernel, told),
        Place::Emulated { .. } => emulated(ask, &kernel, |line| {
            if let Some(event) = read(line) {
                told(event);
            }
        }),
    }
}

/// The one that `./just` fetches, unpacked.
fn usual_kernel() -> Result<PathBuf, GuestError> {
    let folder = guest_image::kernel_dir();
    let folder = folder.map_err(|error| GuestError::Missing(error.to_string()))?;
    Ok(guest_image::unpacked(&folder.join("vmlinuz")).context("the kernel")?)
}

/// Gives what is neither an event nor the kernel's own to stderr.
fn read(line: &str) -> Option<Event> {
    let event = serde_json::from_str(line).ok();
    if event.is_none() && !line.is_empty() && !is_kernel(line) {
        eprintln!("{line}");
    }
    event
}

/// `[   16.587251] text`.
fn is_kernel(line: &str) -> bool {
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    stamp.is_some_and(|(stamp, _)| {
        stamp.contains('.')
            && stamp.trim_start().bytes().all(|byte| byte == b'.' || byte.is_ascii_digit())
    })
}

fn arguments(ask: &Ask, kernel: &str, image: &str, command: &[String]) -> Vec<String> {
    let (memory, vcpus) = (format!("{}M", ask.memory_mib), ask.vcpus.to_string());
    let fixed = ["run", "--json", "--memory", &memory, "--vcpus", &vcpus];
    let mut all: Vec<String> = fixed.map(str::to_owned).to_vec();
    // Linux complains of a machine without PCI, and then starts.
    all.extend(
        ["--kernel", kernel, "--image", image, "--cmdline", "loglevel=3"].map(str::to_owned),
    );
    if !command.is_empty() {
        all.push("--".to_owned());
        all.extend_from_slice(command);
    }
    all
}

fn shell(command: &str) -> Vec<String> {
    ["/bin/sh", "-c", command].map(str::to_owned).to_vec()
}

fn emulated(ask: &Ask, kernel: &Path, mut told: impl FnMut(&str)) -> Result<i32, GuestError> {
    if let Some(missing) = nested_host::missing() {
        return Err(GuestError::Missing(missing));
    }
    let ready = image::ready(ask.image.as_deref())?;
    let bytes = std::fs::metadata(&ready.path).context("looking at the image")?.len();
    // The host has it packed, unpacked, and again in the guest.
    let needed = u64::from(ask.memory_mib) + 2 * bytes.div_ceil(1 << 20);
    if needed > ROOM_MIB {
        return Err(anyhow!(
            "the image and {} MiB of memory need {needed} MiB of the nested test host, which can \
             spare {ROOM_MIB}: use less, or a machine with VMX or SVM",
            ask.memory_mib
        )
        .into());
    }
    let mut command = shell(&ask.command);
    let copy = match &ready.config {
        Some(config) => {
            Some(image::with_command(&ready.path, config, std::mem::take(&mut command))?)
        }
        None => None,
    };
    let path = copy.as_ref().map_or(ready.path, |copy| copy.path().to_owned());
    let inside = |name: &str| format!("{}/{name}", nested_host::FILES);
    let program = Program {
        name: "runtime".to_owned(),
        path: ask.runtime.clone(),
        arguments: arguments(ask, &inside("vmlinuz"), &inside("image"), &command),
        files: vec![("vmlinuz".to_owned(), kernel.to_owned()), ("image".to_owned(), path)],
        ..Program::default()
    };
    let begin = Instant::now();
    let mut seen = false;
    let ended = nested_host::run(&[program], ask.limit, |line| {
        seen = true;
        told(line);
    });
    match ended {
        Ok(ended) => Ok(ended.first().context("no program ran")?.code),
        Err(_) if seen && begin.elapsed() >= ask.limit => {
            Err(GuestError::Limit { limit: ask.limit })
        }
        Err(error) => Err(error.context("the nested test host").into()),
    }
}

fn here(ask: &Ask, kernel: &Path, mut told: impl FnMut(Event)) -> Result<i32, GuestError> {
    // With a source the runtime finds its environment, too.
    let image: PathBuf = match &ask.image {
        Some(source) => source.clone(),
        None => image::ready(None)?.path,
    };
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.with_context(|| format!("{} is not UTF-8", path.display()))
    };
    let arguments = arguments(ask, &text(kernel)?, &text(&image)?, &shell(&ask.command));
    let mut command = Command::new(&ask.runtime);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    nested_host::end_with_this_process(&mut command, Signal::TERM);
    let mut process = command.spawn().context("starting the runtime")?;
    let output = process.stdout.take().context("the runtime has no output")?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    let deadline = Instant::now() + ask.limit;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some(event) = read(&line) {
                    told(event);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                end(&mut process);
                return Err(GuestError::Limit { limit: ask.limit });
            }
        }
    }
    let status = process.wait().context("waiting for the runtime")?;
    Ok(status.code().with_context(|| format!("the runtime ended with {status}"))?)
}

/// It ends its instances first, if it can.
fn end(process: &mut Child) {
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
    let told = pid.is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
    let deadline = Instant::now() + LAST_WORDS;
    while told && Instant::now() < deadline {
        if !matches!(process.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // It has ended, otherwise.
    drop(process.kill());
    drop(process.wait());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_from_programs() {
        assert!(is_kernel("[   16.587251] kvm [96]: vcpu0, guest rIP"));
        assert!(is_kernel("[12345.000001] x"));
        for line in ["note: [1.2] x", "[1] x", "[a.b] x", "[1.2]", ""] {
            assert!(!is_kernel(line), "{line}");
        }
    }
}
