//! Port instructions. With IOPL 3 they work in CPL 3 and each one leaves the guest.
//!
//! None of the blocks below says `nomem`: the runtime reads and writes guest memory while the vCPU
//! is outside, so the compiler must neither hold back a store nor keep a load across one.
#![expect(unsafe_code, reason = "port instructions exist only as assembly")]

use core::arch::asm;

use guest_abi::port::EXIT;

/// Writes 32 bits to `port`.
pub(crate) fn write(port: u16, value: u32) {
    // SAFETY: the doorbell's registers have no effect on memory that Rust owns, except that the
    // runtime may write the parameter page, which is only ever read by volatile loads; IOPL is 3.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}

/// Writes the low 32 bits of `value` to `port`: what sequence numbers are compared by.
pub(crate) fn write_low(port: u16, value: u64) {
    #[expect(clippy::cast_possible_truncation, reason = "the register is 32 bits wide")]
    write(port, value as u32);
}

/// Writes `bytes` to the 8-bit register `port`, in order.
pub(crate) fn write_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly the bytes of the slice (`rcx` = its length, the direction flag is
    // clear as the calling convention has it); IOPL is 3.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Reads `words.len()` words from `port`.
///
/// A string instruction, because KVM's emulator then asks for all words in one exit (as long as
/// they lie in one page, which the alignment of [`Words`] ensures) instead of one exit each.
pub(crate) fn read_words(port: u16, words: &mut Words) {
    // SAFETY: writes exactly the words of the array (`rcx` = its length, the direction flag is
    // clear as the calling convention has it), which is borrowed exclusively; IOPL is 3.
    unsafe {
        asm!(
            "rep insd",
            in("dx") port,
            inout("rdi") words.0.as_mut_ptr() => _,
            inout("rcx") words.0.len() => _,
            options(nostack, preserves_flags),
        );
    }
}

/// A buffer for the answer to a fork. 96 bytes aligned to 128: it never crosses a page.
#[repr(align(128))]
pub(crate) struct Words(pub(crate) [u32; guest_abi::port::answer::WORDS]);

const _: () = assert!(guest_abi::port::answer::WORDS * 4 <= 128);

/// Stops the instance.
pub(crate) fn exit(code: u32) -> ! {
    loop {
        write(EXIT, code);
    }
}
