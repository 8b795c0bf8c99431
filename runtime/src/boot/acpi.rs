//! ACPI tables: the truth about a small machine without legacy hardware.
//!
//! ```text
//!   RSDP --> XSDT --> FADT (hardware-reduced) --> DSDT: COM1, virtio devices, the generation id and
//!                 |                                     the device that tells of it, the state S5
//!                 \-> MADT: processors, I/O APIC
//! ```

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use crate::device::{generation, ports, virtio};

const OEM: [u8; 6] = *b"UKPFRK";
const TABLE: [u8; 8] = *b"UKPFORK ";
const REVISION: u32 = 1;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// `FADT.iapc_boot_arch`: there is no VGA and no CMOS clock.
const NO_VGA_NO_RTC: u16 = 1 << 2 | 1 << 5;

/// The tables of a machine with this many vCPUs and virtio devices, to be put at `start`; the first
/// is the RSDP.
pub(super) fn tables(start: u64, vcpus: u32, devices: usize) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut put = |table: &dyn Aml| -> u64 {
        let at = start + all.len() as u64;
        table.to_aml_bytes(&mut all);
        all.resize(all.len().next_multiple_of(16), 0);
        at
    };
    let dsdt = put(&dsdt(devices));
    let fadt = put(&fadt(dsdt));
    let madt = put(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    all[..rsdp.len()].copy_from_slice(&rsdp);
    all
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = NO_VGA_NO_RTC.into();
    fadt.reset_reg = port(ports::RESET);
    fadt.reset_value = ports::RESET_VALUE;
    fadt.sleep_control_reg = port(ports::SLEEP);
    fadt.sleep_status_reg = port(ports::SLEEP);
    fadt.finalize()
}

fn madt(vcpus: u32) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..u8::try_from(vcpus).unwrap_or(u8::MAX) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt(devices: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    let mut bytes = Vec::new();
    let interrupt = Interrupt::new(true, true, false, false, ports::SERIAL_GSI);
    let port = IO::new(ports::SERIAL, ports::SERIAL, 0, 8);
    let serial = ResourceTemplate::new(vec![&interrupt, &port]);
    aml::Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &serial),
            ],
        )],
    )
    .to_aml_bytes(&mut bytes);
    virtio::windows(devices).for_each(|window| virtio_device(&window, &mut bytes));
    generation_device(&mut bytes);
    let off = ports::SLEEP_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&off, &ZERO, &ZERO, &ZERO]))
        .to_aml_bytes(&mut bytes);
    dsdt.append_slice(&bytes);
    dsdt
}

fn virtio_device(window: &virtio::Window, bytes: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, window.start, window.bytes);
    // Edges: an interrupt that a fork might lose is simply raised again.
    let interrupt = Interrupt::new(true, true, false, false, window.gsi);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let name = format!("VIO{}", window.index);
    aml::Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            name.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &window.index),
                &Name::new("_CRS".into(), &resources),
            ],
        )],
    )
    .to_aml_bytes(bytes);
}

/// The generation id, and the generic event device whose interrupt says that it is another one.
fn generation_device(bytes: &mut Vec<u8>) {
    const CHANGED: u8 = 0x80;
    let (address, gsi) = (generation::ADDRESS, generation::EVENT_GSI);
    let id = Path::new("\\_SB_.VGEN");
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let is_ours = Equal::new(&Arg(0), &gsi);
    let notify = Notify::new(&id, &CHANGED);
    let told = If::new(&is_ours, vec![&notify]);
    aml::Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "VGEN".into(),
                vec![
                    &Name::new("_HID".into(), &"UKPF0001"),
                    // The driver goes by this one.
                    &Name::new("_CID".into(), &"VM_Gen_Counter"),
                    &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                    &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new("_CRS".into(), &resources),
                    &Method::new("_EVT".into(), 1, true, vec![&told]),
                ],
            ),
        ],
    )
    .to_aml_bytes(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        let word = bytes[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(word) as usize
    }

    #[test]
    fn every_table_is_found_from_the_first_and_sums_up_to_zero() {
        const START: usize = 0xe0000;
        let all = tables(START as u64, 3, 2);
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!(sum(&all[..36]), 0);
        let at = |bytes: &[u8], from: usize| word(bytes, from) - START;
        let table = |at: usize| &all[at..at + word(&all, at + 4)];
        let xsdt = table(at(&all, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let (fadt, madt) = (table(at(xsdt, 36)), table(at(xsdt, 44)));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        let dsdt = table(at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let places = |name: &[u8]| dsdt.windows(name.len()).filter(|part| *part == name).count();
        assert_eq!((places(b"LNRO0005"), places(b"VIO1"), places(b"VIO2")), (2, 1, 0));
        assert!(all.len() < (generation::ADDRESS as usize) - START, "{} bytes", all.len());
        // Three processors of 8 bytes and an I/O APIC of 12.
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
    }

    #[test]
    fn the_generation_id_has_an_address_and_an_event() {
        let mut bytes = Vec::new();
        generation_device(&mut bytes);
        let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        // Name (_CID, "VM_Gen_Counter"): a driver goes by it.
        assert!(has(b"\x08_CID\x0dVM_Gen_Counter\0"));
        // Name (ADDR, Package { low, high }): a page of its own below 1 MiB.
        assert!(has(b"\x08ADDR\x12\x08\x02\x0c\x00\xe0\x0f\x00\x00"));
        // A line of its own, an edge that is high: interrupt 23.
        assert!(has(b"\x89\x06\x00\x03\x01\x17\0\0\0"));
        // Method (_EVT, 1, Serialized) { If (Arg0 == 23) { Notify (\_SB.VGEN, 0x80) } }
        let method = b"\x14\x19_EVT\x09\xa0\x12\x93\x68\x0a\x17\x86\\._SB_VGEN\x0a\x80";
        assert!(has(method), "{bytes:02x?}");
    }
}
