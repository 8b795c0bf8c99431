//! The socket device (virtio 1.2, section 5.10): streams between the guest and unix sockets of the
//! host.
//!
//! ```text
//!   host --CONNECT 52--> <folder>/<uuid>.vsock --REQUEST--> guest's port 52
//!   guest --REQUEST, port 7--> <folder>/<uuid>.vsock_7, or else <folder>/port_7 (told "<uuid>")
//! ```
//!
//! A child has no connections. Its guest is told by an event that its CID is another one and that all
//! connections are over; packets of theirs that come before it has understood are answered with RST.
//! Until it has, nobody is let in: the guest would end their connections along with the old ones.

mod connection;
mod connections;
mod host;
mod packet;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::Ordering;

use uuid::Uuid;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueT};

use self::connection::BUFFER;
use self::connections::Connections;
use self::host::Address;
use self::packet::{HEADER, Header};
use super::mmio::Description;
use super::{Ask, Broken, Chain, Device, DeviceError, Done, Work};
use crate::memory::GuestRam;
use crate::sys::now_ns;

/// The longest packet, with its header.
const LONGEST: usize = HEADER + BUFFER;
/// Packets, and bytes, that are passed on in one direction at once: a fork waits for the end of it.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 256 * 1024;
/// Least CID of a guest.
const FIRST_CID: u32 = 3;
/// The event that tells that all connections are over.
const TRANSPORT_RESET: u32 = 0;
/// How long a guest may take to understand that, and how often it is looked whether it has.
const UNDERSTAND_NS: u64 = 1_000_000_000;
const LOOK_NS: u64 = 2_000_000;

/// What a child's guest knows of its birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Birth {
    /// All, or it was not born.
    Known,
    /// Nothing: there was no buffer to tell it with.
    Untold,
    /// It was told, when it had made this many buffers available, and is to understand until then.
    Told { available: u16, until_ns: u64 },
}

/// See the module.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    birth: Birth,
    connections: Connections,
    chain: Chain,
    /// A packet on its way.
    packet: Vec<u8>,
}

impl Vsock {
    /// The device of instance `uuid`, with its sockets in `folder`.
    ///
    /// # Errors
    ///
    /// If the folder's path is too long.
    pub fn new(folder: &Path, uuid: Uuid) -> Result<Self, DeviceError> {
        let address = Address::new(folder, uuid)?;
        Ok(Self {
            cid: cid(uuid),
            birth: Birth::Known,
            connections: Connections::new(address, cid(uuid)),
            chain: Chain::default(),
            packet: Vec::new(),
        })
    }

    /// Tells the guest of a child that its connections are over, and finds out whether it knows.
    fn tell_of_birth(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
        match self.birth {
            Birth::Known => {}
            Birth::Untold => {
                if !self.chain.take(queue, ram)? {
                    // Whoever gives a buffer tells; if somebody has meanwhile, once more.
                    let again = queue.ready() && queue.enable_notification(ram)?;
                    if !again || !self.chain.take(queue, ram)? {
                        return Ok(false);
                    }
                }
                let available = queue.avail_idx(ram, Ordering::Acquire)?.0;
                self.chain.write(ram, 0, &TRANSPORT_RESET.to_le_bytes())?;
                self.chain.give_back(queue, ram, size_of_val(&TRANSPORT_RESET))?;
                self.birth = Birth::Told { available, until_ns: now_ns() + UNDERSTAND_NS };
                return Ok(queue.needs_notification(ram)?);
            }
            Birth::Told { available, until_ns } => {
                // It gives the buffer back when it has done what is to be done.
                let understood = queue.avail_idx(ram, Ordering::Acquire)?.0 != available;
                if understood || now_ns() > until_ns {
                    self.birth = Birth::Known;
                    self.connections.reset_all();
                }
            }
        }
        Ok(false)
    }

    /// Takes packets that the guest has sent.
    fn receive(
        &mut self,
        queue: &mut Queue,
        ram: &GuestRam,
        work: &mut Work,
    ) -> Result<(), Broken> {
        let (mut count, mut bytes) = (0, 0);
        while !self.connections.is_stuck() {
            if count >= BATCH || bytes >= BATCH_BYTES {
                work.more = true;
                break;
            }
            if !self.chain.take(queue, ram)? {
                if queue.ready() && queue.enable_notification(ram)? {
                    continue;
                }
                break;
            }
            let len = self.chain.read(ram, &mut self.packet)?;
            self.chain.give_back(queue, ram, 0)?;
            (count, bytes) = (count + 1, bytes + len);
            let Some((head, data)) = self.packet.get(..len).and_then(<[u8]>::split_first_chunk)
            else {
                // Whoever sends no header wants no answer.
                continue;
            };
            let mut header = Header::parse(head);
            let data = data.get(..header.len as usize).unwrap_or_else(|| {
                // It promised more than it sent: no packet that any connection takes.
                header.op = 0;
                &[]
            });
            self.connections.packet(&header, data);
        }
        if count > 0 {
            work.interrupt |= queue.needs_notification(ram)?;
        }
        Ok(())
    }

    /// Fills the guest's buffers with packets for it.
    fn send(&mut self, queue: &mut Queue, ram: &GuestRam, work: &mut Work) -> Result<(), Broken> {
        let (mut count, mut bytes) = (0, 0);
        while self.connections.has_news() {
            if count >= BATCH || bytes >= BATCH_BYTES {
                work.more = true;
                break;
            }
            let position = queue.next_avail();
            if !self.chain.take(queue, ram)? {
                if queue.ready() && queue.enable_notification(ram)? {
                    continue;
                }
                break;
            }
            let room = self.chain.room().min(LONGEST).checked_sub(HEADER).ok_or(Broken::Chain)?;
            let buffer = self.packet.get_mut(..room).unwrap_or_default();
            let Some((header, len)) = self.connections.next(buffer) else {
                // The buffer is for the next packet.
                queue.set_next_avail(position);
                break;
            };
            self.chain.write(ram, 0, &header.bytes())?;
            self.chain.write(ram, HEADER, self.packet.get(..len).unwrap_or_default())?;
            self.chain.give_back(queue, ram, HEADER + len)?;
            (count, bytes) = (count + 1, bytes + len);
        }
        if count > 0 {
            work.interrupt |= queue.needs_notification(ram)?;
        }
        Ok(())
    }
}

impl Device for Vsock {
    fn describe(&self) -> Description {
        let config = u64::from(self.cid).to_le_bytes();
        Description { id: VIRTIO_ID_VSOCK, queues: &[128, 128, 16], config }
    }

    fn reset(&mut self) {
        self.connections.forget();
        self.birth = Birth::Known;
    }

    fn open(&mut self) -> Result<(), DeviceError> {
        self.packet = vec![0; LONGEST];
        self.connections.open()
    }

    fn asks(&mut self, asks: &mut Vec<Ask>) {
        self.connections.asks(asks);
    }

    fn done(&mut self, done: Done) {
        self.connections.done(done);
    }

    fn close(&mut self) {
        self.connections.close();
    }

    fn reborn(&mut self) {
        self.birth = Birth::Untold;
    }

    fn work(&mut self, queues: &mut [Queue], ram: &GuestRam) -> Result<Work, Broken> {
        let [rx, tx, events] = queues else { return Ok(Work::default()) };
        let mut work = Work { interrupt: self.tell_of_birth(events, ram)?, ..Work::default() };
        let knows = self.birth == Birth::Known;
        self.connections.look(self.cid.into(), knows);
        self.receive(tx, ram, &mut work)?;
        work.at_ns = self.connections.expire();
        let stuck = self.connections.is_stuck();
        self.send(rx, ram, &mut work)?;
        // The packets that were left in the queue do not announce themselves again.
        work.more |= stuck && !self.connections.is_stuck();
        if let Birth::Told { .. } = self.birth {
            let soon = now_ns() + LOOK_NS;
            work.at_ns = Some(work.at_ns.map_or(soon, |at| at.min(soon)));
        }
        Ok(work)
    }
}

/// The CID of an instance: as good as unique, and not one of the reserved ones.
fn cid(uuid: Uuid) -> u32 {
    let (high, low) = uuid.as_u64_pair();
    let span = u64::from(u32::MAX - FIRST_CID);
    let number = u32::try_from((high ^ low) % span).unwrap_or(0);
    FIRST_CID + number
}
