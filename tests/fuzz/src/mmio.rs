//! A driver gone mad: any access of any register, and any memory behind it.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use runtime::device::virtio::fuzz::Board;
use uuid::Uuid;

use crate::machine::{folder, poke, ram};

const MEMORY: usize = 0x1_0000;
const MOST: usize = 200;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// An aligned word, as drivers write it.
    Word {
        device: bool,
        register: u8,
        value: u32,
    },
    /// The same, with a value that means something in many registers.
    Small {
        device: bool,
        register: u8,
        value: u8,
    },
    Write {
        device: u8,
        offset: u16,
        bytes: &'a [u8],
    },
    Read {
        device: u8,
        offset: u16,
        len: u8,
    },
    Memory {
        at: u16,
        bytes: &'a [u8],
    },
    /// What a driver does until it has a queue.
    Queue {
        device: bool,
        queue: u8,
        size: u8,
        rings: [u8; 3],
    },
    Start {
        device: bool,
        features: u8,
    },
    Work,
    Fork,
}

/// Registers and what is in them (virtio 1.2, section 4.2.2).
const STATUS: u64 = 0x70;

/// Plays the steps, and sees that devices come to an end each time.
///
/// # Panics
///
/// If one does not, or does not start again after a reset.
pub fn run(data: &[u8]) {
    let mut rest = Unstructured::new(data);
    let ram = ram(MEMORY);
    let uuid = Uuid::from_u128(1);
    let mut board = Board::new(&folder(), uuid, Arc::clone(&ram)).expect("devices");
    for _ in 0..MOST {
        if rest.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut rest) else { break };
        play(&mut board, &step, &ram);
    }
    // Whatever it was: a reset is the beginning.
    for device in 0..2 {
        write(&board, device, STATUS, 0);
        assert_eq!(read(&board, device, STATUS), 0);
        for status in [1, 3] {
            write(&board, device, STATUS, status);
        }
        assert_eq!(read(&board, device, STATUS), 3);
    }
    assert!(board.work(), "it still works");
}

fn play(board: &mut Board, step: &Step<'_>, ram: &Arc<runtime::memory::GuestRam>) {
    match step {
        Step::Word { device, register, value } => {
            write(board, (*device).into(), u64::from(register % 64) * 4, *value);
        }
        Step::Small { device, register, value } => {
            write(board, (*device).into(), u64::from(register % 64) * 4, (*value).into());
        }
        Step::Write { device, offset, bytes } => {
            let bytes = bytes.get(..8).unwrap_or(bytes);
            board.write(address(board, device % 3, (*offset).into()), bytes);
        }
        Step::Read { device, offset, len } => {
            let mut bytes = vec![0; usize::from(len % 9)];
            board.read(address(board, device % 3, (*offset).into()), &mut bytes);
        }
        Step::Memory { at, bytes } => poke(ram, (*at).into(), bytes),
        Step::Queue { device, queue, size, rings } => {
            let device = u8::from(*device);
            write(board, device, 0x30, (queue % 4).into());
            write(board, device, 0x38, 1 << (size % 8));
            for (register, ring) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
                write(board, device, register, u32::from(*ring) * 0x100);
                write(board, device, register + 4, 0);
            }
            write(board, device, 0x44, 1);
        }
        Step::Start { device, features } => {
            let device = u8::from(*device);
            for status in [0, 1, 3] {
                write(board, device, STATUS, status);
            }
            // Version 1 and, as it likes, event indexes and indirect descriptors.
            for (page, word) in [(0, u32::from(features & 3) << 28), (1, 1)] {
                write(board, device, 0x24, page);
                write(board, device, 0x20, word);
            }
            write(board, device, STATUS, 3 | 8 | 4);
        }
        Step::Work => assert!(board.work(), "it works without end"),
        Step::Fork => {
            let saved = board.save();
            board.restore(&saved);
        }
    }
}

fn address(board: &Board, device: u8, offset: u64) -> u64 {
    // Behind the last device there is none.
    let window = board.window(device.into()).map(|window| u64::from(window.start));
    window.unwrap_or(0xd000_2000) + offset
}

fn write(board: &Board, device: u8, register: u64, value: u32) {
    board.write(address(board, device, register), &value.to_le_bytes());
}

fn read(board: &Board, device: u8, register: u64) -> u32 {
    let mut word = [0; 4];
    board.read(address(board, device, register), &mut word);
    u32::from_le_bytes(word)
}
