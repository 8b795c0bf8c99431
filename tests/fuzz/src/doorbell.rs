//! The doorbell's ports, and the parameter pages of a bare guest.

use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use guest_abi::port::answer;
use guest_agent::doorbell::Outcome;
use runtime::device::Answer;
use runtime::fork::Identity;
use runtime::instance::fuzz::{doorbell, parameters};
use runtime::memory::GuestRam;

use crate::machine::{poke, ram};

/// Kept from one input to the next: it is large.
static RAM: OnceLock<Arc<GuestRam>> = OnceLock::new();

#[derive(Arbitrary, Debug)]
struct Guest<'a> {
    writes: Vec<(u8, &'a [u8])>,
    page: &'a [u8],
    vcpu: u8,
    children: u8,
    failed: Option<(i32, u32)>,
    reads: Vec<u8>,
}

/// Writes to ports, leaves a parameter page, and reads an answer in pieces.
///
/// # Panics
///
/// If there are more results than a page has.
pub fn run(data: &[u8]) {
    let Ok(guest) = Guest::arbitrary_take_rest(Unstructured::new(data)) else { return };
    for (port, bytes) in &guest.writes {
        drop(doorbell(0xd00 + u16::from(*port), bytes));
    }
    let ram = RAM.get_or_init(|| ram(1 << 20));
    poke(ram, guest_abi::entry::param_page(u64::from(guest.vcpu % 16)), guest.page);
    let (_, results) = parameters(ram, guest.vcpu.into());
    assert!(results.len() <= guest_abi::param::RESULTS);
    let own = Identity { uuid: [1; 16], generation: 7, entropy: [9; 32], vm_generation: [5; 16] };
    let children: Vec<_> =
        (0..guest.children).map(|child| Identity { uuid: [child; 16], ..own }).collect();
    let mut answer = Answer::parent(&own, &children);
    answer.conclude(guest.failed.map(|(errno, step)| Answer::failed(&own, errno, step)));
    for len in guest.reads {
        answer.read(&mut vec![0; len.into()]);
    }
    // What the agent makes of an answer that is none.
    let mut words = [0; answer::WORDS];
    for (word, bytes) in words.iter_mut().zip(guest.page.chunks_exact(4)) {
        *word = bytes.try_into().map_or(0, u32::from_le_bytes);
    }
    drop(Outcome::of(&words));
}
