//! One queue over memory that is all the guest's.

use arbitrary::{Arbitrary, Unstructured};
use runtime::device::virtio::fuzz::{Chain, queue};

use crate::machine::{poke, ram};

/// Memory is small, so that random addresses hit.
const MEMORY: usize = 0x4000;
/// The rings lie where memory does, or a little outside of it.
const RINGS: u16 = 0x4800;

#[derive(Arbitrary, Debug)]
struct Guest<'a> {
    size: u8,
    rings: [u16; 3],
    next: (u16, u16),
    event_idx: bool,
    descriptors: Vec<(u16, u8, u8, u8)>,
    heads: Vec<u8>,
    available: u16,
    offset: u16,
    length: u16,
    memory: &'a [u8],
}

/// Takes chains, reads and writes them, and gives them back.
///
/// # Panics
///
/// If more was written than there was room for, or more taken than the queue has.
pub fn run(data: &[u8]) {
    let Ok(guest) = Guest::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let ram = ram(MEMORY);
    poke(&ram, 0, guest.memory);
    let [desc, avail, used] = guest.rings.map(|at| u64::from(at % RINGS));
    for (index, (address, len, flags, next)) in (0_u64..).zip(&guest.descriptors) {
        let mut bytes = u64::from(*address).to_le_bytes().to_vec();
        // Short ones most of the time.
        let len = if *len == u8::MAX { u32::MAX } else { u32::from(*len) * 16 };
        bytes.extend(len.to_le_bytes());
        bytes.extend(u16::from(*flags & 7).to_le_bytes());
        bytes.extend(u16::from(*next).to_le_bytes());
        poke(&ram, desc.saturating_add(index * 16), &bytes);
    }
    for (index, head) in (0_u64..).zip(&guest.heads) {
        poke(&ram, avail + 4 + index * 2, &u16::from(*head).to_le_bytes());
    }
    poke(&ram, avail + 2, &guest.available.to_le_bytes());
    let size = 1 << (guest.size % 8);
    let Some(mut queue) = queue(size, [desc, avail, used], guest.next, guest.event_idx) else {
        return;
    };
    let mut chain = Chain::default();
    let mut bytes = vec![0; usize::from(guest.length)];
    for _ in 0..=u32::from(size) {
        match chain.take(&mut queue, &ram) {
            Err(_) | Ok(false) => break,
            Ok(true) => {}
        }
        if let Ok(count) = chain.read(&ram, &mut bytes) {
            assert!(count <= bytes.len());
        }
        let offset = usize::from(guest.offset);
        let written = chain.write(&ram, offset, &bytes).is_ok();
        // Nothing at all fits everywhere.
        assert!(!written || bytes.is_empty() || offset + bytes.len() <= chain.room());
        if chain.give_back(&mut queue, &ram, bytes.len()).is_err() {
            break;
        }
    }
}
