//! Calls to KVM, among all system calls of the machine, which costs too much for more than single
//! forks: instances time their own calls.
//!
//! Not by kprobes at KVM's functions, where they are allowed: the kernel keeps a few returns only
//! (twice the processors, 10 at least: `register_kretprobe` in kernel/kprobes.c), each vCPU that is in
//! its guest holds one, and with none left ends are missed. More of them can be had through tracefs
//! alone, where what a killed loader made would stay.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf_common::{EventKind, Kind, Metric};

use crate::begun;
use crate::record::{current, event, send, this, took};

const IOCTL: u64 = 16;
/// The type of KVM's request numbers, and where it lies in them.
const KVMIO: u64 = 0xae;
const TYPE_SHIFT: u64 = 8;
/// The number of `KVM_RUN`: its time is the guest's.
const RUN: u64 = 0x80;
/// Where `struct pt_regs` has the second argument of a system call.
const RSI: u64 = 13 * 8;
/// And its number.
const ORIG_RAX: u64 = 15 * 8;

#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn sys_enter(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<u64>(1) != IOCTL {
        return 0;
    }
    let Some(thread) = this() else { return 0 };
    let registers: u64 = ctx.arg(0);
    // SAFETY: the helper copes with every address.
    let request = unsafe { bpf_probe_read_kernel((registers + RSI) as *const u64) };
    if let Ok(request) = request
        && (request >> TYPE_SHIFT) & 0xff == KVMIO
    {
        begun::begin(thread, Kind::Call, request & 0xff, 0);
    }
    0
}

#[raw_tracepoint(tracepoint = "sys_exit")]
pub fn sys_exit(ctx: RawTracePointContext) -> i32 {
    let registers: u64 = ctx.arg(0);
    // SAFETY: the helper copes with every address.
    let number = unsafe { bpf_probe_read_kernel((registers + ORIG_RAX) as *const u64) };
    if number == Ok(IOCTL)
        && let Some(thread) = this()
        && let Some(call) = begun::end(thread, Kind::Call)
    {
        let current = current(thread, call.now);
        let event = event(EventKind::Ioctl, call.what, 0);
        if call.what == RUN {
            send(thread, &current, call.ns, event);
        } else {
            took(thread, &current, Metric::Ioctl, call.ns, event);
        }
    }
    0
}
