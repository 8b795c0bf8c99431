//! Streams between a guest made of a driver and real sockets.

mod edges;
mod fork;
mod streams;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use uuid::Uuid;
use virtio_bindings::virtio_mmio as reg;

use super::packet::{HEADER, HOST, Header, STREAM, op, shutdown};
use super::{Vsock, cid};
use crate::device::virtio::Device;
use crate::device::virtio::driver::{
    DriverQueue, EVENT_IDX, INDIRECT, LIMIT, Rig, VERSION_1, ram, until,
};
use crate::memory::GuestRam;

/// A folder that goes with this value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vsock-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap_or(());
    }
}

/// How the driver likes its queues.
#[derive(Clone, Copy, Debug)]
struct Taste {
    features: u64,
    indirect: bool,
    buffers: u16,
    /// The descriptors of a buffer for the device.
    rx: &'static [u32],
    tx: &'static [u32],
}

const PLAIN: Taste =
    Taste { features: 0, indirect: false, buffers: 16, rx: &[44, 4096], tx: &[44, 4096] };
const LINUX: Taste = Taste {
    features: EVENT_IDX | INDIRECT,
    indirect: true,
    buffers: 128,
    rx: &[44, 4096],
    tx: &[44, 4096],
};
const ODD: Taste =
    Taste { features: EVENT_IDX, indirect: false, buffers: 16, rx: &[700], tx: &[10, 50, 333, 7] };

/// A guest: a device with its thread, and a driver that does nothing by itself.
struct Guest {
    rig: Rig,
    uuid: Uuid,
    rx: DriverQueue,
    tx: DriverQueue,
    events: DriverQueue,
    cid: u64,
    event_idx: bool,
    /// Packets that came while others were waited for.
    waiting: Vec<(Header, Vec<u8>)>,
    /// The room that the host's ends have last told of, by port of the guest.
    rooms: HashMap<u32, (u32, u32)>,
}

impl Guest {
    /// Without buffers for the device yet.
    fn bare(folder: &Path, taste: Taste) -> Self {
        let uuid = Uuid::new_v4();
        let mut rig = Rig::new(Vsock::new(folder, uuid).expect("short"), Arc::new(ram()));
        rig.go();
        let rx = DriverQueue::new(0, taste.buffers, taste.rx, taste.indirect);
        let tx = DriverQueue::new(1, taste.buffers, taste.tx, taste.indirect);
        let events = DriverQueue::new(2, 16, &[4], false);
        rig.start(VERSION_1 | taste.features, &[&rx, &tx, &events]);
        let (cid, event_idx) = (cid(uuid).into(), taste.features & EVENT_IDX != 0);
        let (waiting, rooms) = Default::default();
        Self { rig, uuid, rx, tx, events, cid, event_idx, waiting, rooms }
    }

    fn new(folder: &Path, taste: Taste) -> Self {
        let mut guest = Self::bare(folder, taste);
        guest.fill();
        for _ in 0..8 {
            guest.events.add(&guest.rig.ram, None).expect("free");
        }
        guest.rig.kick(2);
        guest
    }

    /// A child of it, as it is at this moment. `go` starts its devices.
    fn fork(&mut self, folder: &Path) -> Self {
        self.fork_after(folder, |_, _| ())
    }

    /// The same, after the driver has done something that the device does not know of.
    fn fork_after(
        &mut self,
        folder: &Path,
        last: impl FnOnce(&mut DriverQueue, &GuestRam),
    ) -> Self {
        let uuid = Uuid::new_v4();
        let (saved, memory) = {
            let (tx, ram) = (&mut self.tx, &self.rig.ram);
            self.rig.capture(|| last(tx, ram))
        };
        let rig = Rig::new(Vsock::new(folder, uuid).expect("short"), memory);
        rig.bus.restore(&saved, &rig.ram);
        let (rx, tx, events) = (self.rx.clone(), self.tx.clone(), self.events.clone());
        let (waiting, rooms) = Default::default();
        Self { rig, uuid, rx, tx, events, waiting, rooms, ..*self }
    }

    fn ram(&self) -> Arc<GuestRam> {
        self.rig.ram.clone()
    }

    /// Gives all its free buffers to the device.
    fn fill(&mut self) {
        let ram = self.ram();
        while self.rx.add(&ram, None).is_some() {}
        if self.rx.wants_kick(&ram, self.event_idx) {
            self.rig.kick(0);
        }
    }

    /// Sends a packet.
    fn send(&mut self, header: Header, data: &[u8]) {
        let ram = self.ram();
        let header = Header {
            src_cid: self.cid,
            dst_cid: HOST,
            len: u32::try_from(data.len()).expect("small"),
            kind: STREAM,
            ..header
        };
        let packet = [&header.bytes()[..], data].concat();
        until("room to send", || {
            while self.tx.take(&ram).is_some() {}
            self.tx.add(&ram, Some(&packet)).is_some()
        });
        if self.tx.wants_kick(&ram, self.event_idx) {
            self.rig.kick(1);
        }
    }

    /// The next packet that was not waited for before.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let bytes = self.rx.take(&self.ram())?;
        self.fill();
        let head: [u8; HEADER] = bytes[..HEADER].try_into().expect("a header");
        let header = Header::parse(&head);
        assert_eq!(bytes.len(), HEADER + header.len as usize);
        if header.op != op::RST {
            assert_eq!((header.src_cid, header.kind), (HOST, STREAM));
        }
        self.rooms.insert(header.dst_port, (header.buf_alloc, header.fwd_cnt));
        Some((header, bytes[HEADER..].to_vec()))
    }

    /// Waits for a packet that is wanted; the others are kept.
    fn wait(&mut self, what: &str, wanted: impl Fn(&Header) -> bool) -> (Header, Vec<u8>) {
        let mut found = None;
        until(what, || {
            let at = self.waiting.iter().position(|(header, _)| wanted(header));
            found = at.map(|at| self.waiting.remove(at));
            if found.is_none() {
                let new = self.poll();
                self.waiting.extend(new);
            }
            found.is_some()
        });
        found.expect("found")
    }

    fn wait_op(&mut self, wanted: u16) -> (Header, Vec<u8>) {
        self.wait(&format!("a packet with op {wanted}"), |header| header.op == wanted)
    }

    fn listener(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.vsock", self.uuid))
    }

    /// The host connects to `port`, and the guest accepts with `room`.
    fn accept(&mut self, folder: &Path, port: u32, room: u32) -> (UnixStream, End) {
        let mut host = UnixStream::connect(self.listener(folder)).expect("listening");
        host.set_read_timeout(Some(LIMIT)).expect("a socket");
        host.write_all(format!("CONNECT {port}\n").as_bytes()).expect("open");
        let (request, _) = self.wait_op(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let mut end = End { port, host_port: request.src_port, room, taken: 0 };
        end.hear(&request);
        self.send(end.header(op::RESPONSE, 0), &[]);
        assert_eq!(line(&mut host), format!("OK {}", request.src_port));
        (host, end)
    }

    /// The guest connects to the host's `port`.
    fn connect(&mut self, port: u32, host_port: u32, room: u32) -> End {
        let end = End { port, host_port, room, taken: 0 };
        self.send(end.header(op::REQUEST, 0), &[]);
        let (answer, _) = self.wait("an answer", |header| header.dst_port == port);
        assert_eq!(answer.op, op::RESPONSE);
        end
    }

    /// Sends all of `data` through `end`, no more at once than the device has room for.
    fn send_all(&mut self, end: &End, data: &[u8], chunk: usize) {
        let mut sent = 0_u32;
        for part in data.chunks(chunk) {
            let len = u32::try_from(part.len()).expect("small");
            until("room at the host's end", || {
                let (room, passed) = self.rooms.get(&end.port).copied().unwrap_or_default();
                let enough = room.saturating_sub(sent.wrapping_sub(passed)) >= len;
                if !enough {
                    let new = self.poll();
                    self.waiting.extend(new);
                }
                enough
            });
            self.send(end.header(op::RW, 0), part);
            sent = sent.wrapping_add(len);
        }
    }

    /// Receives `len` bytes through `end`, telling the host of its room now and then.
    fn receive_all(&mut self, end: &mut End, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let mut told = end.taken;
        while all.len() < len {
            let port = end.port;
            let (header, data) = self.wait("data", |header| {
                header.dst_port == port && matches!(header.op, op::RW | op::CREDIT_REQUEST)
            });
            all.extend(data);
            end.taken = end.taken.wrapping_add(header.len);
            assert!(end.taken.wrapping_sub(told) <= end.room, "more than there is room for");
            if end.taken.wrapping_sub(told) >= end.room / 2 || header.op == op::CREDIT_REQUEST {
                told = end.taken;
                self.send(end.header(op::CREDIT_UPDATE, 0), &[]);
            }
        }
        all
    }
}

/// The guest's end of a connection.
#[derive(Clone, Copy, Debug)]
struct End {
    port: u32,
    host_port: u32,
    room: u32,
    taken: u32,
}

impl End {
    fn hear(&mut self, header: &Header) {
        assert_eq!((header.src_port, header.dst_port), (self.host_port, self.port));
    }

    fn header(&self, op: u16, flags: u32) -> Header {
        Header {
            src_port: self.port,
            dst_port: self.host_port,
            op,
            flags,
            buf_alloc: self.room,
            fwd_cnt: self.taken,
            ..Header::default()
        }
    }
}

/// One line from a socket, without its end, and not a byte more.
fn line(socket: &mut UnixStream) -> String {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while socket.read_exact(&mut byte).is_ok() && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    String::from_utf8(text).expect("text")
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut word = seed | 1;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

const MUCH: usize = 1 << 20;

/// Both directions at once, over one connection.
fn carries(guest: &mut Guest, end: &mut End, host: UnixStream, chunk: usize) {
    let (up, down) = (noise(MUCH, 3), noise(MUCH, 5));
    let writer = {
        let (mut host, down) = (host.try_clone().expect("a socket"), down.clone());
        std::thread::spawn(move || host.write_all(&down).expect("written"))
    };
    let reader = {
        let mut host = host;
        std::thread::spawn(move || {
            let mut all = vec![0; MUCH];
            host.read_exact(&mut all).expect("read");
            (host, all)
        })
    };
    guest.send_all(end, &up, chunk);
    assert!(guest.receive_all(end, MUCH) == down, "the guest read something else");
    writer.join().expect("written");
    let (mut host, all) = reader.join().expect("read");
    assert!(all == up, "the host read something else");
    // The guest closes: all is over.
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    let port = end.port;
    guest.wait("the end", |header| header.op == op::RST && header.dst_port == port);
    assert_eq!(host.read(&mut [0; 8]).expect("the end of file"), 0);
}
