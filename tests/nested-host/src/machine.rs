//! The nested test host: a machine under software emulation whose Linux offers a standard
//! `/dev/kvm` (SVM), on any machine, without hardware or privileges.
//!
//! ```text
//!   this test program ── initramfs ──> QEMU (TCG, SVM) ── Debian's kernel, kvm-amd
//!        ^                                   │ init: mounts, modules, then each program
//!        └──────── serial line: output, exit codes ────┘
//! ```
//!
//! Programs run one after the other and end with it; their output comes line by line as it is
//! written. A limit of time ends everything, and so does the end of this process.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const QEMU: &str = "qemu-system-x86_64";
const MEMORY_MIB: u32 = 3072;
/// What the serial line says around a program, so that nothing a program prints is taken for it.
const BEGIN: &str = "@ukp-begin ";
const END: &str = "@ukp-end ";
/// Modules in the order in which they are loaded.
const MODULES: [&str; 3] = ["irqbypass.ko", "kvm.ko", "kvm-amd.ko"];

/// A program to run there.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Its name in output and errors.
    pub name: String,
    /// The file; the libraries that it needs come along.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its environment besides `PATH`, `HOME` and `XDG_RUNTIME_DIR`.
    pub environment: Vec<(String, String)>,
    /// Files that it finds in [`FILES`], by name.
    pub files: Vec<(String, PathBuf)>,
    /// Programs that it starts, in `/bin` by their names; their libraries come along, too.
    pub others: Vec<PathBuf>,
    /// Kernel modules that it needs besides those of KVM, in the order of loading.
    pub modules: Vec<PathBuf>,
}

/// Where a program finds its files.
pub const FILES: &str = "/files";

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its name.
    pub name: String,
    /// Its exit code; 128 and more: by a signal.
    pub code: i32,
    /// What it wrote, stdout and stderr.
    pub output: Vec<String>,
}

/// What is missing for a nested test host, and what to do.
#[must_use]
pub fn missing() -> Option<String> {
    let lacks = |program: &&&str| !in_path(program);
    if let Some(program) = [QEMU, "cpio", "gzip", "ldd"].iter().find(lacks) {
        return Some(format!("{program} is not there; ./just installs it"));
    }
    if busybox().is_none() {
        return Some("a static busybox is not there; ./just installs it".to_owned());
    }
    let folder = kernel_folder();
    let file = ["vmlinuz"].into_iter().chain(MODULES).map(|name| folder.join(name));
    let absent = file.into_iter().find(|path| !path.exists())?;
    Some(format!("{} is not there; ./just fetches it", absent.display()))
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The static busybox of this machine.
pub(crate) fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(PathBuf::from).find(|path| path.exists())
}

/// Where the kernel of that host lies, with its modules.
#[must_use]
pub fn kernel_folder() -> PathBuf {
    // Without one the files in it are told to be missing.
    guest_image::cache_dir().unwrap_or_default().join("nested-kernel")
}

/// Boots a host, runs the programs in it one after the other, and passes on each line of output as
/// it comes. The host ends with the last one.
///
/// # Errors
///
/// If it could not be started, did not come up, or took too long: with what it said last.
pub fn run(
    programs: &[Program],
    limit: Duration,
    mut told: impl FnMut(&str),
) -> Result<Vec<Ended>> {
    let folder = Folder::new()?;
    let initramfs = initramfs(&folder.0, programs).context("packing the initramfs")?;
    let machine = Machine::start(&initramfs)?;
    let mut folder = Some(folder);
    let deadline = Instant::now() + limit;
    let mut ended: Vec<Ended> = Vec::new();
    let mut under_way: Option<(String, Vec<String>)> = None;
    let mut last: Vec<String> = Vec::new();
    let mut pulse = Pulse::of(&machine.process);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = match machine.lines.recv_timeout(left.min(LOOK)) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if left > LOOK => {
                if pulse.has_stopped() {
                    return Err(Stalled { last: last.join("\n") }.into());
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                let at = under_way.map_or("booting".to_owned(), |(name, _)| name);
                bail!(
                    "after {} s it was at {at}; it said last:\n{}",
                    limit.as_secs(),
                    last.join("\n")
                );
            }
        };
        // QEMU has read it, or holds it. From here on a process that is killed leaves nothing.
        drop(folder.take());
        if let Some(name) = line.strip_prefix(BEGIN) {
            under_way = Some((name.to_owned(), Vec::new()));
        } else if let Some(code) = line.strip_prefix(END) {
            let code = code.trim().parse().with_context(|| format!("an exit code in {line:?}"))?;
            let (name, output) = under_way.take().context("an end without a beginning")?;
            ended.push(Ended { name, code, output });
        } else {
            if let Some((_, output)) = &mut under_way {
                told(&line);
                output.push(line.clone());
            }
            last.push(line);
            let many = last.len().saturating_sub(30);
            last.drain(..many);
        }
    }
    ensure!(
        ended.len() == programs.len(),
        "it ended after {} of {} programs; it said last:\n{}",
        ended.len(),
        programs.len(),
        last.join("\n")
    );
    Ok(ended)
}

/// The emulator stands still: nothing runs in it any more, not even the kernel's own timers.
///
/// What waits in there has limits of time, but no time passes. Seen with QEMU 7.2 before its threads
/// were kept on one processor.
#[derive(Debug)]
pub struct Stalled {
    last: String,
}

impl std::fmt::Display for Stalled {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = STILL.as_secs();
        write!(
            formatter,
            "the emulator used no processor for {seconds} s; it said last:\n{}",
            self.last
        )
    }
}

impl std::error::Error for Stalled {}

/// How often the emulator is looked at while it says nothing.
const LOOK: Duration = Duration::from_secs(5);
/// How long it may use no processor at all. A kernel that idles uses some milliseconds in that time.
const STILL: Duration = Duration::from_mins(2);

/// The processor time of a process.
struct Pulse {
    stat: PathBuf,
    ticks: Option<u64>,
    since: Instant,
}

impl Pulse {
    fn of(process: &Child) -> Self {
        let stat = Path::new("/proc").join(process.id().to_string()).join("stat");
        Self { stat, ticks: None, since: Instant::now() }
    }

    /// Whether it has used none since [`STILL`] ago.
    fn has_stopped(&mut self) -> bool {
        let ticks = ticks(&fs::read_to_string(&self.stat).unwrap_or_default());
        if ticks.is_none() || ticks != self.ticks {
            (self.ticks, self.since) = (ticks, Instant::now());
        }
        self.since.elapsed() >= STILL
    }
}

/// Ticks in user and kernel mode: the 14th and 15th word, of which the second may have blanks.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace().skip(11);
    let mut next = || words.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// How the names of this module's folders begin, in the folder for temporary files.
#[must_use]
pub fn folder_prefix() -> &'static str {
    "ukp-nested-"
}

/// A folder that goes with this value.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{number}", folder_prefix(), std::process::id());
        let path = std::env::temp_dir().join(name);
        // Left by a process of that number that was killed.
        drop(fs::remove_dir_all(&path));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// The machine; it ends with this value.
struct Machine {
    process: Child,
    lines: Receiver<String>,
}

impl Machine {
    fn start(initramfs: &Path) -> Result<Self> {
        let append = "console=ttyS0 reboot=t panic=1 mitigations=off nopti nokaslr quiet";
        let mut command = Command::new(QEMU);
        command
            // One thread, and one processor. With a thread for each, QEMU 7.2 loses changes of code
            // and reads page tables wrong below SVM: its kernel stands still in an int3 that is no
            // more (1 boot in 40), and a guest faults where it has run before (1 test in 80). With
            // two processors on one thread, an interrupt for the one makes it deliver the other's
            // last injected interrupt once more, even to a guest that has interrupts off
            // (`helper_vmrun` leaves `exception_index` set, and a kick acts on it): every second
            // Linux guest waited for ever for a lock that it held itself. No XSAVE: a guest's XSETBV
            // is not intercepted, so KVM takes its registers for fewer than they are.
            .args([
                "-M",
                "q35",
                "-accel",
                "tcg,thread=single",
                "-cpu",
                "max,+svm,-xsave",
                "-smp",
                "1",
            ])
            .args(["-m", &MEMORY_MIB.to_string(), "-nographic", "-nodefaults", "-no-reboot"])
            .args(["-serial", "stdio", "-append", append, "-kernel"])
            .arg(kernel_folder().join("vmlinuz"))
            .arg("-initrd")
            .arg(initramfs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        end_with_this_process(&mut command, Signal::KILL);
        stay_on_one_processor(&mut command);
        let mut process = command.spawn().context("starting QEMU")?;
        let output = process.stdout.take().context("QEMU has no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(output);
            let mut bytes = Vec::new();
            // The end of the line: the machine is gone.
            while reader.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
                bytes.clear();
            }
            // So that QEMU never waits for a reader.
            drop(reader.read_to_end(&mut bytes));
        });
        Ok(Self { process, lines })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Keeps all threads of the process that `command` starts on one of our processors.
///
/// Below SVM, QEMU 7.2's thread of the emulated processor changes the word of requested interrupts at
/// each VMRUN and exit without its lock (`helper_vmrun`, `do_vmexit`), while the main thread requests
/// the timer's there. Side by side the two lose a request now and then: the timer's interrupt stays
/// pending in the APIC for ever, and nothing in there has a time any more (2 of 3 runs of the suite on
/// a quiet machine). Each change is one instruction, so on one processor none is lost.
#[expect(unsafe_code, reason = "what is done between fork and exec is ours to keep safe")]
fn stay_on_one_processor(command: &mut Command) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let Ok(all) = sched_getaffinity(None) else { return };
    let there: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).collect();
    // Those that run at the same time do not share one.
    let turn = NEXT.fetch_add(1, Ordering::Relaxed);
    let Some(cpu) = there.iter().rev().cycle().nth(turn % there.len().max(1)) else { return };
    let mut one = CpuSet::new();
    one.set(*cpu);
    // Where it may not, it runs as before.
    let stay = move || {
        sched_setaffinity(None, &one).unwrap_or(());
        Ok(())
    };
    // SAFETY: one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(stay) };
}

#[expect(unsafe_code, reason = "what is done between fork and exec is ours to keep safe")]
/// Has the process that `command` starts get `signal` when the thread that starts it ends.
pub fn end_with_this_process(command: &mut Command, signal: Signal) {
    let child =
        move || rustix::process::set_parent_process_death_signal(Some(signal)).map_err(Into::into);
    // SAFETY: one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(child) };
}

/// Packs programs, libraries, busybox, modules and the init that runs them.
fn initramfs(folder: &Path, programs: &[Program]) -> Result<PathBuf> {
    let root = folder.join("root");
    for name in ["bin", "m", "proc", "sys", "dev", "tmp", "run", "p"] {
        fs::create_dir_all(root.join(name))?;
    }
    let busybox = busybox().context("no busybox")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for name in ["sh", "cat"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    let own = MODULES.map(|module| kernel_folder().join(module));
    for module in own.iter().chain(programs.iter().flat_map(|program| &program.modules)) {
        let packed = || format!("packing {}", module.display());
        fs::copy(module, root.join("m").join(name_of(module)?)).with_context(packed)?;
    }
    let mut libraries = BTreeSet::new();
    for (index, program) in programs.iter().enumerate() {
        libraries.extend(libraries_of(&program.path)?);
        fs::copy(&program.path, root.join(format!("p/{index}")))?;
        for other in &program.others {
            libraries.extend(libraries_of(other)?);
            fs::copy(other, root.join("bin").join(name_of(other)?))?;
        }
        for (name, file) in &program.files {
            let to = root.join(&FILES[1..]).join(name);
            fs::create_dir_all(root.join(&FILES[1..]))?;
            fs::copy(file, to).with_context(|| format!("packing {}", file.display()))?;
        }
    }
    for library in libraries {
        let to = root.join(library.strip_prefix("/")?);
        fs::create_dir_all(to.parent().context("a library has a folder")?)?;
        fs::copy(&library, to)?;
    }
    let init = root.join("init");
    fs::write(&init, init_script(programs)?)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let packed = folder.join("initramfs.gz");
    pack(&root, &packed)?;
    Ok(packed)
}

fn name_of(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.with_context(|| format!("{} has no name", path.display()))
}

fn pack(root: &Path, packed: &Path) -> Result<()> {
    let script = format!(
        "cd '{}' && find . | cpio -o -H newc --quiet | gzip -1 > '{}'",
        root.display(),
        packed.display()
    );
    let status = Command::new("sh").args(["-c", &script]).status()?;
    ensure!(status.success(), "cpio ended with {status}");
    Ok(())
}

fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    // A static program has none, and ldd says so with an error.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

/// One word of a shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn init_script(programs: &[Program]) -> Result<String> {
    let mut lines = vec![
        "#!/bin/busybox sh".to_owned(),
        "b=/bin/busybox".to_owned(),
        "$b mount -t proc p /proc; $b mount -t sysfs s /sys; $b mount -t devtmpfs d /dev"
            .to_owned(),
        "$b mount -t tmpfs t /tmp; $b mount -t tmpfs r /run".to_owned(),
        "$b mount -t tracefs t /sys/kernel/tracing; $b ip link set lo up".to_owned(),
        "export PATH=/bin HOME=/tmp XDG_RUNTIME_DIR=/run".to_owned(),
    ];
    lines.extend(MODULES.map(|module| format!("$b insmod /m/{module}")));
    for module in programs.iter().flat_map(|program| &program.modules) {
        lines.push(format!("$b insmod /m/{}", quoted(name_of(module)?)));
    }
    // The kernel writes to the same serial line, into the middle of what a program prints.
    lines.push("$b dmesg -n 1".to_owned());
    for (index, program) in programs.iter().enumerate() {
        let pairs = program.environment.iter();
        let pairs = pairs.map(|(name, value)| format!("{name}={}", quoted(value)));
        let environment = pairs.collect::<Vec<_>>().join(" ");
        let arguments = program.arguments.iter().map(|argument| quoted(argument));
        let arguments = arguments.collect::<Vec<_>>().join(" ");
        // The firmware, the kernel and the program may leave half a line.
        lines.push(format!("echo; echo \"{BEGIN}{}\"", program.name));
        lines.push(format!("{environment} /p/{index} {arguments} 2>&1"));
        lines.push(format!("code=$?; echo; echo \"{END}$code\""));
    }
    lines.push("$b sync; $b reboot -f\n".to_owned());
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_sleeps_has_no_pulse_and_one_that_works_has() {
        assert_eq!(ticks("7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0"), Some(42));
        assert_eq!(ticks("nonsense"), None);
        let own = || ticks(&fs::read_to_string("/proc/self/stat").expect("it is there"));
        let (before, begin) = (own(), Instant::now());
        while own() == before {
            assert!(begin.elapsed() < Duration::from_secs(20));
        }
        // A machine that was started a moment ago has no such time.
        let Some(earlier) = Instant::now().checked_sub(STILL) else { return };
        let mut sleeper = Command::new("sleep").arg("60").spawn().expect("it starts");
        let mut pulse = Pulse::of(&sleeper);
        assert!(!pulse.has_stopped());
        pulse.since = earlier;
        assert!(pulse.has_stopped());
        sleeper.kill().expect("it runs");
        sleeper.wait().expect("it has ended");
        assert!(!pulse.has_stopped(), "one that is gone is told by its line");
    }
}
