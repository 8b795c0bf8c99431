//! `/dev/hvc0`: what the guest writes and what is typed.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::guest::{Guest, LONG, one, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("console::a_line_takes_fewer_exits_than_on_the_serial_line", exits),
        ("console::what_is_typed_reaches_the_machine_it_is_typed_on", typed),
        ("console::no_line_is_lost_or_said_twice_across_a_fork", lines),
    ]
}

fn exits() -> Result<()> {
    let guest = one()?;
    let script = |device: &str| {
        format!(
            "for i in $(seq 1 20); do echo 'a line of forty bytes, its end counted' > {device}; done"
        )
    };
    let sum = |guest: &Guest| -> Result<u64> {
        let all = guest.owner.kvm_stats(guest.root)?;
        let of = |name| all.get(name).copied().context("KVM counts exits");
        Ok(of("io_exits")? + of("mmio_exits")?)
    };
    let mut counts = Vec::new();
    for device in ["/dev/hvc0", "/dev/ttyS0"] {
        // It is asked twice: what is not of the device comes in both.
        let begin = sum(&guest)?;
        guest.sh(guest.root, &script("/dev/null"))?;
        let middle = sum(&guest)?;
        guest.sh(guest.root, &script(device))?;
        counts.push(sum(&guest)?.saturating_sub(middle).saturating_sub(middle - begin));
    }
    println!("800 bytes in lines: {} exits by hvc0, {} by ttyS0", counts[0], counts[1]);
    ensure!(counts[0] * 3 < counts[1], "{counts:?}");
    Ok(())
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + LONG;
    while !done()? {
        if Instant::now() > end {
            bail!("waited in vain: {what}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn typed() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    for (instance, text) in [(guest.root, "for the parent"), (child, "for the child")] {
        let (line, heard) = channel();
        let script = "echo @reads; read line < /dev/hvc0; echo \"@typed $line\"";
        let ended = guest.start(instance, script, line)?;
        ensure!(heard.recv_timeout(LONG)? == "@reads");
        let line = format!("{text}\n");
        ensure!(guest.owner.type_in(instance, line.as_bytes())? == line.len(), "there is room");
        let said = ended.recv_timeout(LONG)??.out;
        ensure!(told(&said, "typed")? == text, "{said}");
        until("the echo", || Ok(guest.console(instance)?.contains(text)))?;
    }
    ensure!(!guest.console(guest.root)?.contains("for the child"), "each has its own console");
    ensure!(!guest.console(child)?.contains("for the parent"), "each has its own console");
    guest.exit(child, 0)
}

/// Somebody writes while the machine forks: both go on with the same line.
fn lines() -> Result<()> {
    let guest = one()?;
    let script = r#"setsid sh -c 'i=0
        while [ ! -e /run/enough ]; do i=$((i + 1)); echo "number $i of many"; done
        echo "no number"' > /dev/hvc0 2> /dev/null < /dev/null &"#;
    guest.sh(guest.root, script)?;
    until("the first lines", || Ok(guest.console(guest.root)?.contains("number 20 of many")))?;
    let child = guest.fork()?;
    let mut numbers = Vec::new();
    for instance in [guest.root, child] {
        guest.sh(instance, "touch /run/enough")?;
        until("the last line", || Ok(guest.console(instance)?.contains("no number")))?;
        let console = guest.console(instance)?;
        let number = |line: &str| {
            line.strip_prefix("number ")?.strip_suffix(" of many")?.parse::<u32>().ok()
        };
        numbers.push(console.lines().filter_map(number).collect::<Vec<_>>());
    }
    guest.sh(guest.root, "rm /run/enough")?;
    for numbers in &numbers {
        let (first, last) = numbers.first().zip(numbers.last()).context("numbers")?;
        ensure!(*numbers == (*first..=*last).collect::<Vec<_>>(), "{numbers:?}");
    }
    let (first, last) = (numbers[1][0], numbers[0].last().copied().unwrap_or(0));
    println!("the child went on from line {first}, the parent said {last}");
    ensure!(numbers[0][0] == 1 && (2..=last + 1).contains(&first), "{first} of {last}");
    guest.exit(child, 0)
}
