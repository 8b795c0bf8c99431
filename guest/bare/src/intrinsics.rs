//! The memory functions that compiled code calls by name. On this target they come from the C
//! library, which is not there.
//!
//! String instructions rather than loops: the compiler recognises a copy loop and would replace it
//! by a call to the very function that it is in.
#![expect(unsafe_code, reason = "defines symbols that the compiler calls with raw pointers")]

use core::arch::asm;

/// `memcpy(3)`.
///
/// # Safety
/// `to` is valid for writes and `from` for reads of `len` bytes, and they do not overlap.
// SAFETY: does what the C standard says of this name; no C library is linked that has it too.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear.
    unsafe {
        asm!(
            "rep movsb",
            inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// `memmove(3)`.
///
/// # Safety
/// `to` is valid for writes and `from` for reads of `len` bytes.
// SAFETY: does what the C standard says of this name; no C library is linked that has it too.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: the caller vouches for both ranges, and `to` does not start inside `from`, so
        // that copying upwards reads every byte before it is overwritten.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller vouches for both ranges, which here are not empty; the direction flag is
    // set for this one copy, downwards from the last byte, and cleared again.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            inout("rcx") len => _,
            options(nostack),
        );
    }
    to
}

/// `memset(3)`.
///
/// # Safety
/// `to` is valid for writes of `len` bytes.
// SAFETY: does what the C standard says of this name; no C library is linked that has it too.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear.
    unsafe {
        asm!(
            "rep stosb",
            inout("rdi") to => _, inout("rcx") len => _, in("eax") byte,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// `memcmp(3)`.
///
/// # Safety
/// `left` and `right` are valid for reads of `len` bytes.
// SAFETY: does what the C standard says of this name; no C library is linked that has it too.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for offset in 0..len {
        // SAFETY: the caller vouches for `len` bytes from `left` on.
        let a = unsafe { left.wrapping_add(offset).read() };
        // SAFETY: the caller vouches for `len` bytes from `right` on.
        let b = unsafe { right.wrapping_add(offset).read() };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// `bcmp(3)`.
///
/// # Safety
/// `left` and `right` are valid for reads of `len` bytes.
// SAFETY: does what the C standard says of this name; no C library is linked that has it too.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the caller vouches for the same ranges.
    unsafe { memcmp(left, right, len) }
}
