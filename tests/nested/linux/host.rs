//! What the host does with a guest.

use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_wire::Terminal;
use runtime::agent::{Command, Said};
use runtime::proto::Request;

use super::guest::{Guest, LONG, one, shell};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("linux::it_boots_and_its_agent_answers", boots),
        ("linux::exec_has_input_output_and_exit_code", exec),
        ("linux::exec_passes_signals", signals),
        ("linux::exec_has_a_terminal", terminal),
        ("linux::files_are_copied_both_ways", copies),
        ("linux::the_console_is_heard", console),
        ("linux::a_child_of_the_host_goes_on_where_it_was", branched),
    ]
}

fn boots() -> Result<()> {
    let guest = one()?;
    let (uuid, generation) = guest.agent(guest.root)?.ping()?;
    ensure!((uuid, generation) == (guest.root, 0), "{uuid} {generation}");
    Ok(())
}

fn exec() -> Result<()> {
    let guest = one()?;
    let script = "read a; read b; echo \"$b $a $NAME $(pwd)\"; echo wrong >&2; exit 5";
    let mut command = shell(script);
    command.env.insert("NAME".to_owned(), "name".to_owned());
    command.cwd = Some("/etc".to_owned());
    let output = guest.run(guest.root, &command, b"one\ntwo\n")?;
    ensure!(
        (output.code, &*output.out, &*output.err) == (5, "two one name /etc\n", "wrong\n"),
        "{output:?}"
    );
    let output = guest.run(guest.root, &shell("kill -9 $$"), &[])?;
    ensure!(output.code == 137, "{output:?}");
    let nothing = Command { argv: vec!["/no/such/program".to_owned()], ..Command::default() };
    let error = guest.run(guest.root, &nothing, &[]).err().context("it ran")?;
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    Ok(())
}

fn signals() -> Result<()> {
    let guest = one()?;
    let sleep = Command { argv: vec!["/bin/sleep".into(), "1000".into()], ..Command::default() };
    let mut running = guest.agent(guest.root)?.exec(&sleep)?;
    // More than it, the agent, the connection and its sockets have room for: it reads nothing.
    let mut input = running.input()?;
    std::thread::spawn(move || (0..100).try_for_each(|_| input.send(&[0; 16 * 1024])));
    running.signals().send(15)?;
    let (sender, heard) = channel();
    std::thread::spawn(move || sender.send(running.hear()).unwrap_or(()));
    let said = heard.recv_timeout(LONG)??;
    ensure!(matches!(said, Said::Exited(143)), "{said:?}");
    Ok(())
}

fn terminal() -> Result<()> {
    let guest = one()?;
    let tty = Some(Terminal { rows: 33, cols: 99 });
    let command = Command { tty, ..shell("tty; stty size") };
    let output = guest.run(guest.root, &command, &[])?;
    ensure!(output.out.starts_with("/dev/pts/") && output.out.contains("33 99"), "{output:?}");
    Ok(())
}

fn copies() -> Result<()> {
    let guest = one()?;
    let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).take(200_001).collect();
    guest.agent(guest.root)?.write("/tmp/copy", 0o750, &mut bytes.as_slice())?;
    let mut found = 0;
    let read = guest.agent(guest.root)?.read("/tmp/copy", |mode| {
        found = mode;
        Ok(Vec::new())
    })?;
    ensure!(read == bytes, "{} bytes came back", read.len());
    ensure!(found & 0o777 == 0o750, "with mode {found:o}");
    let error = guest.agent(guest.root)?.read("/no/such/file", |_| Ok(Vec::new()));
    let error = error.err().context("it was read")?.to_string();
    ensure!(error.contains("/no/such/file"), "{error}");
    Ok(())
}

fn console() -> Result<()> {
    let guest = one()?;
    guest.sh(guest.root, "echo heard-on-the-console > /dev/console")?;
    let heard = |guest: &Guest| guest.console(guest.root);
    for _ in 0..100 {
        if heard(&guest)?.contains("heard-on-the-console\n") {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    anyhow::bail!("it was not: {}", heard(&guest)?)
}

/// Memory, a process that counts, and the time since the boot.
fn branched() -> Result<()> {
    let guest = one()?;
    let count = "mkfifo /tmp/ask; exec 3<>/tmp/ask; (i=0; while read line <&3; do i=$((i+1)); echo $i > /tmp/count; done) > /dev/null 2>&1 &";
    guest.sh(guest.root, count)?;
    let next = "echo > /tmp/ask; sleep 1; cat /tmp/count";
    ensure!(guest.sh(guest.root, next)? == "1\n", "the first");
    guest.owner.ask(guest.root, Request::Standbys { count: 1 }).context("making standbys")?;
    let child = guest.owner.branch(guest.root, 1)?[0];
    guest.owner.wait_for(child, LONG)?;
    for (instance, expected) in [(child, "2\n"), (child, "3\n"), (guest.root, "2\n")] {
        let found = guest.sh(instance, next)?;
        ensure!(found == expected, "{instance} counts {found:?} instead of {expected:?}");
    }
    guest.owner.kill(child)?;
    guest.end_of(child)?;
    Ok(())
}
