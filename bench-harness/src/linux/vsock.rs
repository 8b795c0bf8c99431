//! Kind `linux-vsock`: round trip and throughput of connections from the host into the guest, ours
//! and those of QEMU with vhost-vsock in the kernel, in turn.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use ::vsock::VsockStream;
use anyhow::{Context, Result, ensure};
use runtime::agent::{Command, Said, socket_of};

use super::clock::{LONG, us};
use super::guest::Guest;
use super::qemu::{self, Qemu};
use super::told::Told;
use super::world::{HELPER, World};
use crate::scenario::Scenario;

const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/.uk/init";
const QEMU_CMDLINE: &str =
    "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/bin/ukp-check -- serve 5000";
const PORT: u32 = 5000;
/// Context id of QEMU's guest.
const CID: u32 = 77;
/// Made by the kernel's module.
const VHOST: &str = "/dev/vhost-vsock";
/// Round trips of one byte in one round.
const TRIPS: u32 = 100;
/// What one round sends each way.
const BYTES: u64 = 8 << 20;
const PIECE: usize = 64 * 1024;

trait Connection: Read + Write {}
impl<T: Read + Write> Connection for T {}

pub(super) fn sockets(
    scenario: &Scenario,
    world: &World,
    tell: &mut dyn FnMut(Told),
) -> Result<()> {
    tell(Told::Phase { what: "boot".to_owned(), total: 1 });
    let guest = Guest::start(world, scenario.memory_mib, CMDLINE)?;
    guest.ready(guest.root)?;
    let argv = [HELPER, "serve", &PORT.to_string()].map(str::to_owned).to_vec();
    let mut served = guest.agent(guest.root)?.exec(&Command { argv, ..Command::default() })?;
    match served.hear()? {
        Said::Out(bytes) if bytes.starts_with(b"@serving") => {}
        other => anyhow::bail!("the guest's server says {other:?}"),
    }
    let socket = socket_of(guest.owner.folder(), guest.root);
    tell(Told::Phase { what: "QEMU boots".to_owned(), total: 1 });
    let qemu = match start_qemu(world, scenario.memory_mib) {
        Ok(qemu) => Some(qemu),
        Err(error) => {
            tell(Told::Note { text: format!("no vhost-vsock to compare with: {error:#}") });
            None
        }
    };
    tell(Told::Phase { what: "rounds".to_owned(), total: scenario.forks.into() });
    for round in 0..scenario.warmup + scenario.forks {
        let ours = measure(&mut || ours(&socket).map(|stream| Box::new(stream) as _))?;
        let theirs = match &qemu {
            Some(_) => Some(measure(&mut || theirs().map(|stream| Box::new(stream) as _))?),
            None => None,
        };
        if round < scenario.warmup {
            continue;
        }
        for (name, value) in ours.named() {
            tell(Told::Apart { name: name.to_owned(), value });
        }
        for (name, value) in theirs.iter().flat_map(Speed::named) {
            tell(Told::Baseline { name: format!("qemu_{name}"), value });
        }
        tell(Told::Step);
    }
    Ok(())
}

fn start_qemu(world: &World, memory_mib: u32) -> Result<Qemu> {
    ensure!(Path::new(VHOST).exists(), "{VHOST} is not there: modprobe vhost_vsock");
    let (kernel, cmdline) = (&world.kernel, QEMU_CMDLINE);
    let config = qemu::Config { kernel, memory_mib, cmdline, incoming: None, vsock: Some(CID) };
    let mut qemu = Qemu::start(world, &config)?;
    qemu.line("@serving")?;
    Ok(qemu)
}

fn ours(socket: &Path) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).context("the instance's socket")?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.last() != Some(&b'\n') {
        ensure!(stream.read(&mut byte)? > 0 && line.len() < 64, "the guest refuses: {line:?}");
        line.push(byte[0]);
    }
    ensure!(line.starts_with(b"OK "), "the guest refuses: {line:?}");
    Ok(stream)
}

fn theirs() -> Result<VsockStream> {
    let stream = VsockStream::connect_with_cid_port(CID, PORT).context("QEMU's guest")?;
    stream.set_read_timeout(Some(LONG))?;
    Ok(stream)
}

/// What one round showed.
struct Speed {
    round_trip_us: f64,
    to_guest_mib_s: f64,
    to_host_mib_s: f64,
}

impl Speed {
    fn named(&self) -> [(&'static str, f64); 3] {
        [
            ("vsock_round_trip_us", self.round_trip_us),
            ("vsock_to_guest_mib_s", self.to_guest_mib_s),
            ("vsock_to_host_mib_s", self.to_host_mib_s),
        ]
    }
}

fn measure(connect: &mut dyn FnMut() -> Result<Box<dyn Connection>>) -> Result<Speed> {
    let mut asked = |mode: u8, count: u64| -> Result<Box<dyn Connection>> {
        let mut stream = connect()?;
        let mut header = vec![mode];
        header.extend(count.to_le_bytes());
        stream.write_all(&header)?;
        Ok(stream)
    };
    let mut byte = [7];
    let mut stream = asked(b'e', u64::from(TRIPS) + 1)?;
    // The first one waits for the guest to have understood.
    let mut trip = || -> Result<()> {
        stream.write_all(&byte)?;
        Ok(stream.read_exact(&mut byte)?)
    };
    trip()?;
    let begin = Instant::now();
    for _ in 0..TRIPS {
        trip()?;
    }
    let round_trip_us = us(begin.elapsed()) / f64::from(TRIPS);
    Ok(Speed {
        round_trip_us,
        to_guest_mib_s: mib_s(|| to_guest(&mut *asked(b'r', BYTES)?))?,
        to_host_mib_s: mib_s(|| to_host(&mut *asked(b's', BYTES)?))?,
    })
}

fn mib_s(transfer: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    transfer()?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let mib = BYTES as f64 / 1_048_576.0;
    Ok(mib / begin.elapsed().as_secs_f64())
}

fn to_guest(stream: &mut dyn Connection) -> Result<()> {
    let piece = vec![0x5a; PIECE];
    let mut left = BYTES;
    while left > 0 {
        stream.write_all(&piece)?;
        left = left.saturating_sub(PIECE as u64);
    }
    // It has come to the end.
    Ok(stream.read_exact(&mut [0])?)
}

fn to_host(stream: &mut dyn Connection) -> Result<()> {
    let mut piece = vec![0; PIECE];
    let mut left = BYTES;
    while left > 0 {
        let len = stream.read(&mut piece)?;
        ensure!(len > 0, "the guest ended {left} bytes early");
        left = left.saturating_sub(len as u64);
    }
    Ok(())
}
