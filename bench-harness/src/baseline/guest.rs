//! The smallest guest that there is: a loop in user mode that writes to a port.
//!
//! It lies in an image as a bare guest does (see `guest_abi::entry`), so that entering it costs
//! what entering a real one costs, and everything above that is the guest's own work.
#![expect(unsafe_code, reason = "writes into a mapped image")]

use guest_abi::entry::{
    ELF_BASE, GDT, HOLE_END, HOLE_START, IDT, IO_BITMAP, IO_BITMAP_FIELD, PAGE, PML4, STACK_BYTES,
    STACKS, TSS, TSS_LIMIT,
};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuExit;
use runtime::kvm::{DirtyMode, MachineConfig, Vcpu};
use runtime::memory::{BackingKind, Image, Mapping, RamLayout, Sealed};

use super::BaselineError;

/// Port that the loop writes to.
const PORT: u16 = 0x12;
/// `out 0x12, al; jmp -4`
const LOOP: [u8; 4] = [0xe6, 0x12, 0xeb, 0xfc];
/// Present, writable, user.
const TABLE: u64 = 0x7;
/// The same, and a page of 2 MiB.
const LARGE: u64 = 0x87;

/// Guest RAM with the loop in it, sealed. What the guest looks at is there, the rest is a hole in
/// the file: no primitive timed here depends on what lies in pages that nobody touches.
pub(super) fn image(kind: BackingKind, layout: RamLayout) -> Result<Image<Sealed>, BaselineError> {
    // Huge pages are reserved twice: for the image, and for the private mapping above it.
    kind.backing().check(2 * layout.bytes())?;
    let image = Image::new(kind, layout.bytes())?;
    let mapping = image.map_shared()?;
    write(&mapping, GDT + 5 * 8, &0x00cf_f300_0000_ffff_u64.to_le_bytes());
    write(&mapping, GDT + 6 * 8, &0x00af_fb00_0000_ffff_u64.to_le_bytes());
    let field = u16::try_from(IO_BITMAP).unwrap_or(u16::MAX);
    write(&mapping, TSS + IO_BITMAP_FIELD, &field.to_le_bytes());
    write(&mapping, TSS + TSS_LIMIT, &[0xff]);
    page_tables(&mapping, layout);
    write(&mapping, ELF_BASE, &LOOP);
    drop(mapping);
    image.seal().map_err(|unsealed| unsealed.error.into())
}

/// Identity, in pages of 2 MiB, all RAM.
fn page_tables(mapping: &Mapping, layout: RamLayout) {
    let (pdpt, directories) = (PML4 + PAGE, PML4 + 2 * PAGE);
    let top = if layout.bytes() > HOLE_START {
        layout.bytes() - HOLE_START + HOLE_END
    } else {
        layout.bytes()
    };
    write(mapping, PML4, &(pdpt | TABLE).to_le_bytes());
    for gib in 0..top.div_ceil(1 << 30) {
        write(mapping, pdpt + gib * 8, &((directories + gib * PAGE) | TABLE).to_le_bytes());
    }
    for large in 0..top >> 21 {
        write(mapping, directories + large * 8, &((large << 21) | LARGE).to_le_bytes());
    }
}

/// Writes `bytes` at a guest address below the hole, within one page.
fn write(mapping: &Mapping, address: u64, bytes: &[u8]) {
    let page = u32::try_from(address / PAGE).unwrap_or(u32::MAX);
    let offset = usize::try_from(address % PAGE).unwrap_or(usize::MAX);
    assert!(offset + bytes.len() <= runtime::memory::PAGE);
    // SAFETY: inside the page by the assertion.
    let to = unsafe { mapping.page(page).add(offset) };
    // SAFETY: the destination is mapped (`page` checks), inside one page, no guest runs yet, and a
    // slice of ours cannot overlap the mapping.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
}

/// The machine that the guest is run in.
pub(super) fn machine(layout: RamLayout, vcpus: u32, dirty: DirtyMode) -> MachineConfig {
    MachineConfig { layout, vcpus, dirty, ring_entries: 4096 }
}

/// Puts a vCPU in front of the loop.
pub(super) fn boot(vcpu: &mut Vcpu) -> Result<(), BaselineError> {
    let regs = kvm_regs {
        rip: ELF_BASE,
        rsp: STACKS + STACK_BYTES - 8,
        // IOPL 3, interrupts off.
        rflags: 0x3002,
        ..Default::default()
    };
    Ok(vcpu.boot(&regs, user_mode)?)
}

fn user_mode(sregs: &mut kvm_sregs) {
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT.
    sregs.cr4 = 0x620;
    // LME, LMA, NXE.
    sregs.efer = 0xd00;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 127;
    sregs.idt.base = IDT;
    sregs.idt.limit = 4095;
    let segment =
        kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x33, type_: 11, l: 1, ..segment };
    let data = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..segment };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: u32::try_from(TSS_LIMIT).unwrap_or(0),
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
}

/// Enters the guest and returns when it has written to its port.
pub(super) fn run(vcpu: &mut Vcpu) -> Result<(), BaselineError> {
    loop {
        match vcpu.run()? {
            Some(VcpuExit::IoOut(PORT, _)) => return Ok(()),
            // A signal for this thread; the guest goes on where it was.
            None => {}
            Some(exit) => return Err(BaselineError::Guest { exit: format!("{exit:?}") }),
        }
    }
}
