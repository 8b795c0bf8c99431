//! Streams between a guest made of a driver and real sockets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proptest::prelude::*;
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

#[test]
fn a_megabyte_each_way_over_a_connection_of_the_host() {
    for (taste, room) in [(PLAIN, 9_000), (LINUX, 256 * 1024), (ODD, 100)] {
        let folder = Folder::new();
        let mut guest = Guest::new(&folder.0, taste);
        let (host, mut end) = guest.accept(&folder.0, 52, room);
        carries(&mut guest, &mut end, host, if taste.tx.len() > 2 { 300 } else { 4096 });
    }
}

#[test]
fn a_megabyte_each_way_over_a_connection_of_the_guest() {
    for (own, taste) in [(true, LINUX), (false, LINUX), (false, PLAIN)] {
        let folder = Folder::new();
        let mut guest = Guest::new(&folder.0, taste);
        let name = if own { format!("{}.vsock_7", guest.uuid) } else { "port_7".into() };
        let server = UnixListener::bind(folder.0.join(name)).expect("bound");
        let mut end = guest.connect(1234, 7, 20_000);
        let (mut host, _) = server.accept().expect("connected");
        if !own {
            assert_eq!(line(&mut host), guest.uuid.to_string());
        }
        carries(&mut guest, &mut end, host, 3000);
    }
}

#[test]
fn nobody_listens() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let end = End { port: 9, host_port: 99, room: 1000, taken: 0 };
    guest.send(end.header(op::REQUEST, 0), &[]);
    let (answer, _) = guest.wait_op(op::RST);
    assert_eq!((answer.src_port, answer.dst_port, answer.dst_cid), (99, 9, guest.cid));
    // And in the guest.
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    host.write_all(b"CONNECT 5\n").expect("open");
    let (request, _) = guest.wait_op(op::REQUEST);
    let end = End { port: 5, host_port: request.src_port, room: 0, taken: 0 };
    guest.send(end.header(op::RST, 0), &[]);
    assert_eq!(host.read(&mut [0; 8]).expect("the end of file"), 0);
}

#[test]
fn whoever_says_nonsense_is_not_connected() {
    let folder = Folder::new();
    let guest = Guest::new(&folder.0, PLAIN);
    for text in ["CONNECT x\n", "CONNECT -1\n", "GET / HTTP/1.1\r\n", "CONNECT 4294967296\n", "\n"]
    {
        let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
        host.set_read_timeout(Some(LIMIT)).expect("a socket");
        host.write_all(text.as_bytes()).expect("open");
        // The end of file, or a reset if not all was read.
        assert!(host.read(&mut [0; 8]).unwrap_or(0) == 0, "{text:?}");
    }
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    host.set_read_timeout(Some(LIMIT)).expect("a socket");
    host.write_all(&[b'C'; 100]).expect("open");
    assert!(host.read(&mut [0; 8]).unwrap_or(0) == 0);
}

#[test]
fn a_greeting_may_come_in_pieces_with_data_behind_it() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    for part in ["CON", "NECT 8", "0\nhel", "lo"] {
        host.write_all(part.as_bytes()).expect("open");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (request, _) = guest.wait_op(op::REQUEST);
    assert_eq!(request.dst_port, 80);
    let mut end = End { port: 80, host_port: request.src_port, room: 5000, taken: 0 };
    guest.send(end.header(op::RESPONSE, 0), &[]);
    assert_eq!(guest.receive_all(&mut end, 5), b"hello");
}

#[test]
fn the_host_stops_sending_when_the_guest_has_no_room() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let (mut host, mut end) = guest.accept(&folder.0, 1, 100);
    host.write_all(&noise(1000, 1)).expect("written");
    let mut got = Vec::new();
    while got.len() < 100 {
        let (header, data) = guest.wait_op(op::RW);
        end.taken += header.len;
        got.extend(data);
    }
    assert_eq!(got.len(), 100, "more than there was room for");
    guest.wait_op(op::CREDIT_REQUEST);
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.poll().is_none(), "there is no room");
    guest.send(end.header(op::CREDIT_UPDATE, 0), &[]);
    let (header, _) = guest.wait_op(op::RW);
    assert_eq!(header.len, 100);
}

#[test]
fn the_guest_has_as_much_room_as_it_was_told_and_not_more() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let (host, end) = guest.accept(&folder.0, 1, 1000);
    // The host does not read: its socket takes some, the device the rest.
    let mut sent = 0_usize;
    let (mut room, mut passed) = (64 * 1024_u32, 0_u32);
    loop {
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            (room, passed) = (header.buf_alloc, header.fwd_cnt);
        }
        let kept = u32::try_from(sent).expect("small") - passed;
        if kept + 4096 > room {
            std::thread::sleep(Duration::from_millis(50));
            match guest.poll() {
                Some((header, _)) => (room, passed) = (header.buf_alloc, header.fwd_cnt),
                None => break,
            }
            continue;
        }
        guest.send(end.header(op::RW, 0), &[7; 4096]);
        sent += 4096;
    }
    // One byte more than all that may be kept.
    for _ in 0..18 {
        guest.send(end.header(op::RW, 0), &[7; 4096]);
    }
    guest.wait_op(op::RST);
    drop(host);
}

#[test]
fn either_end_may_close_one_direction() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let (mut host, mut end) = guest.accept(&folder.0, 1, 1000);
    // The host has said all, and still listens.
    host.write_all(b"question").expect("open");
    host.shutdown(Shutdown::Write).expect("open");
    assert_eq!(guest.receive_all(&mut end, 8), b"question");
    let (header, _) = guest.wait_op(op::SHUTDOWN);
    assert_eq!(header.flags, shutdown::SEND);
    guest.send(end.header(op::RW, 0), b"answer");
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    guest.wait_op(op::RST);
    let mut text = String::new();
    host.read_to_string(&mut text).expect("the end of file");
    assert_eq!(text, "answer");
    // The other way round.
    let (mut host, mut end) = guest.accept(&folder.0, 2, 1000);
    guest.send(end.header(op::RW, 0), b"question");
    guest.send(end.header(op::SHUTDOWN, shutdown::SEND), &[]);
    text.clear();
    host.read_to_string(&mut text).expect("the end of file");
    assert_eq!(text, "question");
    host.write_all(b"answer").expect("open");
    drop(host);
    assert_eq!(guest.receive_all(&mut end, 6), b"answer");
    guest.wait("the end", |header| header.flags == shutdown::BOTH && header.dst_port == 2);
    guest.send(end.header(op::RST, 0), &[]);
}

#[test]
fn what_the_guest_wrote_before_it_left_is_read_by_a_slow_host() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let (mut host, end) = guest.accept(&folder.0, 1, 1000);
    let data = noise(300_000, 9);
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let mut all = Vec::new();
        host.read_to_end(&mut all).expect("the end of file");
        all
    });
    guest.send_all(&end, &data, 4096);
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    guest.send(end.header(op::RST, 0), &[]);
    assert!(reader.join().expect("read") == data);
}

#[test]
fn a_host_that_is_gone_is_told() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let (host, end) = guest.accept(&folder.0, 1, 1000);
    drop(host);
    // That it said all may be noticed before.
    guest.wait("the end", |header| header.op == op::SHUTDOWN && header.flags == shutdown::BOTH);
    // What the guest has already sent is no reason to complain.
    guest.send(end.header(op::RW, 0), b"too late");
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    guest.wait_op(op::RST);
}

#[test]
fn packets_of_no_connection_are_refused_and_refusals_are_not() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    for (number, wrong) in (1..).zip([op::RW, op::RESPONSE, op::SHUTDOWN, op::CREDIT_REQUEST, 77]) {
        let end = End { port: number, host_port: 4, room: 0, taken: 0 };
        guest.send(end.header(wrong, 0), b"");
        let (answer, _) = guest.wait("a refusal", |header| header.dst_port == number);
        assert_eq!(answer.op, op::RST);
    }
    guest.send(End { port: 50, host_port: 4, room: 0, taken: 0 }.header(op::RST, 0), &[]);
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.poll().is_none());
}

#[test]
fn no_more_connections_than_there_may_be() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let server = UnixListener::bind(folder.0.join("port_1")).expect("bound");
    let accepting = std::thread::spawn(move || {
        let hosts: Vec<_> = (0..1024).map(|_| server.accept().expect("connected").0).collect();
        (hosts, server)
    });
    for port in 0..1024 {
        let end = End { port, host_port: 1, room: 10, taken: 0 };
        guest.send(end.header(op::REQUEST, 0), &[]);
        // A unix socket's backlog is short.
        guest.wait("an answer", |header| header.dst_port == port && header.op == op::RESPONSE);
    }
    let (hosts, _server) = accepting.join().expect("all");
    guest.send(End { port: 2000, host_port: 1, room: 10, taken: 0 }.header(op::REQUEST, 0), &[]);
    let (answer, _) = guest.wait("an answer", |header| header.dst_port == 2000);
    assert_eq!(answer.op, op::RST);
    // The host waits at the door until one has left.
    let mut late = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    late.write_all(b"CONNECT 3\n").expect("open");
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.poll().is_none());
    guest.send(End { port: 0, host_port: 1, room: 10, taken: 0 }.header(op::RST, 0), &[]);
    guest.wait_op(op::REQUEST);
    drop(hosts);
}

#[test]
fn a_guest_that_has_no_buffers_gets_everything_when_it_has() {
    let folder = Folder::new();
    let mut guest = Guest::bare(&folder.0, LINUX);
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    host.write_all(b"CONNECT 3\n").expect("open");
    let end = End { port: 9, host_port: 99, room: 0, taken: 0 };
    guest.send(end.header(op::REQUEST, 0), &[]);
    std::thread::sleep(Duration::from_millis(30));
    guest.fill();
    guest.wait_op(op::REQUEST);
    guest.wait_op(op::RST);
}

#[test]
fn more_packets_than_there_is_room_for_refusals_wait_for_it() {
    let folder = Folder::new();
    let mut guest = Guest::bare(&folder.0, LINUX);
    for port in 0..300 {
        let end = End { port, host_port: 99, room: 0, taken: 0 };
        guest.send(end.header(op::RW, 0), b"x");
    }
    std::thread::sleep(Duration::from_millis(30));
    guest.fill();
    for port in 0..300 {
        guest.wait("a refusal", |header| header.dst_port == port && header.op == op::RST);
    }
}

#[test]
fn the_socket_goes_with_the_instance() {
    let folder = Folder::new();
    let guest = Guest::new(&folder.0, PLAIN);
    let path = guest.listener(&folder.0);
    assert!(path.exists());
    drop(guest);
    assert!(!path.exists());
    let long = Path::new("/").join("x".repeat(80));
    assert!(Vsock::new(&long, Uuid::new_v4()).is_err());
}

/// What Linux does with the event of its birth: end its connections, give the buffer back.
fn understand(child: &mut Guest) {
    let ram = child.ram();
    let mut event = None;
    until("the event", || {
        event = child.events.take(&ram);
        event.is_some()
    });
    assert_eq!(event.expect("taken"), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    let mut config = [0; 8];
    let at = u64::from(child.rig.window.start + reg::VIRTIO_MMIO_CONFIG);
    child.rig.bus.read(at, &mut config);
    assert_ne!(u64::from_le_bytes(config), child.cid, "the CID is the parent's");
    child.cid = u64::from_le_bytes(config);
    assert_eq!(child.cid, u64::from(cid(child.uuid)));
    child.events.add(&ram, None).expect("free");
    child.rig.kick(2);
}

#[test]
fn a_child_loses_the_connections_of_its_parent_and_gets_its_own() {
    for taste in [PLAIN, LINUX] {
        let folder = Folder::new();
        let mut parent = Guest::new(&folder.0, taste);
        let (mut host, mut end) = parent.accept(&folder.0, 52, 5000);
        parent.send(end.header(op::RW, 0), b"before");
        let mut text = [0; 6];
        host.read_exact(&mut text).expect("read");
        assert_eq!(&text, b"before");
        let mut child = parent.fork(&folder.0);
        child.rig.go();
        // A packet of the old connection, sent before the guest has understood.
        child.send(end.header(op::RW, 0), b"lost");
        let (answer, _) = child.wait_op(op::RST);
        assert_eq!((answer.dst_port, answer.dst_cid), (52, parent.cid));
        // Who connects before it has is let in afterwards.
        let path = child.listener(&folder.0);
        let mut early = UnixStream::connect(path).expect("listening");
        early.write_all(b"CONNECT 52\n").expect("open");
        std::thread::sleep(Duration::from_millis(20));
        assert!(child.poll().is_none(), "let in too early");
        understand(&mut child);
        let (request, _) = child.wait_op(op::REQUEST);
        assert_eq!((request.dst_port, request.dst_cid), (52, child.cid));
        let (host_of_child, mut own) = child.accept(&folder.0, 53, 5000);
        carries(&mut child, &mut own, host_of_child, 4000);
        // The parent's goes on.
        parent.send(end.header(op::RW, 0), b" and after");
        let mut text = [0; 10];
        host.read_exact(&mut text).expect("read");
        assert_eq!(&text, b" and after");
        host.write_all(b"yes").expect("open");
        assert_eq!(parent.receive_all(&mut end, 3), b"yes");
        assert!(parent.events.take(&parent.ram()).is_none(), "the parent was not born");
    }
}

#[test]
fn packets_on_their_way_at_the_fork_are_answered_in_the_child() {
    let folder = Folder::new();
    let mut parent = Guest::new(&folder.0, LINUX);
    let (mut host, end) = parent.accept(&folder.0, 52, 5000);
    let header = Header {
        src_cid: parent.cid,
        dst_cid: HOST,
        len: 5,
        kind: STREAM,
        ..end.header(op::RW, 0)
    };
    let packet = [&header.bytes()[..], b"hello"].concat();
    // The driver has put them into the queue, and even asked whether the device wants to know.
    let mut child = parent.fork_after(&folder.0, |tx, ram| {
        while tx.take(ram).is_some() {}
        for _ in 0..3 {
            tx.add(ram, Some(&packet)).expect("free");
        }
        tx.wants_kick(ram, true);
    });
    child.rig.go();
    for _ in 0..3 {
        child.wait_op(op::RST);
    }
    let ram = child.ram();
    until("the buffers", || child.tx.take(&ram).is_some());
    // And the next packet, which the driver notifies the device of only if it was asked to.
    child.send(end.header(op::RW, 0), b"again");
    child.wait_op(op::RST);
    // The parent's device was not disturbed.
    parent.rig.kick(1);
    let mut text = [0; 15];
    host.read_exact(&mut text).expect("read");
    assert_eq!(&text, b"hellohellohello");
}

#[test]
fn a_child_without_buffers_hears_of_its_birth_when_it_has() {
    let folder = Folder::new();
    let mut parent = Guest::bare(&folder.0, LINUX);
    let mut child = parent.fork(&folder.0);
    child.rig.go();
    let end = End { port: 1, host_port: 1, room: 0, taken: 0 };
    child.send(end.header(op::RW, 0), b"x");
    std::thread::sleep(Duration::from_millis(20));
    child.fill();
    child.wait_op(op::RST);
    child.events.add(&child.ram(), None).expect("free");
    child.rig.kick(2);
    understand(&mut child);
    // Half used queues: a grandchild of it.
    let (_host, own) = child.accept(&folder.0, 7, 100);
    let mut grandchild = child.fork(&folder.0);
    grandchild.rig.go();
    grandchild.events.add(&grandchild.ram(), None);
    grandchild.rig.kick(2);
    understand(&mut grandchild);
    grandchild.send(own.header(op::RW, 0), b"x");
    grandchild.wait_op(op::RST);
    let (host, mut end) = grandchild.accept(&folder.0, 8, 1000);
    carries(&mut grandchild, &mut end, host, 1000);
}

#[test]
fn a_guest_that_never_understands_is_connected_all_the_same() {
    let folder = Folder::new();
    let mut parent = Guest::new(&folder.0, PLAIN);
    let mut child = parent.fork(&folder.0);
    child.rig.go();
    let path = child.listener(&folder.0);
    let mut host = UnixStream::connect(path).expect("listening");
    host.write_all(b"CONNECT 1\n").expect("open");
    child.wait_op(op::REQUEST);
}

/// It is told in one line, and whoever has the path keeps it.
#[test]
fn a_socket_path_in_use_is_told_and_stays() {
    let folder = Folder::new();
    let uuid = Uuid::new_v4();
    let path = folder.0.join(format!("{uuid}.vsock"));
    let _theirs = UnixListener::bind(&path).expect("bound");
    let mut device = Vsock::new(&folder.0, uuid).expect("short");
    let error = crate::sys::chain(&device.open().expect_err("it is in use"));
    assert!(error.starts_with(&format!("cannot listen on {}", path.display())), "{error}");
    assert!(error.contains("in use") && !error.contains('\n'), "{error}");
    device.close();
    assert!(UnixStream::connect(&path).is_ok(), "it is theirs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_packets_come_the_device_goes_on(
        packets in prop::collection::vec(
            (
                0_u32..6, prop_oneof![Just(7_u32), 0_u32..9], 0_u16..9, any::<u32>(), any::<u32>(),
                any::<u32>(), 0_usize..200, prop::option::weighted(0.2, any::<u32>()),
            ),
            1..80,
        ),
        raw in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let folder = Folder::new();
        let mut guest = Guest::new(&folder.0, LINUX);
        let _server = UnixListener::bind(folder.0.join("port_7")).expect("bound");
        for (src_port, dst_port, op, flags, buf_alloc, fwd_cnt, len, lie) in packets {
            let header = Header {
                src_cid: guest.cid, dst_cid: HOST, src_port, dst_port, op, flags, buf_alloc,
                fwd_cnt, kind: STREAM, len: lie.unwrap_or(u32::try_from(len).expect("small")),
            };
            let packet = [&header.bytes()[..], &vec![1; len]].concat();
            let ram = guest.ram();
            until("room", || {
                while guest.tx.take(&ram).is_some() {}
                guest.tx.add(&ram, Some(&packet)).is_some()
            });
            guest.rig.kick(1);
            while guest.poll().is_some() {}
        }
        let ram = guest.ram();
        until("room for what is no packet", || {
            while guest.tx.take(&ram).is_some() {}
            guest.tx.add(&ram, Some(&raw)).is_some()
        });
        guest.rig.kick(1);
        let (host, mut end) = guest.accept(&folder.0, 4000, 10_000);
        drop(host);
        let (header, _) = guest.wait("the end", |header| {
            header.op == op::SHUTDOWN && header.dst_port == 4000
        });
        end.hear(&header);
        prop_assert!(!guest.rig.is_broken());
    }
}
