//! Kind `linux-boot`: from nothing to the first line of init, ours and QEMU's in turn; and where the
//! time goes, by a boot of each that says everything. QEMU boots the very file that we boot, the
//! unpacked kernel (`qemu_boot_us`), and the kernel as it comes (`qemu_boot_packed_us`).

use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::clock::us;
use super::guest::{Guest, line_with};
use super::qemu::{self, Qemu};
use super::told::Told;
use super::world::World;
use crate::scenario::Scenario;

const QUIET: &str = "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/bin/ukp-check -- init";
const LOUD: &str = "console=ttyS0 panic=-1 pci=off rdinit=/bin/ukp-check -- init";
/// What init says.
const INIT: &str = "@init";

/// Moments of a boot, in their order: name, and what the kernel says then.
const MOMENTS: [(&str, &str); 5] = [
    ("entered", "Linux version"),
    ("console", "console [ttyS0] enabled"),
    ("initramfs", "Trying to unpack rootfs image"),
    ("serial", "16550A"),
    ("init", "as init process"),
];

pub(super) fn boots(scenario: &Scenario, world: &World, tell: &mut dyn FnMut(Told)) -> Result<()> {
    let memory_mib = scenario.memory_mib;
    let qemu = world.qemu.is_ok();
    if let Err(missing) = &world.qemu {
        tell(Told::Note { text: format!("no boots of QEMU's to compare with: {missing}") });
    }
    tell(Told::Phase { what: "boots".to_owned(), total: scenario.forks.into() });
    for round in 0..scenario.warmup + scenario.forks {
        let counts = round >= scenario.warmup;
        // Another one comes first each time.
        for turn in 0..3 {
            let (name, value) = match (round + turn) % 3 {
                0 => ("boot_us", ours(world, memory_mib)?),
                _ if !qemu => continue,
                1 => ("qemu_boot_us", theirs(world, &world.kernel, memory_mib)?),
                _ => ("qemu_boot_packed_us", theirs(world, &world.packed_kernel, memory_mib)?),
            };
            let name = name.to_owned();
            match name.as_str() {
                _ if !counts => {}
                "boot_us" => tell(Told::Apart { name, value }),
                _ => tell(Told::Baseline { name, value }),
            }
        }
        if counts {
            tell(Told::Step);
        }
    }
    tell(Told::Phase { what: "profile".to_owned(), total: 2 });
    let begin = Instant::now();
    let guest = Guest::start(world, memory_mib, LOUD)?;
    profile("ours", begin, &guest.lines, tell)?;
    drop(guest);
    tell(Told::Step);
    if qemu {
        let qemu = Qemu::start(world, &config(&world.kernel, memory_mib, LOUD))?;
        profile("qemu", qemu.started, &qemu.lines, tell)?;
    }
    tell(Told::Step);
    Ok(())
}

fn ours(world: &World, memory_mib: u32) -> Result<f64> {
    let begin = Instant::now();
    let guest = Guest::start(world, memory_mib, QUIET)?;
    Ok(us(guest.line(INIT)?.duration_since(begin)))
}

fn theirs(world: &World, kernel: &Path, memory_mib: u32) -> Result<f64> {
    let mut qemu = Qemu::start(world, &config(kernel, memory_mib, QUIET))?;
    let up = qemu.line(INIT)?;
    Ok(us(up.duration_since(qemu.started)))
}

fn config<'a>(kernel: &'a Path, memory_mib: u32, cmdline: &'a str) -> qemu::Config<'a> {
    qemu::Config { kernel, memory_mib, cmdline, incoming: None, vsock: None }
}

/// Tells for each moment when the host heard of it, and the kernel's own clock then.
fn profile(
    who: &str,
    begin: Instant,
    lines: &Receiver<(Instant, String)>,
    tell: &mut dyn FnMut(Told),
) -> Result<()> {
    for (name, said) in MOMENTS {
        let (at, line) = line_with(lines, said, || None)?;
        let mut value = |clock: &str, value| {
            tell(Told::Value { name: format!("profile_{who}_{name}_{clock}_ms"), value });
        };
        value("host", us(at.duration_since(begin)) / 1e3);
        if let Some(seconds) = stamp(&line) {
            value("kernel", seconds * 1e3);
        }
    }
    let (at, _) = line_with(lines, INIT, || None)?;
    ensure!(at > begin, "time runs backwards");
    let value = us(at.duration_since(begin)) / 1e3;
    tell(Told::Value { name: format!("profile_{who}_first_line_host_ms"), value });
    Ok(())
}

/// Seconds of `[    1.234567] text`.
fn stamp(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once('[')?;
    rest.split_once(']')?.0.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_clock_is_read() {
        assert_eq!(stamp("[    1.250000] Linux version 6.1"), Some(1.25));
        assert_eq!(stamp("console [ttyS0] enabled"), None);
        assert_eq!(stamp(""), None);
    }
}
