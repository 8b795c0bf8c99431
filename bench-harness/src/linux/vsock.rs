//! Kind `linux-vsock`: round trip and throughput of connections from the host into the guest, ours
//! and those of QEMU with vhost-vsock in the kernel, in turn.
//!
//! | | guest |
//! | --- | --- |
//! | `vsock_…` | ours, forkable: its pages are tracked and a standby is kept up to date meanwhile |
//! | `unarmed_vsock_…` | ours, that was never made forkable |
//! | `qemu_vsock_…` | QEMU's |

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ::vsock::VsockStream;
use anyhow::{Context, Result, bail, ensure};
use runtime::agent::{Command, Said, socket_of};

use super::clock::{LONG, us};
use super::guest::Guest;
use super::qemu::{self, Qemu};
use super::told::Told;
use super::world::{HELPER, World};
use crate::scenario::Scenario;

const FORKABLE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/.uk/init";
/// Without an agent nobody says that the machine is to be made forkable.
const PLAIN: &str =
    "console=ttyS0 quiet loglevel=3 panic=-1 pci=off rdinit=/bin/ukp-check -- serve 5000";
const PORT: u32 = 5000;
const SERVING: &str = "@serving";
const MIB: f64 = 1_048_576.0;
/// Context id of QEMU's guest.
const CID: u32 = 77;
/// Made by the kernel's module.
const VHOST: &str = "/dev/vhost-vsock";
const PIECE: usize = 64 * 1024;

/// Of one round.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// Round trips of one byte.
    trips: u32,
    /// What is sent each way.
    bytes: u64,
}

/// Of the first round, which says how large the others may be.
const FIRST: Size = Size { trips: 5, bytes: 256 << 10 };
/// Of no round there is more.
const MOST: Size = Size { trips: 5000, bytes: 256 << 20 };
/// About as long as each part of a round is to take where it is slowest, in s.
const SECONDS: f64 = 1.0;

trait Connection: Read + Write {}
impl<T: Read + Write> Connection for T {}

/// Somebody to talk to.
struct Peer {
    /// Begins the names of its figures.
    prefix: &'static str,
    connect: Box<dyn Fn() -> Result<Box<dyn Connection>>>,
    /// It ends with this.
    _machine: Box<dyn std::any::Any>,
}

pub(super) fn sockets(
    scenario: &Scenario,
    world: &World,
    tell: &mut dyn FnMut(Told),
) -> Result<()> {
    let memory_mib = scenario.memory_mib;
    tell(Told::Phase { what: "boots".to_owned(), total: 3 });
    let mut peers = vec![forkable(world, memory_mib)?];
    tell(Told::Step);
    peers.push(unarmed(world, memory_mib)?);
    tell(Told::Step);
    match qemu(world, memory_mib) {
        Ok(peer) => peers.push(peer),
        Err(error) => {
            tell(Told::Note { text: format!("no vhost-vsock to compare with: {error:#}") });
        }
    }
    tell(Told::Step);
    tell(Told::Phase { what: "rounds".to_owned(), total: scenario.forks.into() });
    let mut size = MOST;
    for peer in &peers {
        size = size.least(measure(&*peer.connect, FIRST)?.affordable());
    }
    for _ in 0..scenario.forks {
        for peer in &peers {
            for (name, value) in measure(&*peer.connect, size)?.named() {
                let name = format!("{}{name}", peer.prefix);
                tell(match peer.prefix {
                    "qemu_" => Told::Baseline { name, value },
                    _ => Told::Apart { name, value },
                });
            }
        }
        tell(Told::Step);
    }
    tell(Told::Value { name: "vsock_round_bytes".to_owned(), value: lossy(size.bytes) });
    tell(Told::Value { name: "vsock_round_trips".to_owned(), value: size.trips.into() });
    Ok(())
}

fn forkable(world: &World, memory_mib: u32) -> Result<Peer> {
    let guest = Guest::start(world, memory_mib, FORKABLE)?;
    guest.ready(guest.root)?;
    let argv = [HELPER, "serve", &PORT.to_string()].map(str::to_owned).to_vec();
    let mut served = guest.agent(guest.root)?.exec(&Command { argv, ..Command::default() })?;
    match served.hear()? {
        Said::Out(bytes) if bytes.starts_with(SERVING.as_bytes()) => {}
        other => bail!("the guest's server says {other:?}"),
    }
    let socket = socket_of(guest.owner.folder(), guest.root);
    // The server ends with who listens to it.
    Ok(Peer { prefix: "", connect: ours(socket), _machine: Box::new((served, guest)) })
}

fn unarmed(world: &World, memory_mib: u32) -> Result<Peer> {
    let guest = Guest::start(world, memory_mib, PLAIN)?;
    guest.line(SERVING)?;
    let socket = socket_of(guest.owner.folder(), guest.root);
    Ok(Peer { prefix: "unarmed_", connect: ours(socket), _machine: Box::new(guest) })
}

fn qemu(world: &World, memory_mib: u32) -> Result<Peer> {
    ensure!(Path::new(VHOST).exists(), "{VHOST} is not there: modprobe vhost_vsock");
    let (kernel, cmdline) = (&world.kernel, PLAIN);
    let config = qemu::Config { kernel, memory_mib, cmdline, incoming: None, vsock: Some(CID) };
    let mut qemu = Qemu::start(world, &config)?;
    qemu.line(SERVING)?;
    let connect = Box::new(|| theirs().map(|stream| Box::new(stream) as _));
    Ok(Peer { prefix: "qemu_", connect, _machine: Box::new(qemu) })
}

fn ours(socket: PathBuf) -> Box<dyn Fn() -> Result<Box<dyn Connection>>> {
    Box::new(move || connect(&socket).map(|stream| Box::new(stream) as _))
}

fn connect(socket: &Path) -> Result<UnixStream> {
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

    /// What takes about [`SECONDS`] at this speed.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast from a float saturates, and the bounds are applied"
    )]
    fn affordable(&self) -> Size {
        let slower = self.to_guest_mib_s.min(self.to_host_mib_s);
        let pieces = (slower * SECONDS * MIB / lossy(PIECE as u64)) as u64;
        Size {
            trips: ((SECONDS * 1e6 / self.round_trip_us) as u32).clamp(FIRST.trips, MOST.trips),
            bytes: (pieces * PIECE as u64).clamp(FIRST.bytes, MOST.bytes),
        }
    }
}

impl Size {
    fn least(self, other: Self) -> Self {
        Self { trips: self.trips.min(other.trips), bytes: self.bytes.min(other.bytes) }
    }
}

fn measure(connect: &dyn Fn() -> Result<Box<dyn Connection>>, size: Size) -> Result<Speed> {
    let asked = |mode: u8, count: u64| -> Result<Box<dyn Connection>> {
        let mut stream = connect()?;
        let mut header = vec![mode];
        header.extend(count.to_le_bytes());
        stream.write_all(&header)?;
        Ok(stream)
    };
    let mut byte = [7];
    let mut stream = asked(b'e', u64::from(size.trips) + 1)?;
    let mut trip = || -> Result<()> {
        stream.write_all(&byte)?;
        Ok(stream.read_exact(&mut byte)?)
    };
    // The first one waits for the guest to have understood.
    trip()?;
    let begin = Instant::now();
    for _ in 0..size.trips {
        trip()?;
    }
    let round_trip_us = us(begin.elapsed()) / f64::from(size.trips);
    let bytes = size.bytes;
    Ok(Speed {
        round_trip_us,
        to_guest_mib_s: mib_s(bytes, || to_guest(&mut *asked(b'r', bytes)?, bytes))?,
        to_host_mib_s: mib_s(bytes, || to_host(&mut *asked(b's', bytes)?, bytes))?,
    })
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn lossy(bytes: u64) -> f64 {
    bytes as f64
}

fn mib_s(bytes: u64, transfer: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    transfer()?;
    Ok(lossy(bytes) / MIB / begin.elapsed().as_secs_f64())
}

fn to_guest(stream: &mut dyn Connection, bytes: u64) -> Result<()> {
    let piece = vec![0x5a; PIECE];
    let mut left = bytes;
    while left > 0 {
        stream.write_all(&piece)?;
        left = left.saturating_sub(PIECE as u64);
    }
    // It has come to the end.
    Ok(stream.read_exact(&mut [0])?)
}

fn to_host(stream: &mut dyn Connection, bytes: u64) -> Result<()> {
    let mut piece = vec![0; PIECE];
    let mut left = bytes;
    while left > 0 {
        let len = stream.read(&mut piece)?;
        ensure!(len > 0, "the guest ended {left} bytes early");
        left = left.saturating_sub(len as u64);
    }
    Ok(())
}
