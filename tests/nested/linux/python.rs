//! A program that nobody here wrote, forked ten ways from inside: Python with a tree of modules,
//! `SQLite` with an open transaction and a cursor half way, and the command-line tool with a database
//! in memory at the other end of two pipes (`shop.py`).

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::guest::{all_told, python, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("python::ten_children_of_a_warm_interpreter_are_each_right", children),
        ("python::the_parent_of_ten_is_unharmed", parent),
        ("python::no_two_machines_have_the_same_random_numbers", random),
        ("python::an_openssl_that_is_not_told_repeats_itself", untold),
        ("python::many_children_have_no_random_number_in_common", many),
    ]
}

static PROGRAM: &[u8] = include_bytes!("shop.py");
static MANY: &[u8] = include_bytes!("many.py");
/// How many children `many.py` forks, if not [`CHILDREN`].
pub const CHILDREN_FROM: &str = "UKP_CHILDREN";
const CHILDREN: u32 = 12;
const ROWS: u64 = 3000;
const TAKEN: u64 = 1000;
const ROME: u64 = 1_000_000;
const CITIES: [&str; 7] = ["Bonn", "Graz", "Lyon", "Oslo", "Turin", "York", "Zug"];
/// The program's start, with what it imports, and ten forks, all emulated.
const LIMIT: Duration = Duration::from_mins(5);

/// As the program says it.
fn cents(number: u64) -> u64 {
    number * number * 7919 % 10007
}

fn city(number: u64) -> &'static str {
    CITIES[usize::try_from(number % 7).unwrap_or_default()]
}

fn total(sales: impl Iterator<Item = u64>) -> u64 {
    sales.map(cents).sum()
}

/// What each child finds, by its number.
fn expected() -> [String; 10] {
    let all = total(1..=ROWS);
    let most = |name| (1..=ROWS).filter(|n| city(*n) == name).map(cents).max().unwrap_or(0);
    let cents_and_rome = all + ROME;
    let mut counts: Vec<(&str, usize)> = CITIES
        .iter()
        .map(|name| (*name, (1..=ROWS).filter(|n| city(*n) == *name).count()))
        .collect();
    counts.push(("Rome", 1));
    counts.sort_unstable();
    let counted: Vec<String> = counts.iter().map(|(city, n)| format!("{city},{n}")).collect();
    let json: Vec<String> = (1..=4).map(|n| format!("\"{n}\":{}", cents(n))).collect();
    [
        (total(TAKEN + 1..=ROWS) + ROME).to_string(),
        all.to_string(),
        cents_and_rome.to_string(),
        // 1,000,000 is no multiple of three.
        (ROWS - ROWS / 3 + 1).to_string(),
        (1..=500).sum::<u64>().to_string(),
        format!("{}.{:02}", cents_and_rome / 100, cents_and_rome % 100),
        format!("{{{}}}", json.join(",")),
        total((1..=ROWS).filter(|n| city(*n) == "Oslo")).to_string(),
        (most("Bonn") + most("Lyon") + most("York")).to_string(),
        counted.join(","),
    ]
}

struct Story {
    parent: String,
    /// Exit code and console of each child.
    children: Vec<(i32, String)>,
}

fn story() -> Result<&'static Story> {
    static STORY: OnceLock<Result<Story, String>> = OnceLock::new();
    let happened = STORY.get_or_init(|| happens().map_err(|error| format!("{error:#}")));
    happened.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn happens() -> Result<Story> {
    super::guest::end_two();
    let guest = python()?;
    guest.agent(guest.root)?.write("/tmp/shop.py", 0o644, &mut &*PROGRAM)?;
    let (line, _lines) = channel();
    let ended = guest.start(guest.root, "exec python3 -I /tmp/shop.py", line)?;
    let output = ended.recv_timeout(LIMIT).context("it takes too long")??;
    ensure!(output.code == 0, "{output:?}");
    let parent = output.out;
    for name in ["modules", "warm", "forks"] {
        println!("Python: {name} {}", told(&parent, name)?);
    }
    let uuids: Vec<Uuid> =
        told(&parent, "children")?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let children = uuids.into_iter().map(|child| guest.end_of(child)).collect::<Result<_>>()?;
    Ok(Story { parent, children })
}

fn children() -> Result<()> {
    let Story { children, .. } = story()?;
    ensure!(children.len() == expected().len(), "{} children", children.len());
    for ((code, console), (number, found)) in children.iter().zip((0..).zip(expected())) {
        ensure!(*code == 10 + number, "child {number} ended with {code}: {console}");
        // Of the database at the other end of the pipes: 1000 and what this child inserted.
        let session = format!("{}|2", 1000 + number);
        let taken = TAKEN.to_string();
        let all = [("found", &*found), ("session", &*session), ("check", "ok"), ("taken", &*taken)];
        all_told(console, &all).with_context(|| format!("child {number}"))?;
    }
    Ok(())
}

fn parent() -> Result<()> {
    let Story { parent, .. } = story()?;
    let codes: Vec<String> = (10..20).map(|code| code.to_string()).collect();
    let all = total(1..=ROWS);
    let (before, left) = ((all + ROME).to_string(), (total(TAKEN + 1..=ROWS) + ROME).to_string());
    let (after, rows) = (all.to_string(), ROWS.to_string());
    all_told(parent, &[("codes", &*codes.join(" ")), ("session", "1000|1"), ("left", &*left)])?;
    all_told(parent, &[("before", &*before), ("after", &*after), ("rows", &*rows), ("check", "ok")])
}

/// Of each machine: urandom, `secrets`, the kernel's UUID, `uuid4`, OpenSSL, and OpenSSL before it was
/// told.
fn numbers() -> Result<Vec<Vec<&'static str>>> {
    let Story { parent, children } = story()?;
    let consoles = children.iter().map(|(_, console)| console).chain([parent]);
    consoles.map(|text| Ok(told(text, "random")?.split(' ').collect())).collect()
}

fn random() -> Result<()> {
    let numbers = numbers()?;
    let all: BTreeSet<&str> =
        numbers.iter().flat_map(|of_one| of_one.iter().take(5).copied()).collect();
    ensure!(all.len() == 5 * numbers.len(), "{numbers:?}");
    Ok(())
}

/// Its state lies in the memory of a process, which nobody from outside can renew. Once it does not
/// repeat itself here, `guest/agent/README.md` need not say that programs have to look.
fn untold() -> Result<()> {
    let untold: BTreeSet<&str> =
        numbers()?.iter().filter_map(|of_one| of_one.get(5).copied()).collect();
    println!("Python: {} of 11 machines have OpenSSL numbers of their own untold", untold.len());
    ensure!(untold.len() == 1, "{untold:?}");
    Ok(())
}

/// What each begins with, a UUID of the kernel, one of `uuid4`, and what a TLS client says first.
fn many() -> Result<()> {
    let wanted = std::env::var(CHILDREN_FROM).ok().map_or(Ok(CHILDREN), |number| number.parse())?;
    let guest = python()?;
    guest.agent(guest.root)?.write("/tmp/many.py", 0o644, &mut &*MANY)?;
    let (line, _lines) = channel();
    let begin = Instant::now();
    let script = format!("exec python3 -I /tmp/many.py {wanted}");
    let ended = guest.start(guest.root, &script, line)?;
    let limit = LIMIT + Duration::from_secs(10) * wanted;
    let output = ended.recv_timeout(limit).context("it takes too long")??;
    ensure!(output.code == 0, "{output:?}");
    let mut seen = BTreeSet::new();
    let (mut machines, mut slowest) = (0, 0.0_f64);
    for name in ["forking", "waiting"] {
        println!("{wanted} children: {} s {name}", told(&output.out, name)?);
    }
    if told(&output.out, "uuidgen")? == "none" {
        println!("there is no uuidgen: UUIDs are read from /proc/sys/kernel/random/uuid");
    }
    let mut look = |text: &str| -> Result<()> {
        let numbers: Vec<&str> = told(text, "random")?.split(' ').collect();
        ensure!(numbers.len() == 4 && numbers[3].len() == 64, "{numbers:?}");
        machines += 1;
        for number in numbers {
            ensure!(seen.insert(number.to_owned()), "{number} is there twice");
        }
        Ok(())
    };
    look(&output.out)?;
    for child in told(&output.out, "children")?.split(' ') {
        let child: Uuid = child.parse()?;
        let console = guest.end_of(child)?.1;
        look(&console).with_context(|| format!("child {child}"))?;
        let took: f64 = told(&console, "numbers")?.parse()?;
        slowest = slowest.max(took);
        guest.owner.forget(child);
    }
    ensure!(machines == wanted + 1, "{machines} machines");
    println!("the slowest took {slowest:.2} s for its numbers");
    println!(
        "{wanted} children in {:.0?}: {} random numbers, no two alike",
        begin.elapsed(),
        seen.len()
    );
    Ok(())
}
