//! The console device (virtio 1.2, section 5.3): one port, the guest's `/dev/hvc0`.
//!
//! ```text
//!   guest writes --> queue 1 --> the instance's console, with what the serial line says
//!   who runs it types --> Typed --> queue 0 --> guest reads
//! ```
//!
//! A guest's write costs one exit for a buffer, where the serial line's costs one for each byte. The
//! driver spins with a lock held until its buffer is used, so the vCPU that notifies does the work
//! itself ([`Device::is_prompt`]): when it enters the guest again there is nothing to wait for.
//!
//! Linux throws away what comes before it has a terminal for it (`in_intr` of `virtio_console`, until
//! `guest_connected`), and tells nobody when it has. So what was typed waits until the guest has written
//! something, or for a second.
//!
//! At a fork, what the guest has written is said, by the parent; buffers that wait for input wait in
//! both machines. What was typed and the guest has not taken stays with the parent: whoever typed it
//! meant that one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::{Queue, QueueT};

use super::mmio::Description;
use super::{Broken, Chain, Device, Work};
use crate::memory::GuestRam;
use crate::sys::now_ns;

/// Buffers that are used at once, in each direction.
const BATCH: usize = 16;
/// Bytes that are taken from one buffer: drivers give a page.
const MOST: usize = 64 * 1024;
/// How long a driver may take from its first notification until it has a terminal.
const SETTLE_NS: u64 = 1_000_000_000;
/// Bytes that may wait for the guest to read them.
const TYPED: usize = 16 * 1024;

/// What was typed and the guest has not taken.
#[derive(Clone, Debug, Default)]
pub struct Typed(Arc<Mutex<VecDeque<u8>>>);

impl Typed {
    /// Adds as many bytes as there is room for; returns how many.
    #[must_use]
    pub fn add(&self, bytes: &[u8]) -> usize {
        let mut typed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = bytes.len().min(TYPED.saturating_sub(typed.len()));
        typed.extend(&bytes[..taken]);
        taken
    }

    /// Hands the first bytes to `f`, which returns how many it has used.
    fn take(&self, f: impl FnOnce(&[u8]) -> Result<usize, Broken>) -> Result<usize, Broken> {
        let mut typed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let used = f(typed.as_slices().0)?.min(typed.len());
        typed.drain(..used);
        Ok(used)
    }

    fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Console {
    chain: Chain,
    typed: Typed,
    /// When the guest has a terminal for what was typed, if it has not shown that before.
    settled_ns: Option<u64>,
    /// The guest has written something.
    heard: bool,
}

impl Console {
    /// A console on which `typed` is typed.
    #[must_use]
    pub fn new(typed: Typed) -> Self {
        Self { typed, ..Self::default() }
    }

    /// Takes what the guest has written.
    fn listen(&mut self, queue: &mut Queue, ram: &GuestRam, work: &mut Work) -> Result<(), Broken> {
        let mut count = 0;
        loop {
            if count == BATCH {
                work.more = true;
                break;
            }
            if !self.chain.take(queue, ram)? {
                if queue.ready() && queue.enable_notification(ram)? {
                    continue;
                }
                break;
            }
            let begin = work.said.len();
            work.said.resize(begin + self.chain.len().min(MOST), 0);
            let len = self.chain.read(ram, work.said.get_mut(begin..).unwrap_or_default())?;
            work.said.truncate(begin + len);
            self.chain.give_back(queue, ram, 0)?;
            count += 1;
        }
        if count > 0 {
            self.heard = true;
            work.interrupt |= queue.needs_notification(ram)?;
        }
        Ok(())
    }

    /// Gives the guest what was typed.
    fn speak(&mut self, queue: &mut Queue, ram: &GuestRam, work: &mut Work) -> Result<(), Broken> {
        let now = now_ns();
        let settled = *self.settled_ns.get_or_insert(now + SETTLE_NS);
        if !self.heard && now < settled {
            work.at_ns = (!self.typed.is_empty()).then_some(settled);
            return Ok(());
        }
        let mut count = 0;
        while !self.typed.is_empty() {
            if count == BATCH {
                work.more = true;
                break;
            }
            if !self.chain.take(queue, ram)? {
                if queue.ready() && queue.enable_notification(ram)? {
                    continue;
                }
                break;
            }
            let room = self.chain.room();
            let used = self.typed.take(|bytes| {
                let part = &bytes[..bytes.len().min(room)];
                self.chain.write(ram, 0, part)?;
                Ok(part.len())
            })?;
            self.chain.give_back(queue, ram, used)?;
            count += 1;
        }
        if count > 0 {
            work.interrupt |= queue.needs_notification(ram)?;
        }
        Ok(())
    }
}

impl Device for Console {
    fn describe(&self) -> Description {
        // No feature is offered, so nothing of the configuration means anything.
        Description { id: VIRTIO_ID_CONSOLE, queues: &[16, 64], config: [0; 8] }
    }

    fn is_prompt(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        (self.settled_ns, self.heard) = (None, false);
    }

    fn reborn(&mut self) {
        // The parent's guest had one.
        self.heard = true;
    }

    fn work(&mut self, queues: &mut [Queue], ram: &GuestRam) -> Result<Work, Broken> {
        let [input, output] = queues else { return Ok(Work::default()) };
        let mut work = Work::default();
        self.listen(output, ram, &mut work)?;
        self.speak(input, ram, &mut work)?;
        Ok(work)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::driver::{DriverQueue, EVENT_IDX, INDIRECT, Rig, VERSION_1, ram, until};
    use super::*;

    const FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT;

    fn queues() -> (DriverQueue, DriverQueue) {
        (DriverQueue::new(0, 8, &[64], false), DriverQueue::new(1, 8, &[16, 48], false))
    }

    #[test]
    fn what_is_written_is_said_before_the_notification_returns() {
        // Without the devices' thread.
        let rig = Rig::new(Console::default(), Arc::new(ram()));
        let (input, mut output) = queues();
        rig.start(FEATURES, &[&input, &output]);
        for text in ["one line\n", "and another\n"] {
            output.add(&rig.ram, Some(text.as_bytes())).expect("free");
            assert!(output.wants_kick(&rig.ram, true), "each is to be notified of");
            rig.kick(1);
            assert!(output.take(&rig.ram).is_some(), "it is used");
        }
        assert_eq!(rig.said(), b"one line\nand another\n");
        assert!(rig.interrupts.load(Ordering::SeqCst) > 0);
    }

    #[test]
    fn what_is_typed_waits_for_a_buffer_and_stays_with_the_parent() {
        let typed = Typed::default();
        let rig = Rig::new(Console::new(typed.clone()), Arc::new(ram()));
        let (mut input, mut output) = queues();
        rig.start(FEATURES, &[&input, &output]);
        output.add(&rig.ram, Some(b"login: ")).expect("free");
        rig.kick(1);
        let text = [b'x'; 100];
        assert_eq!(typed.add(&text), 100);
        assert_eq!(typed.add(&[0; TYPED]), TYPED - 100, "no more than there is room for");
        input.add(&rig.ram, None).expect("free");
        input.add(&rig.ram, None).expect("free");
        let (saved, memory) = rig.capture(|| {});
        rig.kick(0);
        let got =
            [input.take(&rig.ram), input.take(&rig.ram)].map(|data| data.map(|data| data.len()));
        assert_eq!(got, [Some(64), Some(64)]);

        let own = Typed::default();
        let mut child = Rig::new(Console::new(own.clone()), memory);
        let (mut input, output) = queues();
        input.add(&child.ram, None).expect("free");
        input.add(&child.ram, None).expect("free");
        child.bus.restore(&saved, &child.ram);
        child.go();
        assert_eq!(own.add(b"for the child"), 13);
        child.kick(0);
        until("input", || input.take(&child.ram).is_some_and(|data| data == b"for the child"));
        drop(output);
    }

    #[test]
    fn what_is_typed_before_there_is_a_terminal_waits() {
        let typed = Typed::default();
        let mut rig = Rig::new(Console::new(typed.clone()), Arc::new(ram()));
        assert_eq!(typed.add(b"early"), 5);
        let (mut input, output) = queues();
        let begin = now_ns();
        rig.go();
        rig.start(FEATURES, &[&input, &output]);
        input.add(&rig.ram, None).expect("free");
        rig.kick(0);
        assert!(input.take(&rig.ram).is_none(), "a driver would throw it away");
        // A guest that only listens.
        until("input", || input.take(&rig.ram).is_some_and(|data| data == b"early"));
        assert!(now_ns() - begin >= SETTLE_NS);
    }

    proptest! {
        /// Whatever lies where descriptors and rings are, the device comes to an end.
        #[test]
        fn rings_of_any_contents_do_no_harm(
            bytes in prop::collection::vec(any::<u8>(), 0x200),
            offset in 0_u64..0x9000,
        ) {
            let typed = Typed::default();
            prop_assert_eq!(typed.add(b"something"), 9);
            let rig = Rig::new(Console::new(typed), Arc::new(ram()));
            let (input, mut output) = queues();
            rig.start(FEATURES, &[&input, &output]);
            output.add(&rig.ram, Some(b"login: ")).expect("free");
            rig.kick(1);
            rig.ram.write_slice(&bytes, GuestAddress(0x10_0000 + offset)).expect("in memory");
            rig.ram.write_slice(&bytes, GuestAddress(0x11_0000 + offset)).expect("in memory");
            rig.kick(0);
            rig.kick(1);
        }
    }
}
