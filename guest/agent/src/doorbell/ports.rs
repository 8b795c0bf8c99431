//! The doorbell of a real machine: x86 port I/O.
#![expect(unsafe_code, reason = "port I/O is assembly, and its permission a call of libc")]

use std::arch::asm;
use std::cell::Cell;
use std::io;

use guest_abi::port::{ANNOUNCE, CLOCK, EXIT, FORK, READY, answer};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

use super::{Doorbell, Words};

/// First port, and how many there are.
const PORTS: (u16, u16) = (0xd00, 0x20);

thread_local! {
    /// The permission belongs to a thread, and whatever it starts inherits it: so only threads that
    /// use the ports, and start no program, have it.
    static OPEN: Cell<bool> = const { Cell::new(false) };
}

/// Ports of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Ports(());

/// That this thread may use the ports.
#[derive(Clone, Copy)]
struct Permission(());

impl Ports {
    /// The ports, if this process may have them.
    ///
    /// # Errors
    ///
    /// It may not: it is not root of a machine, or this kernel has no I/O ports for programs.
    pub fn open() -> io::Result<Self> {
        // On a thread that ends at once: the caller will start programs.
        let tried = std::thread::spawn(|| Self::permit().map(|_| ()));
        tried.join().map_err(|_| io::Error::other("thread that opens ports has panicked"))??;
        Ok(Self(()))
    }

    fn permit() -> io::Result<Permission> {
        if !OPEN.get() {
            permit()?;
            OPEN.set(true);
        }
        Ok(Permission(()))
    }
}

impl Doorbell for Ports {
    fn announce(&self, window_us: u32) -> io::Result<()> {
        write(Self::permit()?, ANNOUNCE, window_us);
        Ok(())
    }

    fn fork(&self) -> io::Result<Words> {
        let permission = Self::permit()?;
        let mut words = [0; answer::WORDS];
        // The answer is for the processor that asked.
        let pinned = Pinned::here()?;
        write(permission, FORK, 1);
        read(permission, FORK, &mut words);
        drop(pinned);
        Ok(words)
    }

    fn ready(&self) -> io::Result<()> {
        write(Self::permit()?, READY, 1);
        Ok(())
    }

    fn exit(&self, code: u8) -> io::Result<()> {
        write(Self::permit()?, EXIT, u32::from(code));
        Ok(())
    }

    fn clock_ns(&self) -> io::Result<u64> {
        let mut words = [0; 2];
        read(Self::permit()?, CLOCK, &mut words);
        let [low, high] = words.map(u64::from);
        match high << 32 | low {
            // Nothing is there, or what there is has no clock.
            0 | u64::MAX => Err(io::ErrorKind::Unsupported.into()),
            ns => Ok(ns),
        }
    }
}

/// This thread stays on its processor, until this goes.
struct Pinned(Option<CpuSet>);

impl Pinned {
    fn here() -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        if allowed.count() < 2 {
            return Ok(Self(None));
        }
        let mut here = CpuSet::new();
        here.set(sched_getcpu());
        sched_setaffinity(None, &here)?;
        Ok(Self(Some(allowed)))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(allowed) = &self.0 {
            // It was allowed before.
            sched_setaffinity(None, allowed).unwrap_or_default();
        }
    }
}

/// Lets this thread use the ports.
fn permit() -> io::Result<()> {
    let (first, count) = PORTS;
    // SAFETY: takes three numbers and touches no memory of ours; what it permits is used by
    // `Permission` alone.
    if unsafe { libc::ioperm(first.into(), count.into(), 1) } == 0 {
        return Ok(());
    }
    let refused = io::Error::last_os_error();
    // SAFETY: as above.
    if unsafe { libc::iopl(3) } == 0 { Ok(()) } else { Err(refused) }
}

fn write(_: Permission, port: u16, value: u32) {
    // SAFETY: this thread may use the port, as the permission shows; the doorbell's ports touch no
    // memory of the machine but by duplicating all of it, which no thread can tell.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}

/// One instruction for all words: each one by itself would be an exit of its own.
fn read(_: Permission, port: u16, words: &mut [u32]) {
    // SAFETY: this thread may use the port, as the permission shows; `rdi` and `rcx` are pointer
    // and length of a slice that is exclusively ours; the direction flag is clear, as the ABI
    // demands.
    unsafe {
        asm!(
            "rep insd",
            in("dx") port,
            inout("rdi") words.as_mut_ptr() => _,
            inout("rcx") words.len() => _,
            options(nostack, preserves_flags)
        );
    }
}
