//! Loading a guest: a bare one, a static ELF that keeps to `guest/bare/ABI.md`, or Linux
//! ([`linux`]).

mod acpi;
pub mod linux;

use guest_abi::entry::{self, HOLE_START, PAGE};
use guest_abi::param::Header;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::elf;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::kvm::{KvmError, Vcpu};
use crate::memory::{GuestRam, RamLayout};

/// The guest that `runtime run --bare` runs without a file.
pub static EMBEDDED: &[u8] = include_bytes!(env!("BARE_GUEST"));

/// Why a file is not a bare guest, or cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file breaks a rule of the ABI.
    #[error("not a bare guest: {what} (guest/bare/ABI.md tells what is)")]
    NotBare {
        /// The rule.
        what: String,
    },
    /// A segment does not lie in guest RAM.
    #[error("the segment {start:#x}..{end:#x} does not lie in guest RAM ({base:#x}..{limit:#x})")]
    Segment {
        /// Its first address.
        start: u64,
        /// Its end.
        end: u64,
        /// Lowest address allowed.
        base: u64,
        /// End of what is allowed.
        limit: u64,
    },
    /// The kernel is no Linux kernel, or cannot be booted.
    #[error("cannot boot {path}: {what}")]
    Kernel {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// Guest memory could not be written.
    #[error("writing guest memory failed")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] crate::sys::SysError),
    /// A register could not be set.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A loaded guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction.
    pub entry: u64,
    /// First page behind the last segment.
    pub end: u64,
}

/// Checks `file` and copies its segments to guest RAM.
///
/// # Errors
///
/// Which rule of the ABI it breaks.
pub fn load(file: &[u8], ram: &GuestRam, layout: &RamLayout) -> Result<Loaded, BootError> {
    let rule = |what: &str| BootError::NotBare { what: what.to_owned() };
    let header: elf::Elf64_Ehdr =
        read(file, 0).ok_or_else(|| rule("shorter than an ELF header"))?;
    if header.e_ident.get(..4) != Some(&[0x7f, b'E', b'L', b'F']) {
        return Err(rule("no ELF magic"));
    }
    if header.e_ident[4] != 2 || header.e_ident[5] != 1 || header.e_machine != 62 {
        return Err(rule("not a 64-bit little-endian x86-64 file"));
    }
    if header.e_type != 2 {
        return Err(rule("not a static executable (ET_EXEC); link with -static -no-pie"));
    }
    if usize::from(header.e_phentsize) != size_of::<elf::Elf64_Phdr>() {
        return Err(rule("program headers of an unknown size"));
    }
    let limit = layout.bytes().min(HOLE_START);
    let mut loaded = Loaded { entry: header.e_entry, end: 0 };
    let mut entered = false;
    for index in 0..u64::from(header.e_phnum) {
        let at = header.e_phoff.checked_add(index * size_of::<elf::Elf64_Phdr>() as u64);
        let segment: elf::Elf64_Phdr = at
            .and_then(|at| read(file, at))
            .ok_or_else(|| rule("program headers beyond its end"))?;
        match segment.p_type {
            elf::PT_LOAD if segment.p_memsz > 0 => {
                entered |= load_segment(file, ram, &segment, limit, header.e_entry)?;
                let end = (segment.p_paddr + segment.p_memsz).next_multiple_of(PAGE);
                loaded.end = loaded.end.max(end);
            }
            elf::PT_INTERP | elf::PT_DYNAMIC => {
                return Err(rule("dynamically linked; link with -static -no-pie"));
            }
            _ => {}
        }
    }
    if !entered {
        return Err(rule("its entry point lies in no executable segment"));
    }
    Ok(loaded)
}

/// Loads one segment; tells whether the entry point lies in it.
fn load_segment(
    file: &[u8],
    ram: &GuestRam,
    segment: &elf::Elf64_Phdr,
    limit: u64,
    entry_point: u64,
) -> Result<bool, BootError> {
    let rule = |what: &str| BootError::NotBare { what: what.to_owned() };
    let start = segment.p_paddr;
    let end = start.checked_add(segment.p_memsz).ok_or_else(|| rule("a segment of absurd size"))?;
    if start < entry::ELF_BASE || end > limit {
        return Err(BootError::Segment { start, end, base: entry::ELF_BASE, limit });
    }
    if segment.p_vaddr != start {
        return Err(rule("a segment whose virtual and physical address differ"));
    }
    if segment.p_filesz > segment.p_memsz {
        return Err(rule("a segment with more in the file than in memory"));
    }
    let from = usize::try_from(segment.p_offset).ok();
    let len = usize::try_from(segment.p_filesz).ok();
    let bytes = from
        .zip(len)
        .and_then(|(from, len)| file.get(from..from.checked_add(len)?))
        .ok_or_else(|| rule("a segment beyond the end of the file"))?;
    ram.write_slice(bytes, GuestAddress(start))?;
    Ok(segment.p_flags & elf::PF_X != 0 && (start..end).contains(&entry_point))
}

/// Reads a plain structure at `offset`, whatever its alignment in the file.
fn read<T: ByteValued + Default>(file: &[u8], offset: u64) -> Option<T> {
    let offset = usize::try_from(offset).ok()?;
    let bytes = file.get(offset..offset.checked_add(size_of::<T>())?)?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(bytes);
    Some(value)
}

/// Writes page tables, descriptor tables and parameter pages.
///
/// # Errors
///
/// If guest RAM is smaller than [`RamLayout::MIN_MIB`].
pub fn prepare(
    ram: &GuestRam,
    layout: &RamLayout,
    loaded: &Loaded,
    vcpus: u32,
    tsc_khz: u32,
) -> Result<(), BootError> {
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at));
    // Identity, 2 MiB pages: present, writable, user, and huge in the last level.
    let (table, huge) = (0x7_u64, 0x87_u64);
    let pdpt = entry::PML4 + PAGE;
    put(entry::PML4, pdpt | table)?;
    for range in layout.ranges() {
        let mut at = range.start;
        while at < range.start + range.len {
            let directory = pdpt + PAGE + (at >> 30) * PAGE;
            put(pdpt + (at >> 30) * 8, directory | table)?;
            put(directory + ((at >> 21) & 511) * 8, at | huge)?;
            at += 2 << 20;
        }
    }
    put(entry::GDT + 5 * 8, 0x00cf_f300_0000_ffff)?;
    put(entry::GDT + 6 * 8, 0x00af_fb00_0000_ffff)?;
    let tss = 0x0000_8900_0000_0000 | (entry::TSS & 0x00ff_ffff) << 16 | entry::TSS_LIMIT;
    put(entry::GDT + 8 * 8, tss)?;
    let bitmap = u16::try_from(entry::IO_BITMAP).unwrap_or(u16::MAX);
    ram.write_obj(bitmap, GuestAddress(entry::TSS + entry::IO_BITMAP_FIELD))?;
    ram.write_obj(0xff_u8, GuestAddress(entry::TSS + entry::TSS_LIMIT))?;
    for vcpu in 0..u64::from(vcpus) {
        let header = Header {
            work_start: loaded.end,
            work_pages: layout.pages() - loaded.end / PAGE,
            tsc_khz: tsc_khz.into(),
            vcpus: vcpus.into(),
            ..Header::default()
        };
        let words =
            [header.seq, header.work_start, header.work_pages, header.tsc_khz, header.vcpus];
        for (index, word) in (0_u64..).zip(words) {
            put(entry::param_page(vcpu) + index * 8, word)?;
        }
    }
    Ok(())
}

/// Registers at the entry point, as `guest_abi::entry` documents them.
///
/// # Errors
///
/// What KVM says.
pub fn start(vcpu: &mut Vcpu, loaded: &Loaded) -> Result<(), BootError> {
    let index = u64::from(vcpu.index());
    let regs = kvm_regs {
        rip: loaded.entry,
        rdi: entry::param_page(index),
        rsi: index,
        rsp: entry::STACKS + (index + 1) * entry::STACK_BYTES - 8,
        // IOPL 3; bit 1 is always set.
        rflags: 0x3002,
        ..Default::default()
    };
    vcpu.boot(&regs, set_sregs)?;
    // All but the first wait for a start-up interrupt otherwise.
    vcpu.set_runnable()?;
    // kvmclock, as a guest kernel would switch it on: bit 0 enables.
    vcpu.set_msr(MSR_KVM_SYSTEM_TIME_NEW, entry::clock(index) | 1)?;
    Ok(())
}

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// Flat segments of 64-bit mode, with these selectors of code and data, at the privilege level that
/// these ask for.
fn set_segments(sregs: &mut kvm_sregs, code: u16, data: u16) {
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: code,
        type_: 11,
        present: 1,
        dpl: code.to_le_bytes()[0] & 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: data, type_: 3, db: 1, l: 0, ..code };
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
}

fn set_sregs(sregs: &mut kvm_sregs) {
    set_segments(sregs, 0x33, 0x2b);
    sregs.tr = kvm_segment {
        base: entry::TSS,
        limit: u32::try_from(entry::TSS_LIMIT).unwrap_or(0),
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = entry::GDT;
    sregs.gdt.limit = 127;
    sregs.idt.base = entry::IDT;
    sregs.idt.limit = 0;
    sregs.cr3 = entry::PML4;
    // PAE, OSFXSR, OSXMMEXCPT.
    sregs.cr4 = 0x620;
    // Paging, write protection, numeric errors, the FPU's fixed bits, protection.
    sregs.cr0 = 0x8005_0033;
    // Long mode, enabled and active, and no-execute.
    sregs.efer = 0xd00;
}
