//! The fork doorbell, and the proof that it leaves every register alone.
//!
//! All registers hold known patterns when the doorbell is rung, and are compared afterwards, in the
//! parent and in every child. Between the doorbell and the reading of the TSC no memory is touched:
//! the first write to a page after a fork costs a copy, which is not the fork's own time.
#![expect(unsafe_code, reason = "needs all registers at once, which only assembly can have")]
#![expect(
    clippy::too_many_lines,
    reason = "a line per register, twice; a naked function takes no lint"
)]

use core::{
    arch::naked_asm,
    mem::{offset_of, size_of},
};

use guest_abi::port::{FORK, answer};

use crate::port::{self, Words};

/// Result words of a fork: two times, the verdict on the registers, the answer.
pub(crate) const RESULTS: usize = 3 + answer::WORDS / 2;

/// Arithmetic flags: carry, parity, adjust, zero, sign, overflow.
const ARITHMETIC_FLAGS: u64 = 0x8d5;
/// Carry, adjust and overflow set, the others clear: no comparison or addition leaves this.
const FLAGS: u64 = 0x811;
/// All SSE exceptions masked (as at reset), rounding towards zero and flush-to-zero (not so).
const MXCSR: u32 = 0xff80;

/// Registers around one ring of the doorbell.
#[derive(Clone)]
#[repr(C, align(16))]
struct Registers {
    sse: [u128; 16],
    /// rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15.
    general: [u64; 15],
    rsp: u64,
    flags: u64,
    mxcsr: u32,
    padding: u32,
}

/// Positions in [`Registers::general`].
const RAX: usize = 0;
const RDX: usize = 3;
const R8: usize = 7;
const R9: usize = 8;
const R10: usize = 9;
const R11: usize = 10;

#[repr(C, align(16))]
struct Frame {
    load: Registers,
    found: Registers,
    tsc_before: [u32; 2],
    tsc_after: [u32; 2],
}

/// What came of a fork, in this machine.
pub(crate) struct Outcome {
    tsc_before: u64,
    tsc_after: u64,
    registers_survived: bool,
    answer: [u32; answer::WORDS],
}

impl Outcome {
    /// The result words of the operation.
    pub(crate) fn results(&self) -> [u64; RESULTS] {
        let mut results = [0; RESULTS];
        let (times, words) = results.split_at_mut(3);
        times.copy_from_slice(&[
            self.tsc_before,
            self.tsc_after,
            u64::from(self.registers_survived),
        ]);
        for (word, pair) in words.iter_mut().zip(self.answer.chunks_exact(2)) {
            *word = low_high(pair[0], pair[1]);
        }
        results
    }

    /// Whether there was a fork.
    pub(crate) fn succeeded(&self) -> bool {
        self.answer[answer::STATUS] == 0
    }

    /// Whether this machine was made by it.
    pub(crate) fn is_child(&self) -> bool {
        self.answer[answer::ROLE] != 0
    }
}

/// Forks `children` children. Returns in this machine and in each of them.
pub(crate) fn fork(children: u32) -> Outcome {
    let load = patterns(children);
    let mut frame = Frame { found: load.clone(), load, tsc_before: [0; 2], tsc_after: [0; 2] };
    // SAFETY: the frame is exclusively ours, aligned as its type says, and complete; all flags and
    // control bits in it are ones that user mode may set and that mask every SSE exception.
    unsafe { ring(&raw mut frame) };
    let mut words = Words([0; answer::WORDS]);
    port::read_words(FORK, &mut words);
    Outcome {
        tsc_before: low_high(frame.tsc_before[0], frame.tsc_before[1]),
        tsc_after: low_high(frame.tsc_after[0], frame.tsc_after[1]),
        registers_survived: survived(&frame),
        answer: words.0,
    }
}

fn low_high(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// A different value for every register. `rax` and `rdx` carry the doorbell's value and port in
/// the part that the instruction reads, and a pattern above it.
fn patterns(children: u32) -> Registers {
    let mut general = [0; 15];
    for (number, value) in (1_u64..).zip(&mut general) {
        *value = 0x0123_4567_89ab_cdef_u64.wrapping_mul(2 * number + 1).rotate_left(11);
    }
    general[RAX] = general[RAX] & !0xffff_ffff | u64::from(children);
    general[RDX] = general[RDX] & !0xffff | u64::from(FORK);
    let mut sse = [0; 16];
    for (number, value) in (1_u128..).zip(&mut sse) {
        *value = 0x0f1e_2d3c_4b5a_6978_8796_a5b4_c3d2_e1f0_u128.wrapping_mul(2 * number + 1);
    }
    Registers { sse, general, rsp: 0, flags: FLAGS, mxcsr: MXCSR, padding: 0 }
}

/// Whether everything in `found` is what `load` put there, the bookkeeping of [`ring`] undone.
fn survived(frame: &Frame) -> bool {
    let Frame { load, found, .. } = frame;
    let mut expected = load.general;
    // `rax` and `rdx` made room for the TSC: they are found folded into four others, in two
    // different ways each, so that no other value would give the same sums.
    let (rax, rdx) = (load.general[RAX], load.general[RDX]);
    expected[R8] = expected[R8].wrapping_add(rax.wrapping_mul(2));
    expected[R9] = expected[R9].wrapping_add(rax);
    expected[R10] = expected[R10].wrapping_add(rdx.wrapping_mul(2));
    expected[R11] = expected[R11].wrapping_add(rdx);
    found.general == expected
        && found.sse == load.sse
        && found.rsp == load.rsp
        && (found.flags ^ load.flags) & ARITHMETIC_FLAGS == 0
        && found.mxcsr == load.mxcsr
}

/// Loads all registers from `frame`, rings the doorbell, reads the TSC and stores what it finds.
///
/// `rax` and `rdx` of `found` stay as they are: see [`survived`]. Nothing from the loading of the
/// flags to their storing changes them: `lea` adds without touching them.
///
/// # Safety
/// `frame` is valid for reads and writes and aligned, its port is a doorbell, its flags and its
/// MXCSR hold only what user mode may set, with the SSE exceptions masked.
#[unsafe(naked)]
unsafe extern "C" fn ring(frame: *mut Frame) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        // Scratch for the TSC at [rsp + 8], MXCSR to restore at [rsp], frame at [rsp + 16].
        "push rdi",
        "sub rsp, 16",
        "stmxcsr [rsp]",
        "ldmxcsr [rdi + {load} + {mxcsr}]",
        "movdqa xmm0, [rdi + {load} + 0]",
        "movdqa xmm1, [rdi + {load} + 16]",
        "movdqa xmm2, [rdi + {load} + 32]",
        "movdqa xmm3, [rdi + {load} + 48]",
        "movdqa xmm4, [rdi + {load} + 64]",
        "movdqa xmm5, [rdi + {load} + 80]",
        "movdqa xmm6, [rdi + {load} + 96]",
        "movdqa xmm7, [rdi + {load} + 112]",
        "movdqa xmm8, [rdi + {load} + 128]",
        "movdqa xmm9, [rdi + {load} + 144]",
        "movdqa xmm10, [rdi + {load} + 160]",
        "movdqa xmm11, [rdi + {load} + 176]",
        "movdqa xmm12, [rdi + {load} + 192]",
        "movdqa xmm13, [rdi + {load} + 208]",
        "movdqa xmm14, [rdi + {load} + 224]",
        "movdqa xmm15, [rdi + {load} + 240]",
        "mov [rdi + {load} + {rsp}], rsp",
        "mov rbx, [rdi + {load} + {general} + 8]",
        "mov rcx, [rdi + {load} + {general} + 16]",
        "mov rsi, [rdi + {load} + {general} + 32]",
        "mov rbp, [rdi + {load} + {general} + 48]",
        "mov r8, [rdi + {load} + {general} + 56]",
        "mov r9, [rdi + {load} + {general} + 64]",
        "mov r10, [rdi + {load} + {general} + 72]",
        "mov r11, [rdi + {load} + {general} + 80]",
        "mov r12, [rdi + {load} + {general} + 88]",
        "mov r13, [rdi + {load} + {general} + 96]",
        "mov r14, [rdi + {load} + {general} + 104]",
        "mov r15, [rdi + {load} + {general} + 112]",
        "push qword ptr [rdi + {load} + {flags}]",
        "popfq",
        "lfence",
        "rdtsc",
        "mov [rdi + {tsc_before}], eax",
        "mov [rdi + {tsc_before} + 4], edx",
        "mov rax, [rdi + {load} + {general} + 0]",
        "mov rdx, [rdi + {load} + {general} + 24]",
        "mov rdi, [rdi + {load} + {general} + 40]",
        "out dx, eax",
        "lea r8, [r8 + 2 * rax]",
        "lea r9, [r9 + rax]",
        "lea r10, [r10 + 2 * rdx]",
        "lea r11, [r11 + rdx]",
        "rdtsc",
        "mov [rsp + 8], eax",
        "mov [rsp + 12], edx",
        "mov rax, [rsp + 16]",
        "mov [rax + {found} + {rsp}], rsp",
        "pushfq",
        "pop qword ptr [rax + {found} + {flags}]",
        "cld",
        "mov rdx, [rsp + 8]",
        "mov [rax + {tsc_after}], rdx",
        "mov [rax + {found} + {general} + 8], rbx",
        "mov [rax + {found} + {general} + 16], rcx",
        "mov [rax + {found} + {general} + 32], rsi",
        "mov [rax + {found} + {general} + 40], rdi",
        "mov [rax + {found} + {general} + 48], rbp",
        "mov [rax + {found} + {general} + 56], r8",
        "mov [rax + {found} + {general} + 64], r9",
        "mov [rax + {found} + {general} + 72], r10",
        "mov [rax + {found} + {general} + 80], r11",
        "mov [rax + {found} + {general} + 88], r12",
        "mov [rax + {found} + {general} + 96], r13",
        "mov [rax + {found} + {general} + 104], r14",
        "mov [rax + {found} + {general} + 112], r15",
        "movdqa [rax + {found} + 0], xmm0",
        "movdqa [rax + {found} + 16], xmm1",
        "movdqa [rax + {found} + 32], xmm2",
        "movdqa [rax + {found} + 48], xmm3",
        "movdqa [rax + {found} + 64], xmm4",
        "movdqa [rax + {found} + 80], xmm5",
        "movdqa [rax + {found} + 96], xmm6",
        "movdqa [rax + {found} + 112], xmm7",
        "movdqa [rax + {found} + 128], xmm8",
        "movdqa [rax + {found} + 144], xmm9",
        "movdqa [rax + {found} + 160], xmm10",
        "movdqa [rax + {found} + 176], xmm11",
        "movdqa [rax + {found} + 192], xmm12",
        "movdqa [rax + {found} + 208], xmm13",
        "movdqa [rax + {found} + 224], xmm14",
        "movdqa [rax + {found} + 240], xmm15",
        "stmxcsr [rax + {found} + {mxcsr}]",
        "ldmxcsr [rsp]",
        "add rsp, 24",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        load = const offset_of!(Frame, load),
        found = const offset_of!(Frame, found),
        general = const offset_of!(Registers, general),
        rsp = const offset_of!(Registers, rsp),
        flags = const offset_of!(Registers, flags),
        mxcsr = const offset_of!(Registers, mxcsr),
        tsc_before = const offset_of!(Frame, tsc_before),
        tsc_after = const offset_of!(Frame, tsc_after),
    )
}

// `ring` counts on it: the SSE registers come first, and all of them are aligned.
const _: () = {
    assert!(offset_of!(Registers, sse) == 0);
    assert!(offset_of!(Frame, found).is_multiple_of(16));
    assert!(size_of::<Registers>().is_multiple_of(16));
};
