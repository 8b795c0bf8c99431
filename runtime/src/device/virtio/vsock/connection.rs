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

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send};

use super::packet::{Header, op, shutdown};

/// Bytes that are kept for the host's side of a connection.
pub const BUFFER: usize = 64 * 1024;
/// The same, as the guest is told.
const ROOM: u32 = 64 * 1024;
/// Bytes passed on after which the guest is told, if nothing else tells it.
const TELL: u32 = ROOM / 2;
/// The longest greeting: "CONNECT " and a port.
const GREETING: usize = 32;

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
    socket: OwnedFd,
    /// As far as is known, the socket has something to read, and room to write.
    readable: bool,
    writable: bool,
    /// The host will not send any more, will not receive any more.
    host_sent: bool,
    host_left: bool,
    /// What the guest said with SHUTDOWN, and what it was told.
    guest_shutdown: u32,
    told_shutdown: u32,
    /// For the host. The first bytes are ours, not the guest's.
    to_host: VecDeque<u8>,
    ours: usize,
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
            socket,
            readable: true,
            writable: true,
            host_sent: false,
            host_left: false,
            guest_shutdown: 0,
            told_shutdown: 0,
            to_host: VecDeque::new(),
            ours: 0,
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

    /// The host's socket.
    #[must_use]
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The socket has changed.
    pub fn woken(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable;
        self.writable |= writable;
        self.host_left |= hung_up;
    }

    /// The port that the host wants, once it has said so.
    ///
    /// # Errors
    ///
    /// If it says something else.
    pub fn greeting(&mut self) -> Result<Option<u32>, Errno> {
        let mut text = [0; GREETING];
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let len = match recv(&self.socket, &mut text, peek) {
            Ok((_, 0)) => return Err(Errno::PIPE),
            Ok((_, len)) => len.min(GREETING),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let said = &text[..len];
        let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
            // There is more to come, for which the socket becomes readable anew.
            return if len == GREETING { Err(Errno::PROTO) } else { Ok(None) };
        };
        let port = said[..end].strip_prefix(b"CONNECT ").ok_or(Errno::PROTO)?;
        let port = str::from_utf8(port).ok().and_then(|port| port.trim().parse().ok());
        let port = port.ok_or(Errno::PROTO)?;
        recv(&self.socket, &mut text[..=end], RecvFlags::DONTWAIT)?;
        Ok(Some(port))
    }

    /// Says something to the host that does not come from the guest, in front of all that does.
    pub fn say(&mut self, text: &str) {
        self.to_host.extend(text.as_bytes());
        self.ours += text.len();
        self.flush();
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
        let kept = self.to_host.len() - self.ours;
        let after_end = self.guest_shutdown & shutdown::SEND != 0;
        if after_end || data.len() > BUFFER.saturating_sub(kept) {
            return false;
        }
        let mut data = data;
        if self.to_host.is_empty() {
            let sent = self.send(data);
            self.passed += wrap(sent);
            data = &data[sent..];
        }
        self.to_host.extend(data);
        self.flush();
        true
    }

    /// The guest says SHUTDOWN.
    pub fn shut(&mut self, flags: u32) {
        self.guest_shutdown |= flags & shutdown::BOTH;
        if self.guest_shutdown & shutdown::RECEIVE != 0 {
            // The host learns when it writes. It may be gone: then it does not matter.
            rustix::net::shutdown(&self.socket, Shutdown::Read).unwrap_or(());
        }
        self.flush();
    }

    /// The guest has forgotten this connection: what it wrote before is passed on, unless it broke
    /// off.
    pub fn leave(&mut self) {
        self.stage = Stage::Leaving;
        if self.guest_shutdown & shutdown::SEND == 0 {
            self.to_host.clear();
            self.ours = 0;
        }
        self.flush();
    }

    /// Whether all is said: both ends are done, or one is gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let ended = self.stage == Stage::Leaving || self.guest_shutdown == shutdown::BOTH;
        ended && (self.to_host.is_empty() || self.host_left)
    }

    /// Passes on what the host has room for.
    pub fn flush(&mut self) {
        while !self.to_host.is_empty() && self.writable && !self.host_left {
            let part = self.to_host.as_slices().0;
            let sent = send_to(&self.socket, part, &mut self.writable, &mut self.host_left);
            self.forget(sent);
        }
        if self.host_left {
            self.forget(self.to_host.len());
        }
        if self.to_host.is_empty() {
            // A thousand connections have been slow once: they do not keep their memory.
            self.to_host.shrink_to(0);
            if self.guest_shutdown & shutdown::SEND != 0 {
                rustix::net::shutdown(&self.socket, Shutdown::Write).unwrap_or(());
            }
        }
    }

    fn forget(&mut self, bytes: usize) {
        self.to_host.drain(..bytes.min(self.to_host.len()));
        let ours = bytes.min(self.ours);
        self.ours -= ours;
        self.passed += wrap(bytes - ours);
    }

    fn send(&mut self, data: &[u8]) -> usize {
        if !self.writable || self.host_left {
            return 0;
        }
        send_to(&self.socket, data, &mut self.writable, &mut self.host_left)
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
        if self.host_sent {
            flags |= shutdown::SEND;
        }
        if self.host_left && (self.host_sent || self.guest_shutdown & shutdown::RECEIVE != 0) {
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
        // Reading nothing would look like the end.
        if !wanted || self.host_sent || !self.readable || buffer.is_empty() {
            return None;
        }
        let room = self.room();
        if room == 0 {
            let asks = !std::mem::replace(&mut self.asked_for_room, true);
            return asks.then_some(Next::Control { op: op::CREDIT_REQUEST, flags: 0 });
        }
        let len = buffer.len().min(room);
        match recv(&self.socket, &mut buffer[..len], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => self.host_sent = true,
            Ok((_, len)) => {
                self.sent += wrap(len);
                return Some(Next::Data(len));
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(Errno::INTR) => {}
            Err(_) => {
                self.host_sent = true;
                self.host_left = true;
            }
        }
        None
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

/// Sends as much as there is room for, and notes why it is not more.
fn send_to(socket: &OwnedFd, data: &[u8], writable: &mut bool, left: &mut bool) -> usize {
    if data.is_empty() {
        return 0;
    }
    match send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(sent) => return sent,
        Err(Errno::AGAIN) => *writable = false,
        Err(Errno::INTR) => {}
        Err(_) => *left = true,
    }
    0
}

fn wrap(len: usize) -> Wrapping<u32> {
    // Both ends count modulo 2^32, and no message is as long.
    Wrapping(u32::try_from(len).unwrap_or(0))
}
