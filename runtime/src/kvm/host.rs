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
        for (cap, capability, purpose) in [
            (Cap::SyncRegs, "KVM_CAP_SYNC_REGS", "capturing registers without an ioctl"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping vCPUs"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP", "interrupt controllers"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::MissingCapability { capability, purpose });
            }
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
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
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
