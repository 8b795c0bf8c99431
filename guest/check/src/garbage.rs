//! A machine gone mad: garbage for every register of every device.
//!
//! ```text
//!   begins    a line on the console: from here on nothing is sure
//!   devices   virtio, serial line, doorbell, power: all but what would end the machine
//!   all       every port, and the interrupt controllers
//!   (end)     the doorbell's exit, with more bits than a code has
//! ```
//!
//! The lines go to the serial line past the kernel, whose driver no longer knows its device.
#![expect(unsafe_code, reason = "device registers are reached by assembly and by mapped addresses")]

use std::arch::asm;
use std::fs::OpenOptions;
use std::io;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use guest_abi::port;
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Where virtio devices lie, and how much is looked at: there are fewer.
const VIRTIO: (u64, usize) = (0xd000_0000, 0x8000);
/// The interrupt controllers.
const IOAPIC: (u64, usize) = (0xfec0_0000, 0x1000);
const LAPIC: (u64, usize) = (0xfee0_0000, 0x1000);
/// The serial line, and registers of power management.
const SERIAL: u16 = 0x3f8;
const RESET: u16 = 0xd80;
const SLEEP: u16 = 0xd84;
/// What the machine ends with.
pub const CODE: u32 = 77;

/// Random numbers (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn word(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.next().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    fn below(&mut self, most: u16) -> u16 {
        let [.., a, b] = self.next().to_le_bytes();
        u16::from_le_bytes([a, b]) % most.max(1)
    }
}

/// Writes garbage, `count` times to each part, and ends the machine.
pub fn write(count: u32) -> Result<()> {
    // SAFETY: takes a number and touches no memory of ours.
    if unsafe { libc::iopl(3) } != 0 {
        return Err(io::Error::last_os_error()).context("asking for all ports");
    }
    let (virtio, ioapic, lapic) = (Window::map(VIRTIO)?, Window::map(IOAPIC)?, Window::map(LAPIC)?);
    let mut random = Random(0x1234_5678_9abc_def1);
    say("begins");
    for _ in 0..count {
        virtio.touch(&mut random);
        let port = match random.below(3) {
            0 => SERIAL + random.below(8),
            1 => port::FORK + random.below(0x20),
            _ => RESET + random.below(8),
        };
        touch(port, &mut random);
    }
    say("devices");
    for _ in 0..count {
        touch(random.below(u16::MAX), &mut random);
        ioapic.touch(&mut random);
        lapic.touch(&mut random);
    }
    say("all");
    out_word(port::EXIT, 0xdead_0000 | CODE);
    Ok(())
}

/// Reads or writes a port, unless that is meant to end or to stop the machine.
fn touch(port: u16, random: &mut Random) {
    let value = random.word();
    let value = match port {
        port::EXIT => return,
        // A fork of so many is refused, and parks and pauses are short.
        port::FORK => value | 1 << 31,
        port::PARK => value | 1,
        port::PAUSE => value & 0x3ff,
        RESET | SLEEP => 0x40,
        _ => value,
    };
    let [low, next, ..] = value.to_le_bytes();
    // The lowest bits of a number of children may well be one.
    let ways = if port == port::FORK { 2..4 } else { 0..6 };
    match ways.start + random.below(ways.end - ways.start) {
        0 => out_byte(port, low),
        1 => out_half(port, u16::from_le_bytes([low, next])),
        2 => out_word(port, value),
        3 => drop(in_byte(port)),
        4 => drop(in_half(port)),
        _ => drop(in_word(port)),
    }
}

/// Registers in memory.
struct Window {
    start: NonNull<u8>,
    bytes: usize,
}

impl Window {
    fn map((address, bytes): (u64, usize)) -> Result<Self> {
        let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, rights, flags, &memory, address) };
        let start = start.with_context(|| format!("mapping {address:#x}: iomem=relaxed?"))?;
        Ok(Self { start: NonNull::new(start.cast()).context("an address")?, bytes })
    }

    /// Reads or writes somewhere, in one of four sizes; now and then a register that a driver uses.
    fn touch(&self, random: &mut Random) {
        let size = 1_usize << random.below(4);
        let at = usize::from(random.below(u16::try_from(self.bytes).unwrap_or(u16::MAX)));
        let at = if random.below(2) == 0 { at & !0xf00 } else { at } & !(size - 1);
        let value = random.next() >> (random.below(2) * 56);
        // SAFETY: inside the mapping, which is a multiple of the sizes long.
        let place = unsafe { self.start.add(at) };
        let reads = random.below(4) == 0;
        let [a, b, c, d, ..] = value.to_le_bytes();
        match (reads, size) {
            (true, _) => {
                // SAFETY: mapped for the life of the process; reading a register may do anything to
                // this machine, and nothing to this program.
                unsafe { place.read_volatile() };
            }
            (false, 1) => {
                // SAFETY: as above; aligned.
                unsafe { place.write_volatile(a) };
            }
            (false, 2) => {
                // SAFETY: as above; aligned.
                unsafe { place.cast::<u16>().write_volatile(u16::from_le_bytes([a, b])) };
            }
            (false, 4) => {
                // SAFETY: as above; aligned.
                unsafe { place.cast::<u32>().write_volatile(u32::from_le_bytes([a, b, c, d])) };
            }
            (false, _) => {
                // SAFETY: as above; aligned.
                unsafe { place.cast::<u64>().write_volatile(value) };
            }
        }
    }
}

/// Says a line on the serial line, which is set up anew.
fn say(what: &str) {
    // No interrupts, no loop, eight bits.
    for (register, value) in [(1, 0), (4, 0), (3, 3)] {
        out_byte(SERIAL + register, value);
    }
    for byte in format!("\n@garbage {what}\n").bytes() {
        out_byte(SERIAL, byte);
    }
}

fn out_byte(port: u16, value: u8) {
    // SAFETY: permitted by iopl(2); no memory of ours is touched.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn out_half(port: u16, value: u16) {
    // SAFETY: as in `out_byte`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

fn out_word(port: u16, value: u32) {
    // SAFETY: as in `out_byte`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

fn in_byte(port: u16) -> u8 {
    let value;
    // SAFETY: as in `out_byte`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

fn in_half(port: u16) -> u16 {
    let value;
    // SAFETY: as in `out_byte`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) };
    value
}

fn in_word(port: u16) -> u32 {
    let value;
    // SAFETY: as in `out_byte`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}
