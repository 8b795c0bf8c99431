//! All connections of a device: who gets which packet, and whose turn it is.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::Shutdown;

use super::connection::{Connection, Greeting, Next, Stage};
use super::host::{Address, LISTENER};
use super::packet::{HOST, Header, STREAM, op};
use crate::device::virtio::{Ask, DeviceError, Done};
use crate::sys::now_ns;

/// Most connections, those that are not yet or no more known to the guest included.
pub const MOST: usize = 1024;
/// Most packets that say no more than that there is no such connection.
const RESETS: usize = 256;
/// Ports from which the host's connections come.
const FIRST_PORT: u32 = 1 << 30;

/// How long the host may take to say what it wants, the guest to accept it, the host to take what was
/// under way when the guest broke a connection off.
const PATIENCE_NS: u64 = 10_000_000_000;

/// How long whoever could not be let in waits for the next try.
const KNOCK_NS: u64 = 100_000_000;

/// A connection as both ends know it: the guest's port and the host's.
type Ports = (u32, u32);

/// See the module.
#[derive(Debug)]
pub struct Connections {
    address: Address,
    cid: u64,
    listener: Option<Arc<OwnedFd>>,
    /// The guest is ready for connections of the host.
    listens: bool,
    /// Somebody will be accepted.
    accepting: bool,
    /// Who was accepted when there was no place any more.
    at_door: Option<OwnedFd>,
    /// Not before then is anybody accepted, after that has failed.
    accept_at_ns: Option<u64>,
    /// Connections that may have come further.
    changed: Vec<u64>,
    by_number: BTreeMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    last_number: u64,
    next_port: u32,
    /// Connections that may have something for the guest, in turn.
    turns: VecDeque<u64>,
    resets: VecDeque<Header>,
}

impl Connections {
    /// None, of an instance whose sockets lie at `address`. Ports of ours begin at another place in
    /// each: a child's guest may still know connections of its parent, tells connections apart by port
    /// and the other end's context id alone (`__vsock_find_connected_socket` in Linux's
    /// `net/vmw_vsock/af_vsock.c`, 6.1), and answers a request by an old one's port with RST.
    #[must_use]
    pub fn new(address: Address, cid: u32) -> Self {
        Self {
            address,
            cid: 0,
            listener: None,
            listens: false,
            accepting: false,
            at_door: None,
            accept_at_ns: None,
            changed: Vec::new(),
            by_number: BTreeMap::new(),
            by_ports: HashMap::new(),
            last_number: LISTENER,
            next_port: FIRST_PORT | cid,
            turns: VecDeque::new(),
            resets: VecDeque::new(),
        }
    }

    /// Begins to listen.
    ///
    /// # Errors
    ///
    /// What the host refuses.
    pub fn open(&mut self) -> Result<(), DeviceError> {
        self.listener = Some(Arc::new(self.address.listen()?));
        Ok(())
    }

    /// Ends all, and leaves nothing in the file system.
    pub fn close(&mut self) {
        self.forget();
        if let Some(listener) = self.listener.take() {
            // The ring has it still, if it is waiting for somebody.
            rustix::net::shutdown(&listener, Shutdown::Both).unwrap_or(());
            // If somebody else has removed it that is as well.
            std::fs::remove_file(self.address.listener()).unwrap_or(());
        }
    }

    /// Drops all connections: the guest does not know of any.
    pub fn forget(&mut self) {
        self.by_number.clear();
        self.by_ports.clear();
        self.turns.clear();
        self.resets.clear();
        self.changed.clear();
        self.listens = false;
    }

    /// The same, where the guest may know of some: it is told.
    pub fn reset_all(&mut self) {
        let known = std::mem::take(&mut self.by_ports);
        let mut resets = std::mem::take(&mut self.resets);
        for number in known.into_values() {
            if let Some(mut connection) = self.by_number.remove(&number) {
                resets.push_back(connection.header(HOST, op::RST, 0, 0));
            }
        }
        self.forget();
        self.resets = resets;
    }

    /// Whether the guest can be told of no more packets that nobody wants.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.resets.len() >= RESETS
    }

    /// Takes in what has changed on the host's side. Nobody new is let in unless the guest `listens`.
    pub fn look(&mut self, cid: u64, listens: bool) {
        (self.cid, self.listens) = (cid, listens);
        for number in std::mem::take(&mut self.changed) {
            self.advance(number);
        }
    }

    /// Something that was asked for is done.
    pub fn done(&mut self, done: Done) {
        let number = match done {
            Done::Accepted(_, result) => {
                self.accepting = false;
                match result {
                    Ok(socket) => self.at_door = Some(socket),
                    // Above all EMFILE: later.
                    Err(_) => self.accept_at_ns = Some(now_ns() + KNOCK_NS),
                }
                return;
            }
            Done::Received(number, result, buffer) => {
                let connection = self.by_number.get_mut(&number);
                connection.map(|connection| connection.received(result, buffer)).map(|()| number)
            }
            Done::Sent(number, result, buffer) => {
                let connection = self.by_number.get_mut(&number);
                connection.map(|connection| connection.sent(result, buffer)).map(|()| number)
            }
            Done::HungUp(number) => {
                let connection = self.by_number.get_mut(&number);
                connection.map(Connection::hung_up).map(|()| number)
            }
            Done::Rang => None,
        };
        self.changed.extend(number);
    }

    /// What is to be done with the host.
    pub fn asks(&mut self, asks: &mut Vec<Ask>) {
        if self.listens
            && self.by_number.len() < MOST
            && let Some(socket) = self.at_door.take()
        {
            let mut new = Connection::new(socket, Stage::Greeting, (self.cid, 0), self.free_port());
            new.deadline_ns = Some(now_ns() + PATIENCE_NS);
            self.add(new);
        }
        for (number, connection) in &mut self.by_number {
            connection.asks(*number, asks);
        }
        let room = self.listens && self.at_door.is_none() && self.by_number.len() < MOST;
        let now = self.accept_at_ns.is_none_or(|at| at <= now_ns());
        if let (true, true, false, Some(listener)) = (room, now, self.accepting, &self.listener) {
            asks.push(Ask::Accept { number: LISTENER, socket: listener.clone() });
            self.accepting = true;
            self.accept_at_ns = None;
        }
    }

    /// A port of ours that no connection uses.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.wrapping_add(1).max(FIRST_PORT);
            // There are fewer connections than ports.
            if !self.by_number.values().any(|connection| connection.host_port == port) {
                return port;
            }
        }
    }

    fn add(&mut self, connection: Connection) -> u64 {
        self.last_number += 1;
        self.by_number.insert(self.last_number, connection);
        self.last_number
    }

    /// A connection may have come further.
    fn advance(&mut self, number: u64) {
        let Some(connection) = self.by_number.get_mut(&number) else { return };
        if connection.stage == Stage::Greeting {
            match connection.greeting() {
                Greeting::Waiting => return,
                Greeting::Port(port) => {
                    connection.stage = Stage::Asked(true);
                    connection.guest = (self.cid, port);
                    let ports = (port, connection.host_port);
                    self.by_ports.insert(ports, number);
                }
                Greeting::Nonsense => {
                    self.remove(number);
                    return;
                }
            }
        }
        if connection.is_over() {
            self.end(number);
        } else {
            self.list(number);
        }
    }

    fn list(&mut self, number: u64) {
        if let Some(connection) = self.by_number.get_mut(&number)
            && !std::mem::replace(&mut connection.listed, true)
        {
            self.turns.push_back(number);
        }
    }

    fn remove(&mut self, number: u64) -> Option<Connection> {
        let connection = self.by_number.remove(&number)?;
        let ports = (connection.guest.1, connection.host_port);
        if self.by_ports.get(&ports) == Some(&number) {
            self.by_ports.remove(&ports);
        }
        Some(connection)
    }

    /// Removes a connection, and tells the guest if it does not know.
    fn end(&mut self, number: u64) {
        if let Some(mut connection) = self.remove(number)
            && !matches!(connection.stage, Stage::Leaving | Stage::Greeting | Stage::Asked(true))
        {
            self.resets.push_back(connection.header(HOST, op::RST, 0, 0));
        }
    }

    /// A packet from the guest.
    pub fn packet(&mut self, header: &Header, data: &[u8]) {
        let number = self.by_ports.get(&(header.src_port, header.dst_port)).copied();
        let number = number.filter(|_| header.dst_cid == HOST && header.kind == STREAM);
        let known = number.and_then(|number| Some((number, self.by_number.get_mut(&number)?)));
        let Some((number, connection)) = known else {
            self.unknown(header);
            return;
        };
        connection.hear(header);
        let open = connection.stage == Stage::Open;
        let fine = match header.op {
            op::RESPONSE if matches!(connection.stage, Stage::Asked(false)) => {
                connection.stage = Stage::Open;
                connection.deadline_ns = None;
                let port = connection.host_port;
                connection.say(&format!("OK {port}\n"));
                true
            }
            op::RST => {
                self.by_ports.remove(&(header.src_port, header.dst_port));
                connection.leave();
                // All of what the guest has written is there, if it said so: that is the host's, however
                // slowly it reads. Linux says this 8 s after its end if nobody has answered that.
                let whole = connection.has_ended();
                connection.deadline_ns = (!whole).then(|| now_ns() + PATIENCE_NS);
                true
            }
            op::SHUTDOWN if open => {
                connection.shut(header.flags);
                true
            }
            op::RW if open => connection.take(data),
            op::CREDIT_UPDATE => open,
            op::CREDIT_REQUEST if open => {
                connection.owe_room();
                true
            }
            _ => false,
        };
        if !fine || connection.is_over() {
            self.end(number);
        } else {
            self.list(number);
        }
    }

    /// A packet of no connection that there is.
    fn unknown(&mut self, header: &Header) {
        let wanted = (header.op, header.kind, header.dst_cid) == (op::REQUEST, STREAM, HOST);
        if wanted && self.connect(header) {
            return;
        }
        if header.op != op::RST {
            self.resets.push_back(header.refusal());
        }
    }

    /// The guest wants a connection to the host; tells whether it has it.
    fn connect(&mut self, header: &Header) -> bool {
        if self.by_number.len() >= MOST {
            return false;
        }
        let Ok((socket, line)) = self.address.connect(header.dst_port) else { return false };
        let guest = (header.src_cid, header.src_port);
        let mut new = Connection::new(socket, Stage::Open, guest, header.dst_port);
        new.hear(header);
        if let Some(line) = line {
            new.say(&line);
        }
        let number = self.add(new);
        self.by_ports.insert((header.src_port, header.dst_port), number);
        self.list(number);
        true
    }

    /// The next packet for the guest, its data in `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Option<(Header, usize)> {
        if let Some(reset) = self.resets.pop_front() {
            return Some((reset, 0));
        }
        while let Some(number) = self.turns.pop_front() {
            let Some(connection) = self.by_number.get_mut(&number) else { continue };
            let (op, flags, len) = match connection.next(buffer) {
                Next::Nothing => {
                    connection.listed = false;
                    continue;
                }
                Next::Control { op, flags } => (op, flags, 0),
                Next::Data(len) => (op::RW, 0, len),
            };
            // It may have more: after the others.
            self.turns.push_back(number);
            let bytes = u32::try_from(len).unwrap_or(0);
            return Some((connection.header(HOST, op, flags, bytes), len));
        }
        None
    }

    /// Whether there may be something for the guest.
    #[must_use]
    pub fn has_news(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Gives up who has waited for too long, and tells when to look again.
    pub fn expire(&mut self) -> Option<u64> {
        let now = now_ns();
        let due = |(number, connection): (&u64, &Connection)| {
            connection.deadline_ns.is_some_and(|at| at <= now).then_some(*number)
        };
        let late: Vec<u64> = self.by_number.iter().filter_map(due).collect();
        for number in late {
            self.end(number);
        }
        let deadlines = self.by_number.values().filter_map(|connection| connection.deadline_ns);
        deadlines.chain(self.accept_at_ns.filter(|at| *at > now)).min()
    }
}
