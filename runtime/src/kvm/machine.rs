//! One virtual machine without its state: VM, memslots, interrupt controllers, vCPUs.
#![expect(unsafe_code, reason = "a memslot hands a mapping to KVM")]

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES, kvm_clock_data, kvm_enable_cap, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::calls::timed;
use super::statistics::Statistics;
use super::{DirtyLog, DirtyMode, Host, KvmError, Vcpu, VcpuState};
use crate::memory::{Mapping, RamLayout};
use crate::sys::now_ns;

/// `_IOR(KVMIO, 0x8e, struct kvm_lapic_state)`.
const GET_LAPIC: libc::c_ulong = 0x8400_ae8e;
/// `KVM_CLOCK_REALTIME` (Linux 5.16): the pair of guest clock and host wall clock is exact.
const CLOCK_REALTIME: u32 = 1 << 2;
/// Three pages that KVM needs on Intel, in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct MachineConfig {
    /// Guest RAM.
    pub layout: RamLayout,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// How dirty pages are tracked.
    pub dirty: DirtyMode,
    /// Entries of each vCPU's dirty ring, a power of two.
    pub ring_entries: u32,
}

/// A virtual machine. The vCPUs are handed out separately: each belongs to its thread.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    config: MachineConfig,
    /// Of each vCPU.
    statistics: Vec<Statistics>,
    /// Each vCPU, if there are several.
    vcpus: Vec<OwnedFd>,
}

/// State of a machine outside its vCPUs, as plain data.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct VmState {
    /// The two PICs and the I/O APIC.
    pub irqchips: [kvm_irqchip; 3],
    /// kvmclock.
    pub clock: kvm_clock_data,
    /// When it was read, in nanoseconds of the host's monotonic clock.
    pub clock_read_ns: u64,
    /// Guest TSC minus host TSC of a vCPU whose `IA32_TSC_ADJUST` is 0, and whether it is known.
    pub tsc_offset: [u64; 2],
}

impl VmState {
    /// Whether the interrupt controllers are in the same state.
    #[must_use]
    pub fn same_irqchips(&self, other: &Self) -> bool {
        // SAFETY: `dummy` covers the whole union, and every byte of it is initialised: by the
        // default value, or by KVM.
        let bytes = |chip: &kvm_irqchip| unsafe { chip.chip.dummy };
        self.irqchips.iter().map(bytes).eq(other.irqchips.iter().map(bytes))
    }
}

impl Machine {
    /// Makes a machine over `mapping`. The mapping must outlive it.
    ///
    /// The order decides between 1 ms and 8 ms: memslots before interrupt controllers and vCPUs,
    /// because a new memslot waits for all SRCU readers (`kvm_swap_active_memslots`), and the
    /// first vCPU and the irqchip start such readers.
    ///
    /// # Errors
    ///
    /// The call that failed.
    pub fn new(
        host: &Host,
        config: MachineConfig,
        mapping: &Mapping,
        track: bool,
    ) -> Result<(Self, Vec<Vcpu>, DirtyLog), KvmError> {
        Self::with_bells(host, config, mapping, track, std::iter::empty())
    }

    /// The same, where a write of the guest to some addresses writes an eventfd, and is no exit. Each
    /// is waited for like a memslot.
    ///
    /// # Errors
    ///
    /// The call that failed.
    pub fn with_bells<'a>(
        host: &Host,
        config: MachineConfig,
        mapping: &Mapping,
        track: bool,
        bells: impl Iterator<Item = (u64, &'a EventFd)>,
    ) -> Result<(Self, Vec<Vcpu>, DirtyLog), KvmError> {
        let vm = host.kvm.create_vm().map_err(KvmError::ioctl("KVM_CREATE_VM"))?;
        timed(|| vm.set_tss_address(TSS_ADDRESS)).map_err(KvmError::ioctl("KVM_SET_TSS_ADDR"))?;
        let ring = config.dirty == DirtyMode::Ring && host.has_dirty_ring();
        let entries = config.ring_entries.min(host.ring_entries.max(1));
        let mut cap = kvm_enable_cap::default();
        if ring {
            cap.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
            cap.args[0] = u64::from(entries) * 16;
        } else {
            // Reading the bitmap must not write-protect: that is what `DirtyLog::reset` is for.
            cap.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
            cap.args[0] = 1;
        }
        timed(|| vm.enable_cap(&cap)).map_err(KvmError::ioctl("KVM_ENABLE_CAP"))?;
        if host.triple_fault_event {
            // A rehearsal that crashes may be stopped before KVM has told: without this the crash
            // would be no part of the state that is put back, and come up in the child.
            let cap = KVM_CAP_X86_TRIPLE_FAULT_EVENT;
            let cap = kvm_enable_cap { cap, args: [1, 0, 0, 0], ..<_>::default() };
            timed(|| vm.enable_cap(&cap)).map_err(KvmError::ioctl("KVM_ENABLE_CAP"))?;
        }
        let mut machine = Self { vm, config, statistics: Vec::new(), vcpus: Vec::new() };
        machine.set_memslots(mapping, track)?;
        for (address, bell) in bells {
            let address = IoEventAddress::Mmio(address);
            timed(|| machine.vm.register_ioevent(bell, &address, NoDatamatch))
                .map_err(KvmError::ioctl("KVM_IOEVENTFD"))?;
        }
        timed(|| machine.vm.create_irq_chip()).map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP"))?;
        let mut vcpus = Vec::with_capacity(config.vcpus as usize);
        for index in 0..config.vcpus {
            let fd = timed(|| machine.vm.create_vcpu(u64::from(index)))
                .map_err(KvmError::ioctl("KVM_CREATE_VCPU"))?;
            machine.statistics.extend(Statistics::of(&fd));
            if config.vcpus > 1 {
                // SAFETY: the descriptor is open as long as `fd` is.
                let vcpu = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
                machine.vcpus.push(vcpu.try_clone_to_owned().map_err(|source| {
                    KvmError::Ioctl { name: "another descriptor of a vCPU", source }
                })?);
            }
            vcpus.push(Vcpu::new(host, fd, index)?);
        }
        let log = if ring {
            let fds: Vec<_> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
            DirtyLog::rings(config.layout, &fds, entries)?
        } else {
            DirtyLog::bitmap(config.layout)
        };
        Ok((machine, vcpus, log))
    }

    /// Masks the two PICs, for a guest that is told there are none. KVM wires every line to them too,
    /// and what they let through comes as a vector that nobody has programmed.
    ///
    /// # Errors
    ///
    /// What KVM says.
    pub fn mask_pics(&self) -> Result<(), KvmError> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            timed(|| self.vm.get_irqchip(&mut chip)).map_err(KvmError::ioctl("KVM_GET_IRQCHIP"))?;
            chip.chip.pic.imr = 0xff;
            timed(|| self.vm.set_irqchip(&chip)).map_err(KvmError::ioctl("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Interrupts the guest once, by an edge on line `gsi`. It is there when this returns: an irqfd would
    /// save a call, but for a line of the I/O APIC leaves the rest to a worker of the kernel
    /// (`irqfd_wakeup` in virt/kvm/eventfd.c, Linux 6.1: only messages are delivered at once).
    ///
    /// # Errors
    ///
    /// What KVM says.
    pub fn pulse(&self, gsi: u32) -> Result<(), KvmError> {
        for level in [true, false] {
            timed(|| self.vm.set_irq_line(gsi, level)).map_err(KvmError::ioctl("KVM_IRQ_LINE"))?;
        }
        Ok(())
    }

    /// KVM's own statistics, over all vCPUs: name and sum. None if this KVM keeps none.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn statistics(&self) -> Result<BTreeMap<String, u64>, KvmError> {
        let mut sums = BTreeMap::new();
        for vcpu in &self.statistics {
            for (name, value) in vcpu.read()? {
                *sums.entry(name).or_default() += value;
            }
        }
        Ok(sums)
    }

    /// Reads the local APIC of vCPU `index` again, whose thread has saved the rest and is in no call to
    /// KVM: another vCPU may have sent it an interrupt since.
    ///
    /// # Errors
    ///
    /// What `KVM_GET_LAPIC` says.
    pub fn save_lapic_again(&self, index: usize, state: &mut VcpuState) -> Result<(), KvmError> {
        let Some(vcpu) = self.vcpus.get(index) else { return Ok(()) };
        // SAFETY: the descriptor is a vCPU's, and KVM writes a `kvm_lapic_state`.
        let result =
            timed(|| unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_LAPIC, &raw mut state.lapic) });
        if result < 0 {
            let source = std::io::Error::last_os_error();
            return Err(KvmError::Ioctl { name: "KVM_GET_LAPIC", source });
        }
        Ok(())
    }

    fn set_memslots(&self, mapping: &Mapping, track: bool) -> Result<(), KvmError> {
        for (slot, range) in (0_u32..).zip(self.config.layout.ranges()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if track { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: range.start,
                memory_size: range.len,
                userspace_addr: mapping.address().as_ptr() as u64 + range.offset,
            };
            // SAFETY: the range lies inside the mapping (the layout is as long as the mapping),
            // which outlives the machine by the contract of `new`; slots do not overlap.
            timed(|| unsafe { self.vm.set_user_memory_region(region) })
                .map_err(KvmError::ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Starts dirty tracking on a machine made without it, or ends it again.
    ///
    /// # Errors
    ///
    /// What `KVM_SET_USER_MEMORY_REGION` says.
    pub fn track(&self, mapping: &Mapping, on: bool) -> Result<(), KvmError> {
        self.set_memslots(mapping, on)
    }

    /// The VM's descriptor, for the dirty log.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Saves what is not part of a vCPU. All vCPUs are stopped, and the first, `boot`, has not run:
    /// its guest has set no TSC yet.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub fn save(&self, boot: &Vcpu, state: &mut VmState) -> Result<(), KvmError> {
        self.save_irqchips(state)?;
        self.save_clock(state)?;
        state.tsc_offset = match boot.tsc_offset() {
            Some(offset) => [offset, 1],
            None => [0, 0],
        };
        Ok(())
    }

    /// Saves the interrupt controllers alone: clock and TSC offset do not change by themselves.
    ///
    /// # Errors
    ///
    /// What `KVM_GET_IRQCHIP` says.
    pub fn save_irqchips(&self, state: &mut VmState) -> Result<(), KvmError> {
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        for (chip, id) in state.irqchips.iter_mut().zip(chips) {
            chip.chip_id = id;
            timed(|| self.vm.get_irqchip(chip)).map_err(KvmError::ioctl("KVM_GET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Reads the guest's kvmclock and the host's clocks at the same moment.
    ///
    /// # Errors
    ///
    /// What `KVM_GET_CLOCK` says.
    pub fn save_clock(&self, state: &mut VmState) -> Result<(), KvmError> {
        state.clock = timed(|| self.vm.get_clock()).map_err(KvmError::ioctl("KVM_GET_CLOCK"))?;
        state.clock_read_ns = now_ns();
        Ok(())
    }

    /// Sets the interrupt controllers.
    ///
    /// # Errors
    ///
    /// What `KVM_SET_IRQCHIP` says.
    pub fn restore_irqchips(&self, state: &VmState) -> Result<(), KvmError> {
        for chip in &state.irqchips {
            timed(|| self.vm.set_irqchip(chip)).map_err(KvmError::ioctl("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Sets clock and TSC offset, so that guest time goes on without a step: the clock is set from
    /// a pair (guest clock, host wall clock), to which KVM adds the time since.
    ///
    /// # Errors
    ///
    /// What `KVM_SET_CLOCK` or `KVM_SET_DEVICE_ATTR` says.
    pub fn restore_clocks(&self, vcpus: &mut [Vcpu], state: &VmState) -> Result<(), KvmError> {
        if let [offset, 1] = state.tsc_offset {
            for vcpu in vcpus {
                vcpu.begin_at_tsc_offset(offset)?;
            }
        }
        let mut clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        if state.clock.flags & CLOCK_REALTIME != 0 {
            clock.realtime = state.clock.realtime;
            clock.flags = CLOCK_REALTIME;
        } else {
            // No exact pair on this host (an unstable TSC, or Linux before 5.16).
            clock.clock += now_ns() - state.clock_read_ns;
        }
        timed(|| self.vm.set_clock(&clock)).map_err(KvmError::ioctl("KVM_SET_CLOCK"))
    }
}
