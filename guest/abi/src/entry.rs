//! Machine state at the guest's entry point, and the memory map below the ELF.
//!
//! | at entry | value |
//! | --- | --- |
//! | mode | long mode, CPL 3, IOPL 3, `RFLAGS.IF` = 0 |
//! | paging | identity, 2 MiB pages, all of guest RAM, writable and user-accessible |
//! | `rdi` | address of this vCPU's parameter page |
//! | `rsi` | vCPU index, the boot vCPU is 0 |
//! | `rsp` | top of this vCPU's stack, 16-byte aligned minus 8 as after a call |
//! | ports | those below [`IO_PORTS`] are allowed by the TSS as well |
//! | SSE | enabled (`CR4.OSFXSR`, `CR4.OSXMMEXCPT`) |
//! | IDT | empty: an exception or an interrupt stops the instance |
//!
//! Guest RAM is `[0, low)` and, for what does not fit below [`HOLE_START`], `[HOLE_END, …)`.

/// Most vCPUs that a bare guest may have.
pub const MAX_VCPUS: u64 = 16;
/// Global descriptor table.
pub const GDT: u64 = 0x6000;
/// Task state segment, with an I/O permission bitmap that allows the ports below [`IO_PORTS`].
///
/// IOPL 3 alone is not enough: KVM's emulator asks the bitmap wherever guest code runs in user mode
/// of the host (`kvm_pvm` does not carry IOPL through), and refuses a port that lies behind the
/// segment's limit. Without it the first `out` stops the instance with `KVM_EXIT_SHUTDOWN`.
pub const TSS: u64 = 0x7000;
/// Offset in the TSS of the 16-bit field that holds [`IO_BITMAP`].
pub const IO_BITMAP_FIELD: u64 = 102;
/// Offset of the bitmap in the TSS: right behind the fixed part. All its bits are 0 (allowed).
pub const IO_BITMAP: u64 = 104;
/// Ports that the bitmap covers.
pub const IO_PORTS: u64 = 0x1000;
/// Limit of the TSS: the offset of its last byte, which stands behind the bitmap and is 0xff.
pub const TSS_LIMIT: u64 = IO_BITMAP + IO_PORTS / 8;
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

// What lies below the ELF does not overlap, for any number of vCPUs.
const _: () = {
    assert!(GDT + PAGE <= TSS);
    assert!(TSS + TSS_LIMIT < IDT);
    assert!(IDT + PAGE <= PARAM);
    assert!(param_page(MAX_VCPUS) <= CLOCK);
    assert!(clock(MAX_VCPUS) <= PML4);
    // The PML4, one PDPT, 64 page directories.
    assert!(PML4 + 66 * PAGE <= STACKS);
    assert!(STACKS + MAX_VCPUS * STACK_BYTES <= ELF_BASE);
};

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x30_0000;

    #[test]
    fn pages_below_the_hole_are_where_they_are_counted() {
        assert_eq!(ram_page(START, 0), START);
        assert_eq!(ram_page(START, 1), START + PAGE);
        let last = (HOLE_START - START) / PAGE - 1;
        assert_eq!(ram_page(START, last), HOLE_START - PAGE);
    }

    #[test]
    fn pages_go_on_behind_the_hole() {
        let first = (HOLE_START - START) / PAGE;
        assert_eq!(ram_page(START, first), HOLE_END);
        assert_eq!(ram_page(START, first + 1), HOLE_END + PAGE);
        assert_eq!(ram_page(START, first + (1 << 20)), HOLE_END + (1 << 32));
    }

    #[test]
    fn no_page_lies_in_the_hole_and_none_comes_twice() {
        let around = (HOLE_START - START) / PAGE;
        let mut previous = ram_page(START, around - 1001);
        for page in around - 1000..around + 1000 {
            let address = ram_page(START, page);
            assert!(!(HOLE_START..HOLE_END).contains(&address), "{address:#x}");
            assert!(address > previous, "{address:#x}");
            previous = address;
        }
    }

    #[test]
    fn areas_of_vcpus_do_not_touch() {
        for vcpu in 1..MAX_VCPUS {
            assert_eq!(param_page(vcpu) - param_page(vcpu - 1), PAGE);
            assert!(clock(vcpu) - clock(vcpu - 1) >= 32);
            // An area that crossed a page could be captured half old, half new.
            assert_eq!(clock(vcpu) / PAGE, (clock(vcpu) + 31) / PAGE);
        }
    }
}
