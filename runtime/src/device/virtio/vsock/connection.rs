//! One connection: a stream socket on the host, and the state of its other end in the guest.
//!
//! ```text
//!   host connects:   GREETING --CONNECT n--> ASKED --RESPONSE--> OPEN
//!   guest connects:  -----------------------------------REQUEST--> OPEN
//!   OPEN --both ends said SHUTDOWN, or one said RST--> LEAVING (what the guest wrote is passed on)
//! ```
//!
//! Each side tells the other how much room it has (`buf_alloc`) and how much of what came has been
//! passed on (`fwd_cnt`), so that neither keeps more than it wants to: what the host does not read
//! stays here up to [`BUFFER`] bytes and then in the guest, what the guest does not read stays in the
//! host's socket.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::Shutdown;

use super::packet::{Header, op, shutdown};
use crate::device::virtio::Ask;

/// Bytes that are kept for the host's side of a connection.
pub const BUFFER: usize = 64 * 1024;
/// The same, as the guest is told.
const ROOM: u32 = 64 * 1024;
/// Bytes passed on after which the guest is told, if nothing else tells it.
const TELL: u32 = ROOM / 2;
/// The longest greeting: "CONNECT " and a port.
const GREETING: usize = 32;
/// Least bytes that are received at once: who sends little at a time needs no more memory.
const LEAST: usize = 4096;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The host has connected and not said to which port.
    Greeting,
    /// The guest has not answered. `true`: nor been asked.
    Asked(bool),
    /// Both ends are there.
    Open,
    /// The guest has forgotten it.
    Leaving,
}

/// What a host has said that has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Not all yet.
    Waiting,
    /// Which port of the guest it wants.
    Port(u32),
    /// Something else.
    Nonsense,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Nothing,
    /// A packet without data.
    Control {
        /// Its purpose.
        op: u16,
        /// Its flags.
        flags: u32,
    },
    /// That many bytes.
    Data(usize),
}

/// See the module.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each end can be done with each direction")]
pub struct Connection {
    /// How far it has come.
    pub stage: Stage,
    /// The guest's end.
    pub guest: (u64, u32),
    /// Our port.
    pub host_port: u32,
    /// When it is given up unless it has come further, in nanoseconds of the monotonic clock.
    pub deadline_ns: Option<u64>,
    /// It is listed among those that may have something for the guest.
    pub listed: bool,
    socket: Arc<OwnedFd>,
    /// What is under way in the ring.
    receiving: bool,
    /// Bytes.
    sending: usize,
    watched: bool,
    /// From the host, not yet taken by the guest; from `taken` on. Empty while it is being filled.
    from_host: Vec<u8>,
    taken: usize,
    /// Bytes to be received at once: more for who sends much.
    chunk: usize,
    /// The host will not send any more, will not receive any more.
    host_sent: bool,
    host_left: bool,
    /// What the guest said with SHUTDOWN, and what it was told.
    guest_shutdown: u32,
    told_shutdown: u32,
    /// For the host, behind what is being sent.
    to_host: VecDeque<u8>,
    /// So many of the first bytes, those being sent included, are ours and not the guest's.
    ours: usize,
    /// A part of what was to be sent, first of all.
    rest: Option<(Vec<u8>, usize)>,
    ended_writing: bool,
    /// Bytes of the guest that were passed on, and how many it knows of.
    passed: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes sent to the guest, and what it said about its room.
    sent: Wrapping<u32>,
    guest_room: u32,
    guest_passed: Wrapping<u32>,
    asked_for_room: bool,
    owes_response: bool,
    owes_room: bool,
}

impl Connection {
    /// A connection over `socket` that has come as far as `stage`.
    #[must_use]
    pub fn new(socket: OwnedFd, stage: Stage, guest: (u64, u32), host_port: u32) -> Self {
        Self {
            stage,
            guest,
            host_port,
            deadline_ns: None,
            listed: false,
            socket: Arc::new(socket),
            receiving: false,
            sending: 0,
            watched: false,
            from_host: Vec::new(),
            taken: 0,
            chunk: LEAST,
            host_sent: false,
            host_left: false,
            guest_shutdown: 0,
            told_shutdown: 0,
            to_host: VecDeque::new(),
            ours: 0,
            rest: None,
            ended_writing: false,
            passed: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_room: 0,
            guest_passed: Wrapping(0),
            asked_for_room: false,
            owes_response: stage == Stage::Open,
            owes_room: false,
        }
    }

    /// What is to be done with the host.
    pub fn asks(&mut self, number: u64, asks: &mut Vec<Ask>) {
        let socket = || self.socket.clone();
        if !std::mem::replace(&mut self.watched, true) {
            asks.push(Ask::HangUp { number, socket: socket() });
        }
        let room = match self.stage {
            Stage::Greeting => GREETING,
            Stage::Open if self.guest_shutdown & shutdown::RECEIVE == 0 => self.room(),
            _ => 0,
        };
        let wanted = self.unread().is_empty() || self.stage == Stage::Greeting;
        if wanted && room > 0 && !self.receiving && !self.host_sent {
            let mut buffer = Vec::new();
            if self.stage != Stage::Greeting {
                buffer = std::mem::take(&mut self.from_host);
                self.taken = 0;
            }
            buffer.resize(self.chunk.min(room), 0);
            buffer.shrink_to(self.chunk);
            asks.push(Ask::Receive { number, socket: socket(), buffer });
            self.receiving = true;
        }
        if self.sending == 0 && !self.host_left {
            let (buffer, from) = self.rest.take().unwrap_or_else(|| {
                let all = std::mem::take(&mut self.to_host);
                (all.into(), 0)
            });
            self.sending = buffer.len() - from;
            if self.sending > 0 {
                asks.push(Ask::Send { number, socket: socket(), buffer, from });
            }
        }
        self.end_writing();
    }

    /// Something has come from the host.
    pub fn received(&mut self, result: Result<usize, Errno>, mut buffer: Vec<u8>) {
        self.receiving = false;
        let len = match result {
            Ok(0) => {
                self.host_sent = true;
                0
            }
            Ok(len) => len.min(buffer.len()),
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(_) => {
                self.host_sent = true;
                self.host_left = true;
                0
            }
        };
        if len == self.chunk {
            self.chunk = (self.chunk * 4).min(BUFFER);
        } else if len < self.chunk / 4 {
            self.chunk = (self.chunk / 4).max(LEAST);
        }
        buffer.truncate(len);
        if self.stage == Stage::Greeting {
            self.from_host.extend(buffer);
        } else {
            self.from_host = buffer;
            self.taken = 0;
        }
    }

    /// Something has gone to the host.
    pub fn sent(&mut self, result: Result<usize, Errno>, buffer: Vec<u8>) {
        let sending = std::mem::take(&mut self.sending);
        let sent = match result {
            Ok(sent) => sent.min(sending),
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(_) => {
                self.host_left = true;
                sending
            }
        };
        let ours = sent.min(self.ours);
        self.ours -= ours;
        self.passed += wrap(sent - ours);
        if sent < sending {
            let from = buffer.len() - (sending - sent);
            self.rest = Some((buffer, from));
        }
        self.forget_unsent();
    }

    /// The host is gone.
    pub fn hung_up(&mut self) {
        self.host_left = true;
        self.forget_unsent();
    }

    /// The port that the host wants, once it has said so.
    pub fn greeting(&mut self) -> Greeting {
        let said = self.from_host.get(..GREETING).unwrap_or(&self.from_host);
        let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
            let over = said.len() == GREETING || self.host_sent;
            return if over { Greeting::Nonsense } else { Greeting::Waiting };
        };
        let port = said[..end].strip_prefix(b"CONNECT ");
        let port = port.and_then(|port| str::from_utf8(port).ok()?.trim().parse().ok());
        let Some(port) = port else { return Greeting::Nonsense };
        self.taken = end + 1;
        Greeting::Port(port)
    }

    /// Says something to the host that does not come from the guest, in front of all that does.
    pub fn say(&mut self, text: &str) {
        self.to_host.extend(text.as_bytes());
        self.ours += text.len();
    }

    /// What has come from the host and the guest has not.
    fn unread(&self) -> &[u8] {
        self.from_host.get(self.taken..).unwrap_or_default()
    }

    /// Bytes for the host that it does not have.
    fn unsent(&self) -> usize {
        let rest = self.rest.as_ref().map_or(0, |(buffer, from)| buffer.len() - from);
        self.sending + rest + self.to_host.len()
    }

    /// Nobody will read them.
    fn forget_unsent(&mut self) {
        if self.host_left && self.sending == 0 {
            let unsent = self.unsent();
            self.passed += wrap(unsent - self.ours.min(unsent));
            (self.to_host, self.rest, self.ours) = (VecDeque::new(), None, 0);
        }
    }

    /// The guest's end of file, behind all that it has written.
    fn end_writing(&mut self) {
        let ended = self.has_ended() && self.unsent() == 0;
        if ended && !std::mem::replace(&mut self.ended_writing, true) {
            // The host may be gone: then it does not matter.
            rustix::net::shutdown(&self.socket, Shutdown::Write).unwrap_or(());
        }
    }

    /// Takes note of what every packet of the guest tells about its room.
    pub fn hear(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_passed = Wrapping(header.fwd_cnt);
        // An answer that there is none is no reason to ask again: it will tell when there is.
        self.asked_for_room &= self.room() == 0;
    }

    /// Bytes that the guest has room for.
    fn room(&self) -> usize {
        self.guest_room.saturating_sub((self.sent - self.guest_passed).0) as usize
    }

    /// The guest wants to know how much room there is.
    pub fn owe_room(&mut self) {
        self.owes_room = true;
    }

    /// The guest sends `data`; tells whether it may.
    #[must_use]
    pub fn take(&mut self, data: &[u8]) -> bool {
        let kept = self.unsent().saturating_sub(self.ours);
        if self.has_ended() || data.len() > BUFFER.saturating_sub(kept) {
            return false;
        }
        self.to_host.extend(data);
        self.forget_unsent();
        true
    }

    /// The guest says SHUTDOWN.
    pub fn shut(&mut self, flags: u32) {
        self.guest_shutdown |= flags & shutdown::BOTH;
        if self.guest_shutdown & shutdown::RECEIVE != 0 {
            // The host learns when it writes. It may be gone: then it does not matter.
            rustix::net::shutdown(&self.socket, Shutdown::Read).unwrap_or(());
        }
        self.end_writing();
    }

    /// The guest has forgotten this connection: what it wrote before is passed on, unless it broke
    /// off.
    pub fn leave(&mut self) {
        self.stage = Stage::Leaving;
        if !self.has_ended() {
            (self.to_host, self.rest, self.ours) = (VecDeque::new(), None, 0);
        }
    }

    /// Whether the guest has said that it will write no more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.guest_shutdown & shutdown::SEND != 0
    }

    /// Whether all is said: both ends are done, or one is gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let ended = self.stage == Stage::Leaving || self.guest_shutdown == shutdown::BOTH;
        ended && (self.unsent() == 0 || self.host_left)
    }

    /// What is next for the guest. Data is put into `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Next {
        let control = |op| Next::Control { op, flags: 0 };
        match self.stage {
            Stage::Asked(true) => {
                self.stage = Stage::Asked(false);
                return control(op::REQUEST);
            }
            Stage::Open => {}
            Stage::Greeting | Stage::Asked(false) | Stage::Leaving => return Next::Nothing,
        }
        if std::mem::take(&mut self.owes_response) {
            return control(op::RESPONSE);
        }
        if let Some(next) = self.next_data(buffer) {
            return next;
        }
        let mut flags = 0;
        let host_sent = self.host_sent && self.unread().is_empty();
        if host_sent {
            flags |= shutdown::SEND;
        }
        if self.host_left && (host_sent || self.guest_shutdown & shutdown::RECEIVE != 0) {
            flags |= shutdown::BOTH;
        }
        if flags & !self.told_shutdown != 0 {
            self.told_shutdown |= flags;
            return Next::Control { op: op::SHUTDOWN, flags };
        }
        if self.owes_room || (self.passed - self.told).0 >= TELL {
            return control(op::CREDIT_UPDATE);
        }
        Next::Nothing
    }

    fn next_data(&mut self, buffer: &mut [u8]) -> Option<Next> {
        let wanted = self.guest_shutdown & shutdown::RECEIVE == 0;
        let waiting = !self.unread().is_empty();
        if !wanted || buffer.is_empty() || (self.host_sent && !waiting) {
            return None;
        }
        let room = self.room();
        if room == 0 {
            let asks = !std::mem::replace(&mut self.asked_for_room, true);
            return asks.then_some(Next::Control { op: op::CREDIT_REQUEST, flags: 0 });
        }
        let len = buffer.len().min(room).min(self.unread().len());
        if len == 0 {
            return None;
        }
        let (to, from) = (buffer.get_mut(..len)?, self.unread().get(..len)?);
        to.copy_from_slice(from);
        self.taken += len;
        self.sent += wrap(len);
        Some(Next::Data(len))
    }

    /// The header of a packet for the guest's end, which so learns of our room.
    pub fn header(&mut self, cid: u64, op: u16, flags: u32, len: u32) -> Header {
        let (guest_cid, guest_port) = self.guest;
        self.told = self.passed;
        self.owes_room = false;
        Header {
            src_cid: cid,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: guest_port,
            len,
            kind: super::packet::STREAM,
            op,
            flags,
            buf_alloc: ROOM,
            fwd_cnt: self.passed.0,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // What is under way has the socket still, and ends with this.
        rustix::net::shutdown(&self.socket, Shutdown::Both).unwrap_or(());
    }
}

fn wrap(len: usize) -> Wrapping<u32> {
    // Both ends count modulo 2^32, and no message is as long.
    Wrapping(u32::try_from(len).unwrap_or(0))
}
