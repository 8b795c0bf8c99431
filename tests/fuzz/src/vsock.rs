//! Packets of a guest whose queues are in order, and processes of the host at the other ends.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use runtime::device::virtio::fuzz::Board;
use runtime::memory::GuestRam;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use crate::machine::{folder, poke, ram};

const MEMORY: usize = 0x8_0000;
const MOST: usize = 120;
/// Entries of each queue.
const SIZE: u16 = 16;
/// Where queue n lies: descriptors, available, used; and its buffers.
const RINGS: u64 = 0x1000;
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u32 = 0x1000;
const HEADER: usize = 44;
/// Connections of the host that are kept open.
const KEPT: usize = 8;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Packet {
        op: u8,
        flags: u8,
        ports: (u8, u8),
        room: (u32, u32),
        odd: Option<Odd>,
        data: &'a [u8],
    },
    /// Room for packets to the guest.
    Receive {
        buffers: u8,
    },
    Event,
    Connect {
        port: u8,
    },
    Greet {
        which: u8,
        bytes: &'a [u8],
    },
    Say {
        which: u8,
        bytes: &'a [u8],
    },
    Hear {
        which: u8,
    },
    HangUp {
        which: u8,
    },
    Accept,
    Fork,
}

/// What no driver of ours would send.
#[derive(Arbitrary, Debug)]
struct Odd {
    src: u64,
    dst: u64,
    len: u32,
    kind: u16,
    cut: u8,
}

struct Queue {
    number: u64,
    available: u16,
    used: u16,
}

impl Queue {
    fn at(&self) -> [u64; 3] {
        let base = RINGS + self.number * 0x1000;
        [base, base + 0x400, base + 0x800]
    }

    /// Lends a buffer, if the device has not got all of them.
    fn lend(&mut self, ram: &GuestRam, data: Option<&[u8]>) -> bool {
        if self.available.wrapping_sub(self.used) >= SIZE {
            return false;
        }
        let [descriptors, available, _] = self.at();
        let slot = u64::from(self.available % SIZE);
        let buffer = BUFFERS + self.number * 0x1_0000 + slot * u64::from(BUFFER);
        let len =
            data.map_or(BUFFER, |data| u32::try_from(data.len()).unwrap_or(BUFFER).min(BUFFER));
        poke(ram, buffer, data.unwrap_or_default());
        let mut bytes = buffer.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(if data.is_some() { [0; 4] } else { [2, 0, 0, 0] });
        poke(ram, descriptors + slot * 16, &bytes);
        poke(ram, available + 4 + slot * 2, &(self.available % SIZE).to_le_bytes());
        self.available = self.available.wrapping_add(1);
        poke(ram, available + 2, &self.available.to_le_bytes());
        true
    }

    /// Takes back what the device has used: each is the length of a packet or of nothing.
    fn settle(&mut self, ram: &GuestRam) {
        let [_, _, used] = self.at();
        let now: u16 = ram.read_obj(GuestAddress(used + 2)).expect("in memory");
        assert!(now.wrapping_sub(self.used) <= SIZE, "more came back than was lent");
        while self.used != now {
            let slot = u64::from(self.used % SIZE);
            let len: u32 = ram.read_obj(GuestAddress(used + 8 + slot * 8)).expect("in memory");
            assert!(len <= BUFFER);
            if self.number == 0 {
                packet(ram, self.number, slot, len);
            }
            self.used = self.used.wrapping_add(1);
        }
    }
}

/// A packet for the guest has a whole header and as much data as that says.
fn packet(ram: &GuestRam, queue: u64, slot: u64, len: u32) {
    let at = BUFFERS + queue * 0x1_0000 + slot * u64::from(BUFFER);
    let said: u32 = ram.read_obj(GuestAddress(at + 24)).expect("in memory");
    let op: u16 = ram.read_obj(GuestAddress(at + 30)).expect("in memory");
    assert_eq!(len as usize, HEADER + said as usize);
    assert!((1..=7).contains(&op));
    assert!(op == 5 || said == 0);
}

struct World {
    ram: Arc<GuestRam>,
    board: Board,
    uuid: Uuid,
    listener: UnixListener,
    queues: [Queue; 3],
    host: Vec<UnixStream>,
}

/// Plays the steps.
///
/// # Panics
///
/// If the device works without end, gives more back than it was lent, or says what is no packet.
pub fn run(data: &[u8]) {
    let mut rest = Unstructured::new(data);
    let folder = folder();
    let ours = folder.join("port_7");
    // Of the input before.
    drop(std::fs::remove_file(&ours));
    let listener = UnixListener::bind(&ours).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    let (ram, uuid) = (ram(MEMORY), Uuid::from_u128(2));
    let board = Board::new(&folder, uuid, Arc::clone(&ram)).expect("devices");
    let queues = [0, 1, 2].map(|number| Queue { number, available: 0, used: 0 });
    let mut world = World { ram, board, uuid, listener, queues, host: Vec::new() };
    world.start();
    for _ in 0..MOST {
        if rest.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut rest) else { break };
        world.play(&step, &folder);
        assert!(world.board.work(), "it works without end");
        let ram = Arc::clone(&world.ram);
        world.queues.iter_mut().for_each(|queue| queue.settle(&ram));
    }
}

impl World {
    fn write(&self, register: u64, value: u32) {
        let start = self.board.window(1).expect("the socket device").start;
        self.board.write(u64::from(start) + register, &value.to_le_bytes());
    }

    fn start(&self) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for (page, word) in [(0, 0), (1, 1)] {
            self.write(0x24, page);
            self.write(0x20, word);
        }
        self.write(0x70, 3 | 8);
        for queue in &self.queues {
            self.write(0x30, u32::try_from(queue.number).expect("three"));
            self.write(0x38, SIZE.into());
            for (register, at) in [0x80, 0x90, 0xa0].into_iter().zip(queue.at()) {
                self.write(register, u32::try_from(at).expect("low"));
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 3 | 8 | 4);
    }

    fn play(&mut self, step: &Step<'_>, folder: &Path) {
        let [rx, tx, events] = &mut self.queues;
        let which = |which: u8| usize::from(which) % KEPT;
        match step {
            Step::Packet { op, flags, ports, room, odd, data } => {
                let packet = bytes(*op, *flags, *ports, *room, odd.as_ref(), data);
                tx.lend(&self.ram, Some(&packet));
            }
            Step::Receive { buffers } => {
                for _ in 0..buffers % 17 {
                    rx.lend(&self.ram, None);
                }
            }
            Step::Event => drop(events.lend(&self.ram, None)),
            Step::Connect { port } => {
                let path = folder.join(format!("{}.vsock", self.uuid));
                if self.host.len() < KEPT
                    && let Ok(mut stream) = UnixStream::connect(path)
                {
                    stream.set_nonblocking(true).expect("a socket");
                    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap_or(());
                    self.host.push(stream);
                }
            }
            Step::Greet { which: number, bytes } => {
                let path = folder.join(format!("{}.vsock", self.uuid));
                if self.host.len() < KEPT
                    && let Ok(mut stream) = UnixStream::connect(path)
                {
                    stream.set_nonblocking(true).expect("a socket");
                    let cut = bytes.len().min(usize::from(*number));
                    stream.write_all(&bytes[..cut]).unwrap_or(());
                    self.host.push(stream);
                }
            }
            Step::Say { which: number, bytes } => {
                if let Some(stream) = self.host.get_mut(which(*number)) {
                    drop(stream.write(bytes));
                }
            }
            Step::Hear { which: number } => {
                if let Some(stream) = self.host.get_mut(which(*number)) {
                    drop(stream.read(&mut [0; 512]));
                }
            }
            Step::HangUp { which: number } => {
                if which(*number) < self.host.len() {
                    drop(self.host.swap_remove(which(*number)));
                }
            }
            Step::Accept => {
                if let Ok((stream, _)) = self.listener.accept()
                    && self.host.len() < KEPT
                {
                    stream.set_nonblocking(true).expect("a socket");
                    self.host.push(stream);
                }
            }
            Step::Fork => {
                let saved = self.board.save();
                self.board.restore(&saved);
            }
        }
    }
}

/// A packet as it lies in memory.
fn bytes(
    op: u8,
    flags: u8,
    ports: (u8, u8),
    room: (u32, u32),
    odd: Option<&Odd>,
    data: &[u8],
) -> Vec<u8> {
    let data = data.get(..2048).unwrap_or(data);
    let len = u32::try_from(data.len()).unwrap_or(0);
    // Ports of the host's connections begin at 2^30.
    let port = |port: u8| match port {
        0..=127 => u32::from(port % 16),
        _ => (1 << 30) + u32::from(port % 16),
    };
    let (src, dst, len, kind) =
        odd.map_or((3, 2, len, 1), |odd| (odd.src, odd.dst, odd.len, odd.kind));
    let mut bytes = Vec::new();
    bytes.extend(src.to_le_bytes());
    bytes.extend(dst.to_le_bytes());
    bytes.extend(port(ports.0).to_le_bytes());
    bytes.extend(port(ports.1).to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(u16::from(op % 9).to_le_bytes());
    bytes.extend(u32::from(flags).to_le_bytes());
    bytes.extend(room.0.to_le_bytes());
    bytes.extend(room.1.to_le_bytes());
    bytes.extend(data);
    if let Some(odd) = odd {
        bytes.truncate(usize::from(odd.cut) * 2);
    }
    bytes
}
