//! Work that a fork must not disturb.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::say::{self, ZERO, libukp, shown};

const PAGE_WORDS: usize = 512;
const PAGES: usize = 256;

/// Works for so many seconds. Whoever is a child at the end says so on the console.
pub fn work(seconds: u64) -> Result<()> {
    let end = AtomicBool::new(false);
    say::here(&[("working", String::new())])?;
    let rounds = std::thread::scope(|scope| {
        let all = [
            scope.spawn(|| memory(&end)),
            scope.spawn(|| pipe(&end)),
            scope.spawn(|| registers(&end)),
        ];
        // By the monotonic clock, which a fork must not disturb either.
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_millis(50));
        }
        end.store(true, Ordering::SeqCst);
        let rounds = all.map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("panicked"))));
        rounds.into_iter().collect::<Result<Vec<u64>>>()
    });
    let found = match rounds {
        Ok(rounds) => format!("{rounds:?}"),
        Err(error) => format!("wrong: {error:#}"),
    };
    let who = shown(std::fs::read_to_string(libukp("fork")));
    let found = [("worked", found)];
    if who == ZERO { say::in_child(&found) } else { say::here(&found) }
}

/// Writes the round's number to one page after the other: at any moment the first pages have one
/// number and the rest the one before.
fn memory(end: &AtomicBool) -> Result<u64> {
    let mut words = vec![0_u64; PAGES * PAGE_WORDS];
    let mut round = 0;
    while !end.load(Ordering::Relaxed) {
        round += 1;
        for page in words.chunks_mut(PAGE_WORDS) {
            for at in [0, PAGE_WORDS / 2, PAGE_WORDS - 1] {
                let word = page.get_mut(at).context("a word")?;
                ensure!(*word == round - 1, "a page has {word} in round {round}");
                *word = round;
            }
        }
    }
    Ok(round)
}

/// One thread writes numbers to a pipe, this one sleeps in read(2): none is lost, none comes twice.
fn pipe(end: &AtomicBool) -> Result<u64> {
    let (mut reader, mut writer) = std::io::pipe()?;
    std::thread::scope(|scope| {
        scope.spawn(move || -> std::io::Result<()> {
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
        }
        Ok(expected)
    })
}

/// The same sum again and again, which lives in vector registers.
fn registers(end: &AtomicBool) -> Result<u64> {
    let sum = || (1..20_000_u32).map(|n| 1.0 / f64::from(n).sqrt()).sum::<f64>().to_bits();
    let first = sum();
    let mut rounds = 0;
    while !end.load(Ordering::Relaxed) {
        let next = sum();
        ensure!(next == first, "the sum was {first:x} and is {next:x}");
        rounds += 1;
    }
    Ok(rounds)
}
