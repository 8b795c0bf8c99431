//! The agent as the first process of a machine: in namespaces of its own, with a root file system of
//! the test and a doorbell that writes down what is rung.
//!
//! Where there can be no namespaces every test is listed as ignored, with the reason.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use guest_abi::port::answer;
use guest_agent::doorbell::{Doorbell, Words};
use guest_agent::{cli, init};
use libtest_mimic::{Arguments, Trial};

/// A machine does not run longer.
const LIMIT: Duration = Duration::from_secs(20);

/// Makes the root file system and becomes its first process. `$1` is its folder, `$2` this program.
const SCRIPT: &str = "
    set -e
    mount --make-rprivate /
    mount --bind \"$1\" \"$1\"
    for folder in usr lib lib64 bin; do
        if [ -d /$folder ]; then mkdir -p \"$1/$folder\"; mount --bind /$folder \"$1/$folder\"; fi
    done
    mount -t tmpfs none \"$1/dev\"
    for device in null fuse urandom; do
        touch \"$1/dev/$device\"; mount --bind /dev/$device \"$1/dev/$device\"
    done
    : > \"$1/out/console\"; touch \"$1/dev/console\"
    mount --bind \"$1/out/console\" \"$1/dev/console\"
    touch \"$1/.uk/init\"; mount --bind \"$2\" \"$1/.uk/init\"
    exec chroot \"$1\" /.uk/init";

/// A test: its name and what it does.
type Case = (&'static str, fn() -> Result<()>);

fn main() {
    let arguments: Vec<_> = std::env::args_os().collect();
    let name = arguments.first().and_then(|name| Path::new(name).file_name());
    if std::process::id() == 1 && name.is_some_and(|name| name == "init") {
        init::run(|| Ok(Arc::new(Bell)));
    }
    if name.is_some_and(|name| name == "ukp") {
        let code = cli::run(arguments, Path::new(init::LIBUKP));
        std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
    }
    let arguments = Arguments::from_args();
    let missing = missing();
    if let Some(reason) = &missing {
        eprintln!("ignored: {reason}");
    }
    let cases: [Case; 8] = [
        ("the_exit_code_is_that_of_the_workload", the_exit_code_is_that_of_the_workload),
        ("ukp_exit_ends_the_machine", ukp_exit_ends_the_machine),
        ("the_workload_finds_its_machine", the_workload_finds_its_machine),
        ("a_child_is_another_machine", a_child_is_another_machine),
        ("orphans_are_reaped", orphans_are_reaped),
        ("the_workload_is_frozen_across_a_fork", the_workload_is_frozen_across_a_fork),
        ("a_workload_that_is_not_there", a_workload_that_is_not_there),
        ("a_config_that_is_wrong_is_said", a_config_that_is_wrong_is_said),
    ];
    let trials = cases.into_iter().map(|(name, body)| {
        let reason = missing.clone();
        let run = move || match reason {
            Some(reason) => Err(reason.into()),
            None => body().map_err(|error| format!("{error:#}").into()),
        };
        Trial::test(format!("first::{name}"), run).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// Why there can be no machine here.
fn missing() -> Option<String> {
    if !Path::new("/dev/fuse").exists() {
        return Some("no /dev/fuse".into());
    }
    let mut unshare = Command::new("unshare");
    let tried =
        unshare.args(["-m", "-p", "-u", "-i", "-C", "-f", "true"]).stderr(Stdio::null()).status();
    match tried {
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("unshare, which needs root, ended with {status}")),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// A doorbell that writes what is rung to files of the machine.
struct Bell;

impl Doorbell for Bell {
    fn announce(&self, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn fork(&self) -> io::Result<Words> {
        // Whoever is being stopped has stopped by then.
        let ticks = |after| {
            std::thread::sleep(Duration::from_millis(after));
            fs::metadata("/out/ticks").map_or(0, |ticks| ticks.len())
        };
        fs::write("/out/stood_still", (ticks(20) == ticks(300)).to_string())?;
        let mut words = [0; answer::WORDS];
        if Path::new("/out/child").exists() {
            words[answer::ROLE] = 1;
            words[answer::OWN_UUID..answer::GENERATION]
                .fill(u32::from_le_bytes(*b"\xab\xcd\xef\x4a"));
            words[answer::GENERATION] = 77;
        } else {
            words[answer::STATUS] = 12;
        }
        Ok(words)
    }

    fn ready(&self) -> io::Result<()> {
        fs::write("/out/ready", "")
    }

    fn exit(&self, code: u8) -> io::Result<()> {
        fs::write("/out/exit", code.to_string())
    }

    /// This host's own clock, so that nothing is set.
    fn clock_ns(&self) -> io::Result<u64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        u64::try_from(now.as_nanos()).map_err(io::Error::other)
    }
}

/// What a machine left behind.
struct Ended {
    /// What was rung as its exit code.
    code: String,
    console: String,
    was_ready: bool,
}

static MACHINES: AtomicU32 = AtomicU32::new(0);

/// Runs a machine to its end.
fn run(config: &str) -> Result<Ended> {
    let number = MACHINES.fetch_add(1, Ordering::SeqCst);
    let root = format!("guest-agent-first-{}-{number}", std::process::id());
    let root = std::env::temp_dir().join(root);
    for folder in [".uk", "out", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join(".uk/config.json"), config)?;
    std::os::unix::fs::symlink("init", root.join(".uk/ukp"))?;
    let ended = run_in(&root);
    fs::remove_dir_all(&root)?;
    ended
}

fn run_in(root: &PathBuf) -> Result<Ended> {
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "-p", "-u", "-i", "-C", "-f", "--kill-child", "sh", "-c", SCRIPT, "sh"]);
    let mut machine = unshare.arg(root).arg(std::env::current_exe()?).spawn()?;
    let start = Instant::now();
    let status: ExitStatus = loop {
        if let Some(status) = machine.try_wait()? {
            break status;
        }
        if start.elapsed() > LIMIT {
            machine.kill()?;
            break machine.wait()?;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let console = fs::read_to_string(root.join("out/console")).unwrap_or_default();
    let code = fs::read_to_string(root.join("out/exit"))
        .with_context(|| format!("it ended with {status}; console: {console}"))?;
    Ok(Ended { code, console, was_ready: root.join("out/ready").exists() })
}

/// A machine whose workload is a shell script.
fn script(script: &str) -> Result<Ended> {
    run(&serde_json::json!({ "argv": ["/bin/sh", "-c", script], "env": { "A": "b" } }).to_string())
}

fn the_exit_code_is_that_of_the_workload() -> Result<()> {
    for (line, code) in [("exit 3", "3"), ("true", "0"), ("kill -9 $$", "137")] {
        let ended = script(line)?;
        ensure!(ended.code == code, "{line}: {}", ended.code);
        ensure!(ended.was_ready);
    }
    Ok(())
}

fn ukp_exit_ends_the_machine() -> Result<()> {
    let ended = script("ukp exit 7; echo not reached; exit 1")?;
    ensure!(ended.code == "7" && !ended.console.contains("not reached"), "{}", ended.console);
    Ok(())
}

fn the_workload_finds_its_machine() -> Result<()> {
    let ended = script(
        "echo $A $$ $(cat /run/ukp/generation); ls /uk/libukp; ps -o sid= -p $$
        echo 1 > /uk/libukp/fork && exit 1
        ukp status; ukp status --json; [ -d /proc/self ] && [ -d /dev/pts ] && [ -d /sys/kernel ]",
    )?;
    ensure!(ended.code == "0", "{}: {}", ended.code, ended.console);
    for needle in [
        "b ",
        " 0\n",
        "scale_to_zero_disable\n",
        "fork failed in step 0 of the host: Cannot allocate memory",
        "1 failed",
        "\"state\":\"running\"",
    ] {
        ensure!(ended.console.contains(needle), "{needle:?} is not in {}", ended.console);
    }
    Ok(())
}

/// With the real steps: random numbers, clock, generation, names.
fn a_child_is_another_machine() -> Result<()> {
    let line = "echo 0123456789abcdef0123456789abcdef > /etc/machine-id; touch /out/child
        cat /run/ukp/generation; ukp fork || exit 1; cat /run/ukp/generation /etc/machine-id
        uname -n; ukp status";
    let argv = ["/bin/sh", "-c", line];
    let config = serde_json::json!({ "argv": argv, "hostname": "m-{uuid}" });
    let ended = run(&config.to_string())?;
    ensure!(ended.code == "0", "{}: {}", ended.code, ended.console);
    let own = "abcdef4a-abcd-ef4a-abcd-ef4aabcdef4a";
    for needle in [
        "0\n00000000-0000-0000-0000-000000000000\n77\n",
        "77\nabcdef4aabcdef4aabcdef4aabcdef4a\n",
        &format!("m-{own}\n"),
        &format!("{:<18} {own}\n", "instance"),
        &format!("{:<18} 77\n", "generation"),
    ] {
        ensure!(ended.console.contains(needle), "{needle:?} is not in {}", ended.console);
    }
    let times = ended.console.lines().filter(|line| line.ends_with(" us"));
    eprintln!("{}", times.collect::<Vec<_>>().join("\n"));
    Ok(())
}

fn orphans_are_reaped() -> Result<()> {
    let ended = script(
        "for i in 1 2 3 4 5; do sh -c 'sleep 0.1 & exec true' & done; wait; sleep 0.4
        grep -l '^State:.Z' /proc/[0-9]*/status && exit 1; exit 0",
    )?;
    ensure!(ended.code == "0", "{}", ended.console);
    Ok(())
}

fn the_workload_is_frozen_across_a_fork() -> Result<()> {
    let line = "(while :; do echo >> /out/ticks; done) & sleep 0.2
        echo 1 > /uk/libukp/fork; before=$(wc -c < /out/ticks)
        sleep 0.1; [ $(wc -c < /out/ticks) -gt $before ] && cat /out/stood_still";
    for freeze in [false, true] {
        let argv = ["/bin/sh", "-c", line];
        let ended = run(&serde_json::json!({ "argv": argv, "freeze": freeze }).to_string());
        remove_group()?;
        let ended = ended?;
        ensure!(ended.code == "0", "it goes on: {}", ended.console);
        ensure!(ended.console.ends_with(&freeze.to_string()), "{freeze}: {}", ended.console);
    }
    Ok(())
}

/// Control groups outlive the namespaces that they were made in.
fn remove_group() -> Result<()> {
    let at = std::env::temp_dir().join(format!("guest-agent-groups-{}", std::process::id()));
    fs::create_dir(&at)?;
    let script = "mount -t cgroup2 none \"$1\"; [ ! -d \"$1/workload\" ] || rmdir \"$1/workload\"";
    let mut unshare = Command::new("unshare");
    let removed = unshare.args(["-m", "-C", "sh", "-ec", script, "sh"]).arg(&at).status();
    fs::remove_dir(&at)?;
    ensure!(removed?.success());
    Ok(())
}

fn a_workload_that_is_not_there() -> Result<()> {
    let ended = run(r#"{"argv":["/no/such/program"]}"#)?;
    ensure!(ended.code == "127", "{}", ended.code);
    let line = "ukp-agent: cannot run /no/such/program: No such file or directory";
    ensure!(ended.console.contains(line), "{}", ended.console);
    Ok(())
}

fn a_config_that_is_wrong_is_said() -> Result<()> {
    let ended = run(r#"{"argz":["true"]}"#)?;
    ensure!(ended.code == "120" && !ended.was_ready, "{}", ended.code);
    let line = "cannot understand /.uk/config.json: unknown field `argz`";
    ensure!(ended.console.contains(line), "{}", ended.console);
    Ok(())
}
