//! One chain of descriptors: buffers that the guest lends.
//!
//! How a message is spread over buffers is the driver's affair (virtio 1.2, section 2.7.4), so
//! devices see a chain as one run of bytes to read and one to write.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Broken;
use crate::memory::GuestRam;

/// The buffers of a chain. Kept from one chain to the next, so that its lists are made once.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<(GuestAddress, usize)>,
    writable: Vec<(GuestAddress, usize)>,
}

impl Chain {
    /// Takes the next chain that the driver has put into `queue`; tells whether there was one.
    ///
    /// # Errors
    ///
    /// If there cannot be as many as the driver says, or the chain is longer than its queue.
    pub fn take(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
        self.readable.clear();
        self.writable.clear();
        if !queue.ready() {
            return Ok(false);
        }
        let most = usize::from(queue.size());
        let Some(chain) = queue.iter(ram)?.next() else { return Ok(false) };
        self.head = chain.head_index();
        for (index, buffer) in chain.enumerate() {
            if index >= most {
                return Err(Broken::Chain);
            }
            let side = if buffer.is_write_only() { &mut self.writable } else { &mut self.readable };
            side.push((buffer.addr(), buffer.len() as usize));
        }
        Ok(true)
    }

    /// Gives the buffers back to the driver, `written` bytes in them.
    ///
    /// # Errors
    ///
    /// If the driver's chain had no place in the queue.
    pub fn give_back(
        &self,
        queue: &mut Queue,
        ram: &GuestRam,
        written: usize,
    ) -> Result<(), Broken> {
        let written = u32::try_from(written).map_err(|_| Broken::Chain)?;
        Ok(queue.add_used(ram, self.head, written)?)
    }

    /// Copies what the driver wrote to `to`, as much as there is room for, and returns how much
    /// that is.
    ///
    /// # Errors
    ///
    /// If a buffer is not in guest memory.
    pub fn read(&self, ram: &GuestRam, to: &mut [u8]) -> Result<usize, Broken> {
        let mut done = 0;
        for (address, len) in &self.readable {
            let left = to.len() - done;
            let part = &mut to[done..][..left.min(*len)];
            ram.read_slice(part, *address).map_err(|_| Broken::Address)?;
            done += part.len();
        }
        Ok(done)
    }

    /// Bytes that the driver wrote, as far as it says.
    #[must_use]
    pub fn len(&self) -> usize {
        self.readable.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    /// Bytes that can be written.
    #[must_use]
    pub fn room(&self) -> usize {
        self.writable.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    /// Writes `bytes` at `offset` of what can be written.
    ///
    /// # Errors
    ///
    /// If there is no room for it, or a buffer is not in guest memory.
    pub fn write(&self, ram: &GuestRam, offset: usize, bytes: &[u8]) -> Result<(), Broken> {
        let (mut skip, mut left) = (offset, bytes);
        for (address, len) in &self.writable {
            let passed = skip.min(*len);
            skip -= passed;
            let (part, rest) = left.split_at(left.len().min(*len - passed));
            if !part.is_empty() {
                let start = address.0.checked_add(passed as u64).ok_or(Broken::Address)?;
                ram.write_slice(part, GuestAddress(start)).map_err(|_| Broken::Address)?;
            }
            left = rest;
        }
        if left.is_empty() { Ok(()) } else { Err(Broken::Chain) }
    }
}
