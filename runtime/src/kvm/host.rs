//! What this host's KVM can do. Asked once per process tree; standbys inherit the answer.

use std::io;
use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm};

use super::{KvmError, MAX_MSRS, MAX_XSAVE};

/// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL` (Documentation/virt/kvm/api.rst, 8.29).
const CAP_DIRTY_LOG_RING_ACQ_REL: std::ffi::c_ulong = 223;
/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
const CAP_MANUAL_DIRTY_LOG_PROTECT2: std::ffi::c_ulong = 168;
/// `KVM_CAP_XSAVE2`: bytes of the extended register area.
const CAP_XSAVE2: std::ffi::c_ulong = 208;
/// CPUID.1:ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// `MSR_IA32_TSC`: runs by itself; its offset is carried over instead (see `Machine`).
const MSR_TSC: u32 = 0x10;
/// `MSR_IA32_TSC_ADJUST`: how far the guest has moved its TSC.
pub(super) const MSR_TSC_ADJUST: u32 = 0x3b;
/// `MSR_IA32_TSC_DEADLINE`: must be set after the LAPIC.
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// An open `/dev/kvm` and its abilities.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "what a host can do is yes or no")]
pub struct Host {
    /// The device.
    pub(super) kvm: Kvm,
    /// CPUID offered to guests.
    pub(super) cpuid: CpuId,
    /// MSRs that make up a vCPU's state, deadline timer last.
    pub(super) msrs: Vec<u32>,
    /// Whether there is `KVM_GET_XSAVE2` (Linux 5.17).
    pub(super) xsave2: bool,
    /// Bytes that `KVM_GET_XSAVE2`, else `KVM_GET_XSAVE`, writes.
    pub(super) xsave_bytes: u32,
    /// Most entries of a dirty ring, 0 if there is none.
    pub(super) ring_entries: u32,
    /// Whether a crash that KVM has not yet told is part of a vCPU's events (Linux 6.1).
    pub(super) triple_fault_event: bool,
    /// Whether guests run by SVM.
    pub(super) svm: bool,
    /// Whether there are extended control registers: not on a processor without XSAVE.
    pub(super) xcrs: bool,
    /// Whether the local APIC has a timer that takes a value of the TSC.
    tsc_deadline: bool,
}

impl Host {
    /// Opens `/dev/kvm` and asks what it can do.
    ///
    /// # Errors
    ///
    /// What is missing and what to do about it.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| KvmError::Open {
            source: io::Error::from_raw_os_error(error.errno()),
        })?;
        if let Some(missing) = missing(&kvm).next() {
            return Err(missing.into());
        }
        let xsave2 = u32::try_from(kvm.check_extension_raw(CAP_XSAVE2)).unwrap_or(0);
        let xsave_bytes = xsave2.max(4096);
        if xsave_bytes as usize > MAX_XSAVE {
            return Err(KvmError::TooLarge {
                what: "the extended register area",
                needed: xsave_bytes as usize,
                room: MAX_XSAVE,
            });
        }
        let ring_bytes = kvm.check_extension_raw(CAP_DIRTY_LOG_RING_ACQ_REL);
        let triple_fault_event = kvm.check_extension_raw(KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        hide_virtualisation(&mut cpuid);
        let mut msrs: Vec<u32> = kvm
            .get_msr_index_list()
            .map_err(KvmError::ioctl("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .iter()
            .copied()
            .filter(|msr| *msr != MSR_TSC)
            .collect();
        msrs.sort_unstable_by_key(|msr| (*msr == MSR_TSC_DEADLINE, *msr));
        if msrs.len() > MAX_MSRS {
            return Err(KvmError::TooLarge {
                what: "the MSR list",
                needed: msrs.len(),
                room: MAX_MSRS,
            });
        }
        let msrs = usable_msrs(&kvm, &cpuid, msrs)?;
        Ok(Self {
            svm: Path::new("/sys/module/kvm_amd").exists(),
            xcrs: kvm.check_extension(Cap::Xcrs),
            kvm,
            cpuid,
            msrs,
            xsave2: xsave2 > 0,
            xsave_bytes,
            ring_entries: u32::try_from(ring_bytes.max(0)).unwrap_or(0) / 16,
            triple_fault_event,
            tsc_deadline,
        })
    }

    /// Number of the descriptor of `/dev/kvm`.
    #[must_use]
    pub fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.kvm)
    }

    /// CPUID of a vCPU: what KVM offers, and what it leaves to us to say.
    pub(super) fn cpuid_of(&self, vcpu: u32) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                // Its APIC's id, that there is a hypervisor, and a timer that needs no calibration.
                1 => {
                    entry.ebx = entry.ebx & 0x00ff_ffff | vcpu << 24;
                    entry.ecx |= HYPERVISOR;
                    if self.tsc_deadline {
                        entry.ecx |= TSC_DEADLINE;
                    }
                }
                0xb | 0x1f => entry.edx = vcpu,
                _ => {}
            }
        }
        cpuid
    }

    /// Whether a crash that KVM has not yet told is part of a vCPU's events.
    #[must_use]
    pub fn has_triple_fault_event(&self) -> bool {
        self.triple_fault_event
    }

    /// Whether dirty pages can be tracked by a ring.
    #[must_use]
    pub fn has_dirty_ring(&self) -> bool {
        self.ring_entries > 0
    }
}

/// What forks cannot do without: `KVM_CHECK_EXTENSION` has to have all of the bits.
struct Need {
    cap: std::ffi::c_ulong,
    bits: i32,
    name: &'static str,
    purpose: &'static str,
}

const fn need(cap: Cap, name: &'static str, purpose: &'static str) -> Need {
    Need { cap: cap as std::ffi::c_ulong, bits: 0, name, purpose }
}

const NEEDS: [Need; 8] = [
    need(Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    need(Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping vCPUs"),
    need(Cap::Irqchip, "KVM_CAP_IRQCHIP", "interrupt controllers"),
    need(Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "pending exceptions"),
    need(Cap::MpState, "KVM_CAP_MP_STATE", "halted vCPUs"),
    need(Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "kvmclock"),
    // General registers, segment and control registers, events.
    Need { bits: 7, ..need(Cap::SyncRegs, "KVM_CAP_SYNC_REGS", "registers without an ioctl") },
    Need {
        // KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.
        bits: 1,
        cap: CAP_MANUAL_DIRTY_LOG_PROTECT2,
        name: "KVM_CAP_DIRTY_LOG_RING_ACQ_REL and KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        purpose: "telling which pages were written",
    },
];

/// Something that forks cannot do without, and whether it is there.
#[derive(Clone, Copy, Debug)]
pub struct Needed {
    /// Name as in the KVM API.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether this KVM has it.
    pub found: bool,
}

impl From<Needed> for KvmError {
    fn from(Needed { name, purpose, .. }: Needed) -> Self {
        Self::MissingCapability { capability: name, purpose }
    }
}

/// Everything that forks cannot do without. [`Host::open`] asks for it, and `runtime doctor` shows it.
pub fn needed(kvm: &Kvm) -> impl Iterator<Item = Needed> {
    let raw = |cap| kvm.check_extension_raw(cap);
    NEEDS.into_iter().map(move |Need { cap, bits, name, purpose }| {
        // Either way of logging will do.
        let instead = cap == CAP_MANUAL_DIRTY_LOG_PROTECT2 && raw(CAP_DIRTY_LOG_RING_ACQ_REL) > 0;
        let found = instead || raw(cap) > 0 && raw(cap) & bits == bits;
        Needed { name, purpose, found }
    })
}

fn missing(kvm: &Kvm) -> impl Iterator<Item = Needed> {
    needed(kvm).filter(|needed| !needed.found)
}

/// Takes VMX and SVM out of what guests are told they have: the state of a guest's own guests
/// (`KVM_GET_NESTED_STATE`) is no part of a fork, so a child would lose it.
fn hide_virtualisation(cpuid: &mut CpuId) {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !VMX,
            0x8000_0001 => entry.ecx &= !SVM,
            // What SVM can do.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

/// The MSRs of `msrs` that can be read, and set to what was read: some that KVM lists are there only
/// for guests with features that ours do not have.
fn usable_msrs(kvm: &Kvm, cpuid: &CpuId, mut msrs: Vec<u32>) -> Result<Vec<u32>, KvmError> {
    let vm = kvm.create_vm().map_err(KvmError::ioctl("KVM_CREATE_VM"))?;
    vm.create_irq_chip().map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP"))?;
    let vcpu = vm.create_vcpu(0).map_err(KvmError::ioctl("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
    loop {
        let entries: Vec<_> = msrs
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut list = Msrs::from_entries(&entries).map_err(|_| KvmError::TooLarge {
            what: "the MSR list",
            needed: entries.len(),
            room: MAX_MSRS,
        })?;
        let read = vcpu.get_msrs(&mut list).map_err(KvmError::ioctl("KVM_GET_MSRS"))?;
        let done = if read < msrs.len() {
            read
        } else {
            vcpu.set_msrs(&list).map_err(KvmError::ioctl("KVM_SET_MSRS"))?
        };
        if done >= msrs.len() {
            return Ok(msrs);
        }
        msrs.remove(done);
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn no_guest_is_told_of_virtualisation() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let functions = [1, 7, 0x8000_0001, 0x8000_000a];
        let Ok(mut cpuid) = CpuId::from_entries(&functions.map(all)) else { panic!("too many") };
        hide_virtualisation(&mut cpuid);
        let [one, seven, extended, svm] = cpuid.as_slice() else { panic!("{cpuid:?}") };
        assert_eq!((one.ecx, one.edx), (!(1 << 5), u32::MAX));
        assert_eq!((seven.ebx, seven.ecx), (u32::MAX, u32::MAX));
        assert_eq!((extended.ecx, extended.edx), (!(1 << 2), u32::MAX));
        assert_eq!((svm.eax, svm.ebx, svm.ecx, svm.edx), (0, 0, 0, 0));
    }
}
