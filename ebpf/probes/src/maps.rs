//! The maps, and the constants that the loader sets.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use ebpf_common::{Cell, CellKey, Settings, Thread, lost};

/// Processes of ours, each with the address of its [`Beacon`](ebpf_common::Beacon), 0 if that is not
/// known: who is forked by one is ours too.
#[map]
pub static PROCESSES: HashMap<u32, u64> = HashMap::with_max_entries(32768, 0);

/// Their threads: whoever is among them is ours, which takes one look, whatever it is for.
#[map]
pub static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(32768, 0);

/// What the loader says to all programs: one line of the processor's memory.
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// What a new thread begins with, on each processor: too large for the stack. Written by one program, in
/// whoever forks.
#[map]
pub static BLANK: PerCpuArray<Thread> = PerCpuArray::with_max_entries(1, 0);

/// The histograms, bucket by bucket; the loader says how many. All memory is taken at once: a new
/// bucket costs 20 us where memory for it is looked for first.
#[map]
pub static CELLS: PerCpuHashMap<CellKey, Cell> = PerCpuHashMap::with_max_entries(65536, 0);

/// Where it is sent.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// What there was no room for.
#[map]
pub static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(lost::SLOTS, 0);

/// Offsets in the kernel's `task_struct`: the thread's id and the process's.
#[unsafe(no_mangle)]
static TASK_PID: u32 = 0;
#[unsafe(no_mangle)]
static TASK_TGID: u32 = 0;
/// Not 0: the end of a page fault is seen, so that it can be timed.
#[unsafe(no_mangle)]
static FAULTS_END: u32 = 0;

/// A constant that the loader has put into the object's read-only data.
macro_rules! constant {
    ($name:ident, $static:ident) => {
        #[inline(always)]
        pub fn $name() -> u32 {
            // SAFETY: a static; volatile, as the compiler would take it for the 0 it sees.
            unsafe { core::ptr::read_volatile(&raw const $static) }
        }
    };
}

constant!(task_pid, TASK_PID);
constant!(task_tgid, TASK_TGID);
constant!(faults_end, FAULTS_END);

/// What the loader has said.
#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// Counts something that there was no room for.
#[inline(always)]
pub fn lose(slot: u32) {
    if let Some(count) = LOST.get_ptr_mut(slot) {
        // SAFETY: this processor's own slot.
        unsafe { *count += 1 };
    }
}
