//! The entropy device (virtio 1.2, section 5.4): buffers come in, random bytes go out.
//!
//! A request that is under way at a fork is answered in parent and child, each with bytes of its own.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueT};

use super::mmio::Description;
use super::{Broken, Chain, Device, Work};
use crate::memory::GuestRam;

/// Most bytes for one request: the driver takes what it gets and asks again.
const MOST: usize = 4096;
/// Requests that are answered at once.
const BATCH: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub struct Rng {
    chain: Chain,
}

impl Device for Rng {
    fn describe(&self) -> Description {
        Description { id: VIRTIO_ID_RNG, queues: &[64], config: [0; 8] }
    }

    fn reset(&mut self) {}

    fn work(&mut self, queues: &mut [Queue], ram: &GuestRam) -> Result<Work, Broken> {
        let [queue] = queues else { return Ok(Work::default()) };
        let mut work = Work::default();
        let mut bytes = [0; MOST];
        for _ in 0..BATCH {
            if !self.chain.take(queue, ram)? {
                if queue.ready() && queue.enable_notification(ram)? {
                    continue;
                }
                work.interrupt = work.interrupt && queue.needs_notification(ram)?;
                return Ok(work);
            }
            let wanted = self.chain.room().min(MOST);
            // It does not block, and this kernel has it: identities come from it.
            let got = getrandom(&mut bytes[..wanted], GetRandomFlags::NONBLOCK).unwrap_or(0);
            self.chain.write(ram, 0, &bytes[..got])?;
            self.chain.give_back(queue, ram, got)?;
            work.interrupt = true;
        }
        work.more = true;
        work.interrupt = work.interrupt && queue.needs_notification(ram)?;
        Ok(work)
    }
}
