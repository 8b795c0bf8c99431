//! Machine state at the guest's entry point, and the memory map below the ELF.
//!
//! | at entry | value |
//! | --- | --- |
//! | mode | long mode, CPL 3, IOPL 3, `RFLAGS.IF` = 0 |
//! | paging | identity, 2 MiB pages, all of guest RAM, writable and user-accessible |
//! | `rdi` | address of this vCPU's parameter page |
//! | `rsi` | vCPU index, the boot vCPU is 0 |
//! | `rsp` | top of this vCPU's stack, 16-byte aligned minus 8 as after a call |
//! | SSE | enabled (`CR4.OSFXSR`, `CR4.OSXMMEXCPT`) |
//! | IDT | empty: an exception or an interrupt stops the instance |
//!
//! Guest RAM is `[0, low)` and, for what does not fit below [`HOLE_START`], `[HOLE_END, …)`.

/// Most vCPUs that a bare guest may have.
pub const MAX_VCPUS: u64 = 16;
/// Global descriptor table.
pub const GDT: u64 = 0x6000;
/// Task state segment.
pub const TSS: u64 = 0x7000;
/// Empty interrupt descriptor table.
pub const IDT: u64 = 0x8000;
/// Parameter page of vCPU 0; vCPU `v` has the `v`-th page from here.
pub const PARAM: u64 = 0x9000;
/// kvmclock (`pvclock_vcpu_time_info`, 32 bytes) of vCPU 0; vCPU `v` has it [`CLOCK_STRIDE`]` * v`
/// further on.
pub const CLOCK: u64 = 0x1_9000;
/// Distance between the kvmclock areas of two vCPUs.
pub const CLOCK_STRIDE: u64 = 64;
/// Root page table; the PDPT and up to 64 page directories follow.
pub const PML4: u64 = 0x2_0000;
/// Stack of vCPU 0, growing down from `STACKS + STACK_BYTES`; one after another per vCPU.
pub const STACKS: u64 = 0x10_0000;
/// Bytes of one stack.
pub const STACK_BYTES: u64 = 0x1_0000;
/// Lowest address at which an ELF segment may be loaded.
pub const ELF_BASE: u64 = 0x20_0000;
/// Start of the hole for interrupt controllers below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole: RAM goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Address of the parameter page of `vcpu`.
#[must_use]
pub const fn param_page(vcpu: u64) -> u64 {
    PARAM + vcpu * PAGE
}

/// Address of the kvmclock area of `vcpu`.
#[must_use]
pub const fn clock(vcpu: u64) -> u64 {
    CLOCK + vcpu * CLOCK_STRIDE
}

/// Address of the `page`-th page counted from `start` in guest RAM, stepping over the hole.
///
/// `start` lies below [`HOLE_START`].
#[must_use]
pub const fn ram_page(start: u64, page: u64) -> u64 {
    let flat = start + page * PAGE;
    if flat < HOLE_START { flat } else { flat - HOLE_START + HOLE_END }
}
