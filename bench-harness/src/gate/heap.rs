//! An allocator that can make every allocation visible to a tracer.
//!
//! It is the allocator of the executable: instances are the same program, so their forks are
//! counted too. A process marks from its start or never; while it does not, an allocation costs one
//! load more.
#![expect(unsafe_code, reason = "a global allocator, and a marking system call")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};

/// Environment variable that asks instances to mark.
pub const ASK: &str = "UKP_MARK_ALLOCATIONS";

/// Address in the marking call `madvise(MARK, 0, MADV_NORMAL)`. Of zero pages, that is a call which
/// succeeds, does nothing, and leaves errno alone; nobody else advises on this address.
pub const MARK: usize = 0xa110_c000;

static MARKING: AtomicBool = AtomicBool::new(false);

/// The system's allocator, with a mark for each allocation if that was asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marking;

/// Marks from here on if this process is an instance and its environment asks for it. To be called
/// first in `main`.
pub fn mark_if_asked() {
    let instance = std::env::args_os().nth(1).is_some_and(|word| word == "__instance");
    if instance && std::env::var_os(ASK).is_some() {
        MARKING.store(true, Ordering::Relaxed);
    }
}

fn mark() {
    if MARKING.load(Ordering::Relaxed) {
        // SAFETY: advice on an empty range changes nothing, whatever lies there.
        unsafe { libc::madvise(MARK as *mut libc::c_void, 0, libc::MADV_NORMAL) };
    }
}

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract;
// marking neither allocates nor unwinds.
unsafe impl GlobalAlloc for Marking {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        mark();
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        mark();
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller got `pointer` from us with this layout, and we from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        mark();
        // SAFETY: the caller got `pointer` from us with this layout, and we from `System`.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}
