//! A fork amid work.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::guest::{LONG, all_told, told, two};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![("linux::a_fork_under_load_disturbs_neither", load)]
}

const PORT: u32 = 5001;
/// So many rounds of each part come after the fork (`ukp-check load`).
const ROUNDS: u64 = 20;
/// What goes on in every machine, and what in the parent alone.
const PARTS: [&str; 5] = ["memory", "pipe", "registers", "sent", "heard"];
const OWN: usize = 3;

/// Sends numbers, until nobody hears them.
fn send(mut to: &UnixStream) {
    for number in 0_u64.. {
        if to.write_all(&number.to_le_bytes()).is_err() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// How many numbers the guest has sent, until its end of the connection was closed.
fn hear(mut from: &UnixStream) -> Result<u64> {
    // The first line says who it is.
    let mut byte = [0];
    while byte != *b"\n" {
        from.read_exact(&mut byte)?;
    }
    let mut bytes = [0; 8];
    for expected in 0_u64.. {
        match from.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(expected),
            Err(error) => return Err(error).context("hearing the guest"),
        }
        let number = u64::from_le_bytes(bytes);
        ensure!(number == expected, "the guest sent {number} instead of {expected}");
    }
    Ok(0)
}

/// Both processors busy, one thread in read(2), a connection to the host with numbers under way both
/// ways: each goes on as if nothing had happened, in the parent and in the child, where the
/// connection is no more.
fn load() -> Result<()> {
    super::guest::end_frozen();
    let guest = two()?;
    let path = guest.owner.folder().join(format!("port_{PORT}"));
    let listener = UnixListener::bind(&path).context("listening")?;
    let (heard, count) = channel();
    std::thread::spawn(move || {
        let Ok((connection, _)) = listener.accept() else { return };
        std::thread::scope(|scope| {
            scope.spawn(|| send(&connection));
            heard.send(hear(&connection)).unwrap_or(());
        });
    });
    let output = guest.run_long(guest.root, &format!("ukp-check load {PORT}"), LONG * 4)?;
    ensure!(output.code == 0, "{output:?}");
    let child: Uuid = told(&output.out, "read")?.parse().with_context(|| output.out.clone())?;
    let (code, console) = guest.end_of(child)?;
    ensure!(code == 0, "the child ended with {code}: {console}");
    grew("the parent", &output.out, PARTS.len())?;
    grew("the child", &console, OWN)?;
    all_told(&output.out, &[("sent", "ok"), ("heard", "ok")])?;
    // The kernel gives an error to whoever asks first; the other then sees an end or a broken pipe.
    for end in ["sent", "heard"] {
        ensure!(told(&console, end)? != "ok", "the child has the connection, too: {console}");
    }
    let sent = numbers(&output.out, "worked")?[3];
    let heard = count.recv_timeout(LONG)??;
    ensure!(heard == sent, "the parent has sent {sent} numbers, the host heard {heard}");
    std::fs::remove_file(path)?;
    Ok(())
}

fn numbers(text: &str, name: &str) -> Result<Vec<u64>> {
    let numbers: Vec<u64> =
        told(text, name)?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    ensure!(numbers.len() == PARTS.len(), "{text}");
    Ok(numbers)
}

/// Each part was under way at the fork, and has come further since.
fn grew(who: &str, text: &str, parts: usize) -> Result<()> {
    let (at, end) = (numbers(text, "at")?, numbers(text, "worked")?);
    println!("{who} worked on from {at:?} to {end:?} ({})", PARTS.join(", "));
    all_told(text, &[("wrong", "none")])?;
    for ((part, at), end) in PARTS.iter().zip(at).zip(end).take(parts) {
        ensure!(at >= ROUNDS, "{part} in {who} had not begun: {text}");
        ensure!(end >= at + ROUNDS, "{part} in {who} stood still: {at}, then {end}");
    }
    Ok(())
}
