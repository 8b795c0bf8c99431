//! Work that a fork must not disturb.
//!
//! ```text
//!   memory, pipe, registers     go on in both machines
//!   sent to the host, heard     go on in the parent; the child's connection is reset
//! ```

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::say::{self, ZERO, fork, shown};

const PAGE_WORDS: usize = 512;
const PAGES: usize = 256;
/// So many rounds of each before the fork, and after it.
const ROUNDS: u64 = 20;
/// How long they may take.
const LIMIT: Duration = Duration::from_secs(90);
/// Parts that work in every machine; the rest is the connection.
const OWN: usize = 3;

/// How far each part has come.
type Counts = [AtomicU64; 5];

fn now(counts: &Counts) -> [u64; 5] {
    counts.each_ref().map(|count| count.load(Ordering::SeqCst))
}

fn words(counts: [u64; 5]) -> String {
    counts.map(|count| count.to_string()).join(" ")
}

/// Forks amid the work, and goes on until every part has done some more. Whoever is the child then
/// says so on the console.
///
/// ```text
///  @at N …       how far memory, pipe, registers, sent, heard had come when the fork returned
///  @worked N …   and at the end
///  @wrong none   or what was wrong
///  @sent, @heard ok, or the error of the connection
/// ```
pub fn across_a_fork(port: u32) -> Result<()> {
    let before = generation()?;
    let counts = Counts::default();
    let end = AtomicBool::new(false);
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    // So that both see the end.
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let (read, at, own, connection) = std::thread::scope(|scope| {
        let ([memory_count, pipe_count, register_count, sent, heard], end, stream) =
            (&counts, &end, &stream);
        let own = [
            scope.spawn(move || memory(end, memory_count)),
            scope.spawn(move || pipe(end, pipe_count)),
            scope.spawn(move || registers(end, register_count)),
        ];
        let connection = [
            scope.spawn(move || send(stream, end, sent)),
            scope.spawn(move || hear(stream, end, heard)),
        ];
        let read = grow(&counts, [0; 5], 5).and_then(|()| Ok(fork()?));
        let at = now(&counts);
        let parts = if read.as_ref().is_ok_and(|read| read == ZERO) { OWN } else { 5 };
        let read = read.and_then(|read| grow(&counts, at, parts).map(|()| read));
        end.store(true, Ordering::SeqCst);
        let own = own.map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("panicked"))));
        let connection = connection
            .map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))));
        (read, at, own, connection)
    });
    let [sent, heard] = connection.map(|end| shown(end.map(|()| "ok".to_owned())));
    let wrong: Vec<String> = own
        .into_iter()
        .filter_map(Result::err)
        .chain(read.as_ref().err().map(|error| anyhow!("{error:#}")))
        .map(|error| format!("{error:#}"))
        .collect();
    let child = generation()? != before;
    let read = read.unwrap_or_else(|_| "nothing".to_owned());
    let found = [
        ("read", read.clone()),
        ("at", words(at)),
        ("worked", words(now(&counts))),
        ("wrong", if wrong.is_empty() { "none".to_owned() } else { wrong.join("; ") }),
        ("sent", sent),
        ("heard", heard),
    ];
    if child { say::in_child(&found) } else { say::here(&found) }
}

fn generation() -> io::Result<String> {
    std::fs::read_to_string("/run/ukp/generation")
}

/// Waits until each of the first `parts` has come [`ROUNDS`] further than `from`. By the monotonic
/// clock, which a fork must not disturb either.
fn grow(counts: &Counts, from: [u64; 5], parts: usize) -> Result<()> {
    let begin = Instant::now();
    loop {
        let now = now(counts);
        if now.iter().zip(from).take(parts).all(|(now, from)| *now >= from + ROUNDS) {
            return Ok(());
        }
        if begin.elapsed() > LIMIT {
            bail!("in {LIMIT:?} they have come from {} to {}", words(from), words(now));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Writes the round's number to one page after the other: at any moment the first pages have one
/// number and the rest the one before.
fn memory(end: &AtomicBool, count: &AtomicU64) -> Result<()> {
    let mut words = vec![0_u64; PAGES * PAGE_WORDS];
    for round in 1.. {
        if end.load(Ordering::Relaxed) {
            break;
        }
        for page in words.chunks_mut(PAGE_WORDS) {
            for at in [0, PAGE_WORDS / 2, PAGE_WORDS - 1] {
                let word = page.get_mut(at).context("a word")?;
                ensure!(*word == round - 1, "a page has {word} in round {round}");
                *word = round;
            }
        }
        count.store(round, Ordering::SeqCst);
    }
    Ok(())
}

/// One thread writes numbers to a pipe, this one sleeps in read(2): none is lost, none comes twice.
fn pipe(end: &AtomicBool, count: &AtomicU64) -> Result<()> {
    let (mut reader, mut writer) = io::pipe()?;
    std::thread::scope(|scope| {
        scope.spawn(move || -> io::Result<()> {
            for number in 0_u64.. {
                if end.load(Ordering::Relaxed) {
                    break;
                }
                writer.write_all(&number.to_ne_bytes())?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        let mut expected = 0;
        let mut bytes = [0; 8];
        while reader.read_exact(&mut bytes).is_ok() {
            let number = u64::from_ne_bytes(bytes);
            ensure!(number == expected, "the pipe gave {number} instead of {expected}");
            expected += 1;
            count.store(expected, Ordering::SeqCst);
        }
        Ok(())
    })
}

/// The same sum again and again, which lives in vector registers.
fn registers(end: &AtomicBool, count: &AtomicU64) -> Result<()> {
    let sum = || (1..20_000_u32).map(|n| 1.0 / f64::from(n).sqrt()).sum::<f64>().to_bits();
    let first = sum();
    while !end.load(Ordering::Relaxed) {
        let next = sum();
        ensure!(next == first, "the sum was {first:x} and is {next:x}");
        count.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// Sends numbers to the host, which looks at them.
fn send(mut stream: &VsockStream, end: &AtomicBool, count: &AtomicU64) -> io::Result<()> {
    for number in 0_u64.. {
        if end.load(Ordering::Relaxed) {
            break;
        }
        stream.write_all(&number.to_le_bytes())?;
        count.store(number + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(2));
    }
    stream.shutdown(std::net::Shutdown::Write)
}

/// Hears numbers from the host: none is lost, none comes twice.
fn hear(mut stream: &VsockStream, end: &AtomicBool, count: &AtomicU64) -> io::Result<()> {
    let mut bytes = [0; 8];
    for expected in 0_u64.. {
        if end.load(Ordering::Relaxed) {
            break;
        }
        stream.read_exact(&mut bytes)?;
        let number = u64::from_le_bytes(bytes);
        if number != expected {
            return Err(io::Error::other(format!("heard {number} instead of {expected}")));
        }
        count.store(number + 1, Ordering::SeqCst);
    }
    Ok(())
}
