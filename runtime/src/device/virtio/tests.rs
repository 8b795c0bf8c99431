//! Registers, queues, and the entropy device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};

use super::driver::{DriverQueue, EVENT_IDX, INDIRECT, Rig, VERSION_1, ram, until};
use super::{Rng, Transport};
use crate::device::virtio::Device;

fn rng() -> Rig {
    Rig::new(Rng::default(), Arc::new(ram()))
}

#[test]
fn a_driver_finds_the_device_and_what_it_offers() {
    let rig = rng();
    assert_eq!(rig.read(reg::VIRTIO_MMIO_MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!((rig.read(reg::VIRTIO_MMIO_VERSION), rig.read(reg::VIRTIO_MMIO_DEVICE_ID)), (2, 4));
    rig.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_DEVICE_FEATURES), 1);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    rig.write(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is one queue");
    let mut nothing = [0; 4];
    rig.bus.read(u64::from(rig.window.start + rig.window.bytes), &mut nothing);
    assert_eq!(nothing, [0xff; 4], "behind the last device");
}

#[test]
fn features_that_were_not_offered_do_not_stay() {
    let rig = rng();
    for features in [VERSION_1 | 1, EVENT_IDX, VERSION_1 << 8] {
        rig.negotiate(features);
        assert_eq!(rig.read(reg::VIRTIO_MMIO_STATUS), 3, "{features:#x}");
        rig.write(reg::VIRTIO_MMIO_STATUS, 3 | 4);
        assert_eq!(rig.read(reg::VIRTIO_MMIO_STATUS), 3, "no driver without features");
    }
    rig.negotiate(VERSION_1 | EVENT_IDX | INDIRECT);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_STATUS), 3 | 8);
}

#[test]
fn a_ring_outside_of_memory_breaks_the_device_until_it_is_reset() {
    let rig = rng();
    rig.negotiate(VERSION_1);
    rig.write(reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
    rig.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    assert!(rig.is_broken());
    assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    rig.write(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_STATUS), 0);
}

/// Gets random bytes through a device, however the driver likes its buffers.
fn draws(features: u64, parts: &[u32], indirect: bool) {
    let mut rig = rng();
    rig.go();
    let mut queue = DriverQueue::new(0, 8, parts, indirect);
    rig.start(VERSION_1 | features, &[&queue]);
    let (mut seen, mut before) = (Vec::new(), 0);
    for round in 0..40 {
        queue.add(&rig.ram, None).expect("free");
        rig.kick(0);
        // Whoever takes the buffer before it is interrupted may not be.
        until("an interrupt", || rig.interrupts.load(Ordering::SeqCst) > before);
        seen.extend(queue.take(&rig.ram));
        assert_eq!(seen.len(), round + 1);
        before = rig.interrupts.load(Ordering::SeqCst);
        assert_eq!(rig.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        rig.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    }
    let bytes: u32 = parts.iter().sum();
    assert!(seen.iter().all(|data| data.len() == bytes as usize));
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 40, "bytes came twice");
}

#[test]
fn random_bytes_come_into_one_buffer() {
    draws(0, &[64], false);
}

#[test]
fn random_bytes_come_into_many_buffers_with_event_idx() {
    draws(EVENT_IDX, &[7, 1, 100, 20], false);
}

#[test]
fn random_bytes_come_into_indirect_buffers() {
    draws(EVENT_IDX | INDIRECT, &[16, 16], true);
}

#[test]
fn a_request_under_way_at_a_fork_is_answered_on_both_sides() {
    let mut parent = rng();
    let mut queue = DriverQueue::new(0, 8, &[64], false);
    parent.start(VERSION_1 | EVENT_IDX, &[&queue]);
    queue.add(&parent.ram, None).expect("free");
    parent.kick(0);
    // The parent's thread has not looked.
    let (saved, memory) = parent.capture(|| ());
    let mut child = Rig::new(Rng::default(), memory);
    child.bus.restore(&saved, &child.ram);
    assert_eq!(child.bus.quiesce().save(), {
        let mut again = saved;
        again.set_generation(1);
        again
    });
    let mut answers = Vec::new();
    for rig in [&mut parent, &mut child] {
        rig.go();
        let mut queue = queue.clone();
        until("the interrupt", || rig.interrupts.load(Ordering::SeqCst) == 1);
        answers.push(queue.take(&rig.ram).expect("the answer"));
        // And the next request, by its notification.
        queue.add(&rig.ram, None).expect("free");
        rig.kick(0);
        until("the next answer", || queue.take(&rig.ram).is_some());
    }
    assert_ne!(answers.first(), answers.get(1), "parent and child drew the same");
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_repeated_in_the_child() {
    let mut parent = rng();
    parent.go();
    let mut queue = DriverQueue::new(0, 8, &[64], false);
    parent.start(VERSION_1, &[&queue]);
    queue.add(&parent.ram, None).expect("free");
    parent.kick(0);
    until("the interrupt", || parent.interrupts.load(Ordering::SeqCst) == 1);
    let (saved, memory) = parent.capture(|| ());
    let mut child = Rig::new(Rng::default(), memory);
    child.bus.restore(&saved, &child.ram);
    child.go();
    until("the interrupt", || child.interrupts.load(Ordering::SeqCst) == 1);
    assert!(queue.take(&child.ram).is_some());
}

#[test]
fn what_the_device_writes_is_marked() {
    let mut rig = rng();
    rig.go();
    let mut queue = DriverQueue::new(0, 8, &[64], false);
    rig.start(VERSION_1, &[&queue]);
    queue.add(&rig.ram, None).expect("free");
    drain(&rig);
    rig.kick(0);
    until("random bytes", || queue.take(&rig.ram).is_some());
    let pages = drain(&rig);
    // The buffer, the used ring; and the available ring, which the driver of this test writes.
    for address in [0x20_0000, queue.used_ring()] {
        let page = usize::try_from(address / 4096).expect("small");
        assert!(pages.contains(&page), "{address:#x} is not among {pages:?}");
    }
}

fn drain(rig: &Rig) -> Vec<usize> {
    let mut pages = Vec::new();
    for region in rig.ram.iter() {
        let region: &MmapRegion<crate::memory::DeviceDirty> = region;
        region.bitmap().drain(|page| pages.push(page));
    }
    pages
}

#[test]
fn registers_that_cannot_be_are_not_restored() {
    let ram = ram();
    let mut transport = Transport::new(Rng::default().describe()).expect("a device");
    let mut queue = DriverQueue::new(0, 8, &[64], false);
    let rig = rng();
    rig.start(VERSION_1, &[&queue]);
    queue.add(&rig.ram, None).expect("free");
    let (saved, _) = rig.capture(|| ());
    assert!(transport.restore(&saved.first(), &ram).is_ok());
    assert!(transport.is_live());
    let mut wrong = saved.first();
    wrong.set_ring(0x7fff_ffff_ffff_f000);
    assert!(transport.restore(&wrong, &ram).is_err());
    assert!(!transport.is_live());
}

#[derive(Clone, Debug)]
enum Move {
    Write(u32, Vec<u8>),
    Read(u32, usize),
    Memory(u64, Vec<u8>),
    Start,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let offset = prop_oneof![4 => (0_u32..64).prop_map(|word| word * 4), 1 => 0_u32..0x1000];
    let value = prop_oneof![
        Just(vec![0; 4]),
        Just(vec![1, 0, 0, 0]),
        Just(vec![0xf, 0, 0, 0]),
        prop::collection::vec(any::<u8>(), 4),
        prop::collection::vec(any::<u8>(), 0..9),
    ];
    let rings = prop_oneof![Just(0x10_0000_u64), Just(0x10_4000), Just(0x10_8000)];
    let place = (rings, 0_u64..64).prop_map(|(ring, at)| ring + at);
    let one = prop_oneof![
        4 => (offset.clone(), value).prop_map(|(at, value)| Move::Write(at, value)),
        1 => (offset, 0_usize..9).prop_map(|(at, len)| Move::Read(at, len)),
        3 => (place, prop::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(at, data)| Move::Memory(at, data)),
        1 => Just(Move::Start),
    ];
    prop::collection::vec(one, 1..60)
}

/// Plays what a driver gone mad does against a device, whose thread has to survive it.
fn play(rig: &Rig, queues: &[&DriverQueue], features: u64, moves: &[Move]) {
    for one in moves {
        match one {
            Move::Write(at, data) => {
                let address = u64::from(rig.window.start + at);
                rig.bus.write(address, data, &rig.ram, &rig.outside());
            }
            Move::Read(at, len) => {
                rig.bus.read(u64::from(rig.window.start + at), &mut vec![0; *len]);
            }
            Move::Memory(at, data) => {
                rig.ram.write_slice(data, GuestAddress(*at)).expect("in memory");
                rig.kick(0);
            }
            Move::Start => rig.start(features, queues),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_driver_does_the_device_can_be_reset_and_used(moves in moves()) {
        let mut rig = rng();
        rig.go();
        let queue = DriverQueue::new(0, 8, &[64], false);
        play(&rig, &[&queue], VERSION_1 | EVENT_IDX | INDIRECT, &moves);
        let (saved, memory) = rig.capture(|| ());
        let child = Rig::new(Rng::default(), memory);
        child.bus.restore(&saved, &child.ram);
        // Sane again.
        let mut queue = DriverQueue::new(0, 8, &[64], false);
        rig.write(reg::VIRTIO_MMIO_STATUS, 0);
        rig.ram.write_slice(&vec![0; 0x1_0000], GuestAddress(0x10_0000)).expect("in memory");
        rig.start(VERSION_1, &[&queue]);
        queue.add(&rig.ram, None).expect("free");
        rig.kick(0);
        until("random bytes", || queue.take(&rig.ram).is_some());
    }
}
