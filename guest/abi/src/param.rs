//! The parameter page: a small program that the harness asks a vCPU to run, and its results.
//!
//! The guest waits at [`crate::port::PARK`] until [`Header::seq`] changes, runs the steps from the
//! first on until [`op::END`], writes results, and rings [`crate::port::DONE`] with the sequence
//! number. All fields are little-endian. After a fork both machines go on with the step after it.

use core::mem::offset_of;

/// Steps of one program.
pub const STEPS: usize = 40;
/// Result words of one program.
pub const RESULTS: usize = 192;

/// First part of the page, written by the runtime.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Header {
    /// Sequence number of the program; 0 before the first.
    pub seq: u64,
    /// First address that the guest may use freely (page aligned, behind the ELF).
    pub work_start: u64,
    /// Number of pages from `work_start` on, counted over the hole (see
    /// [`crate::entry::ram_page`]).
    pub work_pages: u64,
    /// Guest TSC frequency in kHz.
    pub tsc_khz: u64,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Zero.
    pub reserved: [u64; 3],
}

/// One step of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Step {
    /// What to do, see [`op`].
    pub op: u32,
    /// Who does it, see [`who`]; others skip the step.
    pub who: u16,
    /// Index of the first result word that this step writes.
    pub result: u16,
    /// Arguments, see [`op`].
    pub args: [u64; 4],
}

/// A parameter page, exactly one page long.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(4096))]
pub struct ParamPage {
    /// Written by the runtime.
    pub header: Header,
    /// Written by the runtime.
    pub steps: [Step; STEPS],
    /// Written by the guest.
    pub results: [u64; RESULTS],
    /// Zero.
    pub reserved: [u64; 112],
}

// Guests in other languages are written against these numbers (ABI.md).
const _: () = {
    assert!(size_of::<ParamPage>() == 4096);
    assert!(size_of::<Header>() == 64);
    assert!(offset_of!(Header, seq) == 0);
    assert!(offset_of!(Header, work_start) == 8);
    assert!(offset_of!(Header, work_pages) == 16);
    assert!(offset_of!(Header, tsc_khz) == 24);
    assert!(offset_of!(Header, vcpus) == 32);
    assert!(size_of::<Step>() == 40);
    assert!(offset_of!(Step, op) == 0);
    assert!(offset_of!(Step, who) == 4);
    assert!(offset_of!(Step, result) == 6);
    assert!(offset_of!(Step, args) == 8);
    assert!(offset_of!(ParamPage, header) == 0);
    assert!(offset_of!(ParamPage, steps) == 64);
    assert!(offset_of!(ParamPage, results) == 1664);
    assert!(offset_of!(ParamPage, reserved) == 3200);
};

/// Who runs a step, seen from the last fork *in this program*.
pub mod who {
    /// The machine that has not forked yet in this program, or was the parent of its last fork.
    pub const PARENT: u16 = 1;
    /// The machine that was made by the last fork.
    pub const CHILD: u16 = 2;
    /// Both.
    pub const ALL: u16 = 3;
}

/// Operations. `a`, `b`, `c`, `d` are `args[0..4]`, `r` is the step's first result word.
///
/// A page number counts from `work_start`. Page contents are those of [`crate::pattern`].
pub mod op {
    /// End of the program.
    pub const END: u32 = 0;
    /// Writes the base pattern with seed `a` to all work pages. `r` = pages written.
    pub const FILL: u32 = 1;
    /// Dirties `a` pages with generation `b`: the pages `c, c + d, …` (`d` = stride, wrapping).
    pub const DIRTY_STRIDE: u32 = 2;
    /// Dirties `a` random pages with generation `b`: those of `pattern::Pages::new(c, pages)`,
    /// among the first `d` work pages (all if 0).
    pub const DIRTY_RANDOM: u32 = 3;
    /// Sums [`crate::pattern::page_sum`] over `a` random pages picked by seed `c` (repetition
    /// counts twice); over all pages if `a` is 0. `r` = sum.
    pub const CHECK: u32 = 4;
    /// Forks `a` children, announcing it `b` µs ahead by [`crate::port::ANNOUNCE`] if `b` is not 0
    /// and then waiting `c` TSC ticks. `r` = TSC before the doorbell, `r+1` = TSC after it, `r+2`
    /// = 1 if every general and SSE register survived, else 0, `r+3..r+15` = the 24 answer words.
    pub const FORK: u32 = 5;
    /// Reads the TSC for `a` ticks. `r` = largest gap between two readings, `r+1` = smallest
    /// (negative steps show as a huge gap), `r+2` = number of readings, `r+3` = last reading.
    pub const SPIN: u32 = 6;
    /// For `a` ticks dirties random pages (seed `c`, generation `b`) at `d` pages a second.
    /// `r` = pages dirtied, `r+1` = ticks in which the guest was behind its schedule.
    pub const RATE: u32 = 7;
    /// `c` times over: adds 1 to one word of every page of the `b` pages from page `a` on; the
    /// word is [`crate::pattern::WORK_WORD`]. `r` = ticks of the first pass, `r+1` = ticks of all.
    pub const WORK: u32 = 8;
    /// Stops the instance with exit code `a`.
    pub const EXIT: u32 = 9;
    /// Goes to step `a` if this step was reached fewer than `b` times in this program.
    pub const LOOP: u32 = 10;
    /// `r` = the word at address `a`.
    pub const PEEK: u32 = 11;
    /// Writes `b` to address `a`.
    pub const POKE: u32 = 12;
    /// `r` = TSC, `r+1` = kvmclock in nanoseconds, `r+2` = TSC again.
    pub const CLOCK: u32 = 13;
    /// Writes the `b` (at most 8) bytes in `a` to the console.
    pub const PRINT: u32 = 14;
    /// Blocks the vCPU for `a` µs by [`crate::port::PAUSE`].
    pub const PAUSE: u32 = 15;
    /// Spins for `a` ticks adding 1 to the word at address `b`. `r` = its last value.
    pub const COUNT: u32 = 16;
    /// Writes [`crate::port::READY`].
    pub const READY: u32 = 17;
}
