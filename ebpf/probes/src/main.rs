//! The programs that run in the kernel.
//!
//! ```text
//!   begins                          ends                                counted as
//!   page_fault_user, _kernel  ──>   minor-faults, major-faults          guest_…, own_…
//!   kvm_mmu_pagetable_walk    ──>   kvm_mmu_set_spte                    kvm_fault
//!   kvm_page_fault            ──>   kvm_entry                           kvm_fault
//!   sched_waking              ──>   sched_switch                        off_cpu
//!   sys_enter (ioctl)         ──>   sys_exit                            ioctl
//!                                   kvm_userspace_exit                  none of these
//!   ukp:stage                                                           (sent, not counted)
//! ```
//!
//! What begins is kept by thread ([`maps::THREADS`]), and so are the first values of a process that
//! is new; others go to a bucket of its process, role and metric ([`maps::CELLS`]). To user space
//! they are sent one by one only on demand. A process is ours if it is registered or was forked by one
//! that is ([`process`]); its threads have entries from their birth, so that one look at these tells whose a
//! moment is. Programs that cannot be attached on a host leave the others alone.
#![no_std]
#![no_main]
#![expect(clippy::inline_always, reason = "older kernels take no function calls in all programs")]
#![expect(clippy::cast_possible_truncation, reason = "ids and kinds come in wider words")]
#![expect(clippy::needless_pass_by_value, reason = "the macros pass contexts so")]
#![expect(clippy::needless_borrows_for_generic_args, reason = "a map reads its keys in place")]
#![expect(unsafe_code, reason = "maps and helpers of the kernel are unsafe to use")]

mod begun;
mod fault;
mod kvm;
mod maps;
mod process;
mod record;
mod sched;
mod stage;
mod syscall;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lends the helpers that tracing needs to programs under this licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
