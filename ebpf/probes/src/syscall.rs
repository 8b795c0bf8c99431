//! Calls to KVM: at their functions where the kernel allows it, else among all system calls of the
//! machine. Either costs too much for more than single forks: instances time their own calls.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::{kprobe, kretprobe, raw_tracepoint};
use aya_ebpf::programs::{ProbeContext, RawTracePointContext, RetProbeContext};
use ebpf_common::{EventKind, Kind, Metric};

use crate::begun;
use crate::record::{current, event, ids, is_ours, send, took};

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
    let (pid, tid) = ids();
    if !is_ours(pid) {
        return 0;
    }
    let registers: u64 = ctx.arg(0);
    // SAFETY: the helper copes with every address.
    let request = unsafe { bpf_probe_read_kernel((registers + RSI) as *const u64) };
    if let Ok(request) = request
        && (request >> TYPE_SHIFT) & 0xff == KVMIO
    {
        begun::begin(Kind::Call, (pid, tid), request & 0xff, 0);
    }
    0
}

/// `kvm_vcpu_ioctl` and `kvm_vm_ioctl`.
#[kprobe]
pub fn call_begins(ctx: ProbeContext) -> u32 {
    let (pid, tid) = ids();
    if is_ours(pid) {
        let request: u64 = ctx.arg(1).unwrap_or(0);
        begun::begin(Kind::Call, (pid, tid), request & 0xff, 0);
    }
    0
}

#[kretprobe]
pub fn call_ends(_ctx: RetProbeContext) -> u32 {
    ends();
    0
}

#[raw_tracepoint(tracepoint = "sys_exit")]
pub fn sys_exit(ctx: RawTracePointContext) -> i32 {
    let registers: u64 = ctx.arg(0);
    // SAFETY: the helper copes with every address.
    let number = unsafe { bpf_probe_read_kernel((registers + ORIG_RAX) as *const u64) };
    if number == Ok(IOCTL) {
        ends();
    }
    0
}

#[inline(always)]
fn ends() {
    let (pid, tid) = ids();
    if is_ours(pid)
        && let Some((begun, ns)) = begun::end(Kind::Call, tid)
        && let Some(current) = current()
    {
        let event = event(EventKind::Ioctl, begun.what, 0);
        if begun.what == RUN {
            send(&current, ns, event);
        } else {
            took(&current, Metric::Ioctl, ns, event);
        }
    }
}
