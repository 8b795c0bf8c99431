//! Loading Linux: 64-bit direct boot of a bzImage or vmlinux.
//!
//! ```text
//!   0x1000 GDT   0x7000 zero page   0x9000 page tables   0x20000 command line
//!   0xe0000 ACPI tables   0xfe000 generation id   0xffff0 reset vector   1 MiB kernel   ...
//!   initramfs at the end of low memory
//! ```

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::elf;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, Error as LoadError, KernelLoader, bzimage};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::{BootError, acpi};
use crate::device::ports;
use crate::kvm::Vcpu;
use crate::memory::{GuestRam, RamLayout};

const GDT: u64 = 0x1000;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
/// With the byte at its end.
const CMDLINE_MOST: usize = 2048;
const EBDA: u64 = 0x9_fc00;
const ACPI: u64 = 0xe_0000;
const ACPI_END: u64 = 0x10_0000;
const KERNEL: u64 = 0x10_0000;
/// Where a kernel goes, in real mode, that restarts a machine without legacy hardware: it takes it
/// for one with EFI, finds none, and falls back to the firmware.
const RESET_VECTOR: u64 = 0xf_fff0;
/// `mov $port, %dx; mov $value, %al; out %al, (%dx); hlt`
const RESET_CODE: [u8; 7] = [
    0xba,
    ports::RESET.to_le_bytes()[0],
    ports::RESET.to_le_bytes()[1],
    0xb0,
    ports::RESET_VALUE,
    0xee,
    0xf4,
];
const PAGE: u64 = 0x1000;
/// The page tables map so much, one to one.
const MAPPED_GIB: u64 = 4;

/// `e820` types.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Code and data of 64-bit mode, as flat descriptors.
const CODE: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;

/// `setup_header` fields: magic numbers and flags of the boot protocol.
const MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
const LOADER_UNKNOWN: u8 = 0xff;
const XLF_KERNEL_64: u16 = 1;
/// A kernel's 64-bit entry point, behind the 32-bit one.
const ENTRY_64: u64 = 0x200;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct Linux<'a> {
    /// bzImage or vmlinux.
    pub kernel: &'a Path,
    /// Initramfs; empty: none.
    pub initrd: &'a Path,
    /// A second archive behind the initramfs.
    pub initrd_tail: &'a [u8],
    /// Command line.
    pub cmdline: &'a str,
    /// Number of virtio devices.
    pub devices: usize,
}

/// Loads kernel, initramfs, command line and everything that the boot protocol wants to know.
/// Returns the entry point.
///
/// # Errors
///
/// What is wrong with a file, or with its size.
pub fn load(
    what: &Linux<'_>,
    ram: &GuestRam,
    layout: &RamLayout,
    vcpus: u32,
) -> Result<u64, BootError> {
    let bad = |what: String| move |path: &Path| kernel_error(path, what);
    if what.cmdline.len() >= CMDLINE_MOST {
        let text = format!(
            "the command line has {} bytes, {} are allowed",
            what.cmdline.len(),
            CMDLINE_MOST - 1
        );
        return Err(bad(text)(what.kernel));
    }
    let low = layout.ranges().next().map_or(0, |range| range.len);
    let (entry, end, header) = load_kernel(what.kernel, ram, low)?;
    let mut params = boot_params { hdr: header, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    if !what.initrd.as_os_str().is_empty() {
        let (start, size) = load_initrd(what, ram, end, low, &header)?;
        params.hdr.ramdisk_image = start;
        params.hdr.ramdisk_size = size;
    }
    ram.write_slice(what.cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    ram.write_obj(0_u8, GuestAddress(CMDLINE + what.cmdline.len() as u64))?;
    params.hdr.cmd_line_ptr = word(CMDLINE);
    params.hdr.cmdline_size = word(what.cmdline.len() as u64);
    ram.write_slice(&acpi::tables(ACPI, vcpus, what.devices), GuestAddress(ACPI))?;
    ram.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))?;
    params.acpi_rsdp_addr = ACPI;
    map_of_memory(&mut params, *layout);
    ram.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))?;
    page_tables(ram)?;
    for (index, descriptor) in (0_u64..).zip([0, 0, CODE, DATA]) {
        ram.write_obj(descriptor, GuestAddress(GDT + index * 8))?;
    }
    Ok(entry)
}

fn kernel_error(path: &Path, what: String) -> BootError {
    BootError::Kernel { path: path.display().to_string(), what }
}

fn read_error(path: &Path) -> impl Fn(std::io::Error) -> BootError + '_ {
    |source| BootError::Read { path: path.display().to_string(), source }
}

/// Entry point, end in memory, and header of a kernel.
fn load_kernel(
    path: &Path,
    ram: &GuestRam,
    low: u64,
) -> Result<(u64, u64, setup_header), BootError> {
    let mut file = File::open(path).map_err(read_error(path))?;
    let size = file.metadata().map_err(read_error(path))?.len();
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            return Err(kernel_error(path, "it is no Linux kernel".to_owned()));
        }
        read => read.map_err(read_error(path))?,
    }
    file.rewind().map_err(read_error(path))?;
    if let Some(whole) = length_of(&file).filter(|whole| size < *whole) {
        let text = format!("it is cut off: {size} of {whole} bytes are there; fetch it again");
        return Err(kernel_error(path, text));
    }
    let too_small = |end: u64| {
        let text = format!(
            "it needs {} MiB of memory, the machine has {} below 3 GiB; see --memory",
            end.div_ceil(1 << 20),
            low >> 20
        );
        kernel_error(path, text)
    };
    let wrong = |error| {
        let none = matches!(error, LoadError::Bzimage(bzimage::Error::InvalidBzImage));
        let text = if none { "it is no Linux kernel".to_owned() } else { error.to_string() };
        kernel_error(path, text)
    };
    if &magic == b"\x7fELF" {
        let (whole, end) = extent_of(&file)
            .ok_or_else(|| kernel_error(path, "it is no Linux kernel".to_owned()))?;
        if size < whole {
            let text = format!("it is cut off: {size} of {whole} bytes are there; fetch it again");
            return Err(kernel_error(path, text));
        }
        if end > low {
            return Err(too_small(end));
        }
        let at = Some(GuestAddress(KERNEL));
        let loaded = Elf::load(ram, None, &mut file, at).map_err(wrong)?;
        let header = setup_header {
            boot_flag: BOOT_FLAG,
            header: MAGIC,
            kernel_alignment: 0x100_0000,
            initrd_addr_max: 0x7fff_ffff,
            ..setup_header::default()
        };
        return Ok((loaded.kernel_load.0, loaded.kernel_end, header));
    }
    if KERNEL + size > low {
        return Err(too_small(KERNEL + size));
    }
    let loaded = BzImage::load(ram, Some(GuestAddress(KERNEL)), &mut file, None).map_err(wrong)?;
    let header = loaded.setup_header.unwrap_or_default();
    if { header.xloadflags } & XLF_KERNEL_64 == 0 {
        return Err(kernel_error(path, "it has no 64-bit entry point".to_owned()));
    }
    // It unpacks itself here, at the latest.
    let unpacked = { header.pref_address }.saturating_add(header.init_size.into());
    let end = loaded.kernel_end.max(unpacked);
    if end > low {
        return Err(too_small(end));
    }
    Ok((KERNEL + ENTRY_64, end, header))
}

/// How long a bzImage is, as its header tells: a boot sector and some more (0 stands for 4), and
/// what is loaded behind them, in units of 16 bytes (Documentation/arch/x86/boot.rst).
fn length_of(file: &File) -> Option<u64> {
    let mut header = [0; 0x206];
    file.read_exact_at(&mut header, 0).ok()?;
    let (sectors, loaded, magic) =
        (header[0x1f1], header[0x1f4..].first_chunk()?, &header[0x202..]);
    let sectors = if sectors == 0 { 4 } else { u64::from(sectors) };
    (magic == b"HdrS").then(|| (sectors + 1) * 512 + u64::from(u32::from_le_bytes(*loaded)) * 16)
}

/// Where the segments of a vmlinux end in the file, and in memory.
fn extent_of(file: &File) -> Option<(u64, u64)> {
    let mut bytes = [0; size_of::<elf::Elf64_Ehdr>()];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let header: elf::Elf64_Ehdr = super::read(&bytes, 0)?;
    let size = size_of::<elf::Elf64_Phdr>() as u64;
    let mut extent = (header.e_phoff.checked_add(u64::from(header.e_phnum) * size)?, 0);
    for index in 0..u64::from(header.e_phnum) {
        let mut bytes = [0; size_of::<elf::Elf64_Phdr>()];
        if file.read_exact_at(&mut bytes, header.e_phoff + index * size).is_err() {
            // The table itself is cut off.
            break;
        }
        let segment: elf::Elf64_Phdr = super::read(&bytes, 0)?;
        if segment.p_type == elf::PT_LOAD && segment.p_filesz > 0 {
            extent.0 = extent.0.max(segment.p_offset.checked_add(segment.p_filesz)?);
            extent.1 = extent.1.max(segment.p_paddr.checked_add(segment.p_memsz)?);
        }
    }
    Some(extent)
}

/// Puts the initramfs as high as the kernel takes it. Returns where, and its size.
fn load_initrd(
    what: &Linux<'_>,
    ram: &GuestRam,
    kernel_end: u64,
    low: u64,
    header: &setup_header,
) -> Result<(u32, u32), BootError> {
    let path = what.initrd;
    let mut file = File::open(path).map_err(read_error(path))?;
    let length = file.metadata().map_err(read_error(path))?.len();
    // Archives follow each other at multiples of four bytes.
    let tail_at = length.next_multiple_of(4);
    let size = tail_at + what.initrd_tail.len() as u64;
    let most = low.min(u64::from(header.initrd_addr_max) + 1);
    let start = most.checked_sub(size).map_or(0, |start| start & !(PAGE - 1));
    if start < kernel_end {
        let text = format!(
            "kernel and initramfs need {} MiB of memory, the machine has {}; see --memory",
            (kernel_end + size).div_ceil(1 << 20),
            low >> 20
        );
        return Err(kernel_error(path, text));
    }
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    ram.read_exact_volatile_from(GuestAddress(start), &mut file, bytes).map_err(
        |error| match error {
            GuestMemoryError::IOError(source) => read_error(path)(source),
            error => error.into(),
        },
    )?;
    ram.write_slice(what.initrd_tail, GuestAddress(start + tail_at))?;
    Ok((word(start), word(size)))
}

/// What lies below 4 GiB here.
fn word(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn map_of_memory(params: &mut boot_params, layout: RamLayout) {
    let mut entries = vec![(0, EBDA, RAM), (EBDA, 0xa_0000, RESERVED), (ACPI, ACPI_END, RESERVED)];
    for range in layout.ranges() {
        entries.push((range.start.max(KERNEL), range.start + range.len, RAM));
    }
    params.e820_entries = u8::try_from(entries.len()).unwrap_or(0);
    for (place, (start, end, kind)) in params.e820_table.iter_mut().zip(entries) {
        *place = boot_e820_entry { addr: start, size: end - start, r#type: kind };
    }
}

/// The first gigabytes, one to one, in pages of 2 MiB.
fn page_tables(ram: &GuestRam) -> Result<(), BootError> {
    let (table, huge) = (0x3, 0x83);
    let pdpt = PML4 + PAGE;
    ram.write_obj(pdpt | table, GuestAddress(PML4))?;
    for gib in 0..MAPPED_GIB {
        let directory = pdpt + PAGE + gib * PAGE;
        ram.write_obj(directory | table, GuestAddress(pdpt + gib * 8))?;
        for index in 0..512 {
            let page = gib << 30 | index << 21;
            ram.write_obj(page | huge, GuestAddress(directory + index * 8))?;
        }
    }
    Ok(())
}

/// Registers at the entry point, of the first vCPU; the others wait for it to start them.
///
/// # Errors
///
/// What KVM says.
pub fn start(vcpu: &mut Vcpu, entry: u64) -> Result<(), BootError> {
    if vcpu.index() > 0 {
        return Ok(());
    }
    let regs = kvm_regs { rip: entry, rsi: ZERO_PAGE, rflags: 2, ..Default::default() };
    vcpu.boot(&regs, set_sregs)?;
    Ok(())
}

fn set_sregs(sregs: &mut kvm_sregs) {
    super::set_segments(sregs, 0x10, 0x18);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 31;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PML4;
    // PAE.
    sregs.cr4 = 0x20;
    // Paging, numeric errors, extension type, protection.
    sregs.cr0 = 0x8000_0031;
    // Long mode, enabled and active.
    sregs.efer = 0x500;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage without a program in it, that wants to be unpacked to `to`.
    fn image(to: u64) -> Vec<u8> {
        let mut image = vec![0; 0x1400];
        // A boot sector and one more, a megabyte at the most behind them, and a 64-bit entry point.
        for (at, bytes) in [
            (0x1f1, &[1][..]),
            (0x1f4, &0x100_u32.to_le_bytes()),
            (0x1fe, b"\x55\xaa\xeb\x66HdrS\x0c\x02"),
            (0x211, &[1]),
            (0x214, &0x10_0000_u32.to_le_bytes()),
            (0x236, &XLF_KERNEL_64.to_le_bytes()),
            (0x258, &to.to_le_bytes()),
            (0x260, &0x2000_u32.to_le_bytes()),
        ] {
            image[at..at + bytes.len()].copy_from_slice(bytes);
        }
        image
    }

    /// A vmlinux with one segment, that goes to `to`.
    fn vmlinux(to: u64) -> Vec<u8> {
        let mut elf = vec![0; 0x1400];
        for (at, bytes) in [
            (0, &b"\x7fELF\x02\x01\x01"[..]),
            (16, &[2, 0, 62, 0, 1]),
            (24, &to.to_le_bytes()),
            (32, &64_u64.to_le_bytes()),
            (52, &[64, 0, 56, 0, 1]),
            (64, &elf::PT_LOAD.to_le_bytes()),
            (72, &0x1000_u64.to_le_bytes()),
            (88, &to.to_le_bytes()),
            (96, &0x400_u64.to_le_bytes()),
            (104, &0x10_0000_u64.to_le_bytes()),
        ] {
            elf[at..at + bytes.len()].copy_from_slice(bytes);
        }
        elf
    }

    fn load_image(name: &str, image: &[u8]) -> Result<u64, BootError> {
        let file = format!("ukp-boot-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(file);
        std::fs::write(&path, image).expect("written");
        let what = Linux {
            kernel: &path,
            initrd: Path::new(""),
            initrd_tail: &[],
            cmdline: "",
            devices: 0,
        };
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("memory");
        let loaded = load(&what, &ram, &RamLayout::new(16), 1);
        std::fs::remove_file(&path).expect("it is ours");
        loaded
    }

    #[test]
    fn a_kernel_that_is_unpacked_beyond_memory_is_refused() {
        let fits = load_image("fits", &image(0x20_0000)).expect("it fits");
        assert_eq!(fits, KERNEL + ENTRY_64);
        assert_eq!(load_image("elf", &vmlinux(0x20_0000)).expect("it fits"), 0x20_0000);
        for (name, image) in [
            ("high", image(16 << 20)),
            ("beyond", image(u64::MAX)),
            ("elf-high", vmlinux(16 << 20)),
            ("elf-end", vmlinux((16 << 20) - 0x1000)),
        ] {
            let error = load_image(name, &image).expect_err("too small").to_string();
            assert!(error.contains("see --memory"), "{name}: {error}");
        }
    }

    #[test]
    fn a_vmlinux_that_is_cut_off_is_refused() {
        let whole = vmlinux(0x20_0000);
        for len in [whole.len() - 1, 0x1000, 100, 64] {
            let error = load_image("cut", &whole[..len]).expect_err("cut off").to_string();
            assert!(error.contains("cut off"), "{len}: {error}");
        }
        for (name, len) in [("short", 63), ("magic", 4)] {
            let error = load_image(name, &whole[..len]).expect_err("no kernel").to_string();
            assert!(error.contains("no Linux kernel"), "{len}: {error}");
        }
        assert!(load_image("overflow", &vmlinux(u64::MAX)).is_err());
    }
}
