//! The maps, and the constants that the loader sets.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use ebpf_common::{Begun, Cell, CellKey, Tracked, lost};

/// Processes of ours.
#[map]
pub static PROCESSES: HashMap<u32, Tracked> = HashMap::with_max_entries(32768, 0);

/// The histograms, bucket by bucket. All memory is taken at once: a new bucket, of which each fork
/// has some, costs 20 us where memory for it is looked for first.
#[map]
pub static CELLS: PerCpuHashMap<CellKey, Cell> = PerCpuHashMap::with_max_entries(65536, 0);

/// What a thread waits for the end of.
#[map]
pub static BEGUN: HashMap<u64, Begun> = HashMap::with_max_entries(32768, 0);

/// Events of processes that are traced.
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

/// Counts something that there was no room for.
#[inline(always)]
pub fn lose(slot: u32) {
    if let Some(count) = LOST.get_ptr_mut(slot) {
        // SAFETY: this processor's own slot.
        unsafe { *count += 1 };
    }
}
