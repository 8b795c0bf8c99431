//! One virtual processor.
#![expect(
    unsafe_code,
    reason = "ioctls that are not wrapped, and the immediate_exit byte shared with other threads"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use super::calls::{exited, timed};
use super::host::{Host, MSR_TSC_ADJUST};
use super::{KvmError, VcpuState, broken};

/// Exits that one instruction may need to come to its end.
const MOST_EXITS: u32 = 4096;

/// A vCPU and the buffers that saving and restoring it need, so that neither allocates.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "what a host can do is yes or no")]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    index: u32,
    msrs: Msrs,
    xsave2: bool,
    /// Whether the machine runs by SVM.
    svm: bool,
    /// Whether there are extended control registers.
    xcrs: bool,
    xsave_bytes: u32,
    /// Where `IA32_TSC_ADJUST` is in the list of MSRs.
    tsc_adjust: Option<usize>,
    /// TSC offset while `IA32_TSC_ADJUST` is 0, if it is known.
    tsc_base: Option<u64>,
    /// The last exit was an access whose instruction KVM finishes at the next entry.
    unfinished: bool,
    /// The last exit was an access, and nothing but finishing it has happened since.
    accessed: bool,
}

/// Makes a vCPU leave the guest, from any thread.
#[derive(Clone, Copy, Debug)]
pub struct Kick {
    immediate_exit: *const AtomicU8,
}

// SAFETY: the byte lies in the kvm_run page, which the vCPU's thread and KVM also access only as a
// single byte; whoever holds a Kick keeps the Vcpu alive (see `Vcpu::kick`).
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// The next `KVM_RUN` returns at once, and the one under way does after a signal.
    pub fn arm(self) {
        // SAFETY: the page is mapped as long as the vCPU lives, see `Vcpu::kick`.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
    }

    /// Takes [`Kick::arm`] back. Only the vCPU's own thread does this.
    pub fn disarm(self) {
        // SAFETY: as in `arm`.
        unsafe { &*self.immediate_exit }.store(0, Ordering::SeqCst);
    }
}

impl Vcpu {
    pub(super) fn new(host: &Host, mut fd: VcpuFd, index: u32) -> Result<Self, KvmError> {
        timed(|| fd.set_cpuid2(&host.cpuid_of(index)))
            .map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
        for set in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            fd.set_sync_valid_reg(set);
        }
        let entries: Vec<_> = host
            .msrs
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let no_room = |what| {
            move |_| KvmError::TooLarge { what, needed: host.msrs.len(), room: super::MAX_MSRS }
        };
        let msrs = Msrs::from_entries(&entries).map_err(no_room("the MSR list"))?;
        Ok(Self {
            fd,
            index,
            msrs,
            xsave2: host.xsave2,
            svm: host.svm,
            xcrs: host.xcrs,
            xsave_bytes: host.xsave_bytes,
            tsc_adjust: host.msrs.iter().position(|msr| *msr == MSR_TSC_ADJUST),
            tsc_base: None,
            unfinished: false,
            accessed: false,
        })
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// A handle to stop it. It is used only while this vCPU lives.
    pub fn kick(&mut self) -> Kick {
        let run = self.fd.get_kvm_run();
        Kick { immediate_exit: (&raw const run.immediate_exit).cast() }
    }

    /// Leaves the instruction of the last port or memory access to be finished, enters the guest,
    /// and returns the next exit; `None` if a kick or a signal ended it.
    ///
    /// # Errors
    ///
    /// What `KVM_RUN` says.
    pub fn run(&mut self) -> Result<Option<VcpuExit<'_>>, KvmError> {
        self.unfinished = false;
        self.accessed = false;
        let reason = &raw const self.fd.get_kvm_run().exit_reason;
        match self.fd.run() {
            Ok(exit) => {
                // SAFETY: in the `kvm_run` page, which is mapped as long as the vCPU lives; what the exit
                // borrows of it lies elsewhere.
                exited(Some(unsafe { reason.read_volatile() }));
                self.unfinished = matches!(
                    exit,
                    VcpuExit::IoIn(..)
                        | VcpuExit::IoOut(..)
                        | VcpuExit::MmioRead(..)
                        | VcpuExit::MmioWrite(..)
                        | VcpuExit::Hypercall(..)
                        | VcpuExit::X86Rdmsr(..)
                        | VcpuExit::X86Wrmsr(..)
                );
                self.accessed = self.unfinished;
                Ok(Some(exit))
            }
            Err(error) => {
                exited(None);
                match error.errno() {
                    libc::EINTR | libc::EAGAIN => Ok(None),
                    _ => Err(KvmError::ioctl("KVM_RUN")(error)),
                }
            }
        }
    }

    /// Finishes the instruction of the last exit without running another one. Until then the
    /// registers that KVM shows are those before the access (Documentation/virt/kvm/api.rst, 5).
    ///
    /// # Errors
    ///
    /// What `KVM_RUN` says; it is an error if it does not stop at once.
    pub fn settle(&mut self) -> Result<(), KvmError> {
        let kick = self.kick();
        // Finishing one access can need another exit (a string instruction on a device). The guest
        // says how often, so there is an end to it.
        for _ in 0..MOST_EXITS {
            if !self.unfinished {
                return Ok(());
            }
            kick.arm();
            let finished = match self.run() {
                Ok(None) => Ok(true),
                Ok(Some(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data))) => {
                    data.fill(0xff);
                    Ok(false)
                }
                Ok(Some(_)) => Ok(false),
                Err(error) => Err(error),
            };
            kick.disarm();
            if finished? {
                self.accessed = true;
                return Ok(());
            }
        }
        Err(KvmError::ioctl("KVM_RUN")(kvm_ioctls::Error::new(libc::ELOOP)))
    }

    /// Where the guest is, for messages: as of the last exit.
    #[must_use]
    pub fn whereabouts(&self) -> String {
        let sync = self.fd.sync_regs();
        let (regs, sregs) = (&sync.regs, &sync.sregs);
        format!(
            "rip {:#x}, rsp {:#x}, cr2 {:#x}, cr3 {:#x}",
            regs.rip, regs.rsp, sregs.cr2, sregs.cr3
        )
    }

    /// What KVM said when it gave up: after an exit by `KVM_EXIT_INTERNAL_ERROR`.
    #[must_use]
    pub fn internal_error(&mut self) -> String {
        // SAFETY: all members of the union are plain integers and arrays of them, so whatever KVM put
        // there is a value of this one; the page is as long as the structure.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        broken::internal_error(internal.suberror, internal.ndata, &internal.data)
    }

    /// Goes all the way to the guest's door and back without running an instruction.
    ///
    /// # Errors
    ///
    /// What `KVM_RUN` says.
    pub fn warm_up(&mut self) -> Result<(), KvmError> {
        let kick = self.kick();
        kick.arm();
        let result = self.run().map(|_| ());
        kick.disarm();
        result
    }

    /// Puts the state but for debug and extended control registers into `state`: on the fork path
    /// those follow while the child takes in the others.
    ///
    /// General, segment and control registers and events come from the `kvm_run` page: KVM left
    /// them there when the vCPU last returned, so the caller has [`Vcpu::settle`]d it.
    ///
    /// # Errors
    ///
    /// The ioctl that failed; [`KvmError::ShortMsrs`] if an MSR could not be read.
    pub fn save_most(&mut self, state: &mut VcpuState) -> Result<(), KvmError> {
        let sync = self.fd.sync_regs();
        state.regs = sync.regs;
        state.sregs = sync.sregs;
        state.events = sync.events;
        self.save_xsave(state)?;
        self.save_msrs(state)?;
        state.lapic = timed(|| self.fd.get_lapic()).map_err(KvmError::ioctl("KVM_GET_LAPIC"))?;
        // A vCPU whose last exit was an access of its own was running.
        state.mp = if self.accessed {
            kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE }
        } else {
            timed(|| self.fd.get_mp_state()).map_err(KvmError::ioctl("KVM_GET_MP_STATE"))?
        };
        Ok(())
    }

    /// Puts what hardly ever changes into `state`: what [`Vcpu::save_most`] leaves out.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub fn save_rest(&mut self, state: &mut VcpuState) -> Result<(), KvmError> {
        state.debug =
            timed(|| self.fd.get_debug_regs()).map_err(KvmError::ioctl("KVM_GET_DEBUGREGS"))?;
        if self.xcrs {
            state.xcrs = timed(|| self.fd.get_xcrs()).map_err(KvmError::ioctl("KVM_GET_XCRS"))?;
        }
        Ok(())
    }

    /// Puts the whole state into `state`.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::save_most`] and [`Vcpu::save_rest`].
    pub fn save(&mut self, state: &mut VcpuState) -> Result<(), KvmError> {
        self.save_most(state)?;
        self.save_rest(state)
    }

    fn save_xsave(&self, state: &mut VcpuState) -> Result<(), KvmError> {
        let (name, request) =
            if self.xsave2 { ("KVM_GET_XSAVE2", GET_XSAVE2) } else { ("KVM_GET_XSAVE", GET_XSAVE) };
        // SAFETY: the descriptor is a vCPU. KVM writes 4096 bytes with KVM_GET_XSAVE and as many
        // as KVM_CAP_XSAVE2 says with KVM_GET_XSAVE2; `Host::open` refused a host with more than
        // the MAX_XSAVE bytes that the destination has.
        unsafe { self.ioctl(name, request, state.xsave.as_mut_ptr().cast()) }?;
        state.xsave_bytes = self.xsave_bytes;
        Ok(())
    }

    fn save_msrs(&mut self, state: &mut VcpuState) -> Result<(), KvmError> {
        let requested = self.msrs.as_slice().len();
        let applied =
            timed(|| self.fd.get_msrs(&mut self.msrs)).map_err(KvmError::ioctl("KVM_GET_MSRS"))?;
        if applied != requested {
            let index = self.msrs.as_slice()[applied].index;
            return Err(KvmError::ShortMsrs { name: "KVM_GET_MSRS", applied, requested, index });
        }
        state.msrs[..requested].copy_from_slice(self.msrs.as_slice());
        state.msr_count = u32::try_from(requested).unwrap_or(0);
        Ok(())
    }

    /// Sets what differs between `to` and `from`, the state that this vCPU is known to have; all of
    /// it without `from`. Registers are handed over in the `kvm_run` page with the next entry.
    ///
    /// # Errors
    ///
    /// The ioctl that failed; [`KvmError::ShortMsrs`] if an MSR was refused.
    pub fn restore(&mut self, to: &VcpuState, from: Option<&VcpuState>) -> Result<(), KvmError> {
        if self.xcrs && from.is_none_or(|from| to.xcrs != from.xcrs) {
            timed(|| self.fd.set_xcrs(&to.xcrs)).map_err(KvmError::ioctl("KVM_SET_XCRS"))?;
        }
        self.restore_most(to, from)?;
        self.restore_debug(to, from)
    }

    /// Sets what [`Vcpu::save_rest`] saved, after [`Vcpu::restore_most`] on a vCPU that was in the
    /// state `from`.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub fn restore_rest(&mut self, to: &VcpuState, from: &VcpuState) -> Result<(), KvmError> {
        if self.xcrs && to.xcrs != from.xcrs {
            timed(|| self.fd.set_xcrs(&to.xcrs)).map_err(KvmError::ioctl("KVM_SET_XCRS"))?;
            // Checked against the control register when it was set, so it is set again.
            self.restore_xsave(to)?;
        }
        self.restore_debug(to, Some(from))
    }

    fn restore_debug(&self, to: &VcpuState, from: Option<&VcpuState>) -> Result<(), KvmError> {
        if from.is_none_or(|from| to.debug != from.debug) {
            timed(|| self.fd.set_debug_regs(&to.debug))
                .map_err(KvmError::ioctl("KVM_SET_DEBUGREGS"))?;
        }
        Ok(())
    }

    /// As [`Vcpu::restore`], but for debug and extended control registers.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::restore`].
    pub fn restore_most(
        &mut self,
        to: &VcpuState,
        from: Option<&VcpuState>,
    ) -> Result<(), KvmError> {
        let differs =
            |same: fn(&VcpuState, &VcpuState) -> bool| from.is_none_or(|from| !same(to, from));
        if differs(|a, b| a.xsave() == b.xsave()) {
            self.restore_xsave(to)?;
        }
        if differs(|a, b| a.sregs == b.sregs) {
            // By ioctl and not with the next entry, because MSRs and LAPIC depend on it.
            self.set_sregs(&to.sregs)?;
        }
        if differs(|a, b| a.lapic == b.lapic) {
            timed(|| self.fd.set_lapic(&to.lapic)).map_err(KvmError::ioctl("KVM_SET_LAPIC"))?;
        }
        if differs(|a, b| a.msrs() == b.msrs()) {
            self.restore_msrs(to)?;
            self.restore_tsc(to, from)?;
        }
        if differs(|a, b| a.mp == b.mp) {
            timed(|| self.fd.set_mp_state(to.mp)).map_err(KvmError::ioctl("KVM_SET_MP_STATE"))?;
        }
        let sync = self.fd.sync_regs_mut();
        sync.regs = to.regs;
        sync.events = to.events;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        if differs(|a, b| a.events == b.events) {
            self.fd.set_sync_dirty_reg(SyncReg::VcpuEvents);
        }
        self.unfinished = false;
        Ok(())
    }

    fn set_sregs(&self, sregs: &kvm_bindings::kvm_sregs) -> Result<(), KvmError> {
        let mut sregs = *sregs;
        if self.svm && sregs.tr.type_ == TSS_BUSY {
            // SVM does not show the busy bit, so KVM adds it (svm_get_segment, Linux 6.1). Set, it
            // would stay, and QEMU's SVM then refuses ports to user mode, whatever the TSS allows.
            sregs.tr.type_ = TSS_AVAILABLE;
        }
        timed(|| self.fd.set_sregs(&sregs)).map_err(KvmError::ioctl("KVM_SET_SREGS"))
    }

    fn restore_xsave(&self, to: &VcpuState) -> Result<(), KvmError> {
        if to.xsave_bytes != self.xsave_bytes {
            return Err(KvmError::TooLarge {
                what: "the extended register area",
                needed: to.xsave_bytes as usize,
                room: self.xsave_bytes as usize,
            });
        }
        // SAFETY: the descriptor is a vCPU, and KVM reads at most as many bytes as KVM_CAP_XSAVE2
        // says, which is no more than the MAX_XSAVE bytes of the source.
        unsafe { self.ioctl("KVM_SET_XSAVE", SET_XSAVE, to.xsave.as_ptr().cast_mut().cast()) }
    }

    /// An ioctl on the vCPU that kvm-ioctls does not wrap in the form needed here.
    ///
    /// # Safety
    ///
    /// `argument` is what `request` reads or writes.
    unsafe fn ioctl(
        &self,
        name: &'static str,
        request: libc::c_ulong,
        argument: *mut libc::c_void,
    ) -> Result<(), KvmError> {
        // SAFETY: by this function's contract.
        let result = timed(|| unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) });
        if result < 0 {
            Err(KvmError::Ioctl { name, source: io::Error::last_os_error() })
        } else {
            Ok(())
        }
    }

    fn restore_msrs(&mut self, to: &VcpuState) -> Result<(), KvmError> {
        let requested = self.msrs.as_slice().len();
        let from = to.msrs();
        if from.len() != requested {
            return Err(KvmError::TooLarge {
                what: "the MSR list",
                needed: from.len(),
                room: requested,
            });
        }
        self.msrs.as_mut_slice().copy_from_slice(from);
        let applied =
            timed(|| self.fd.set_msrs(&self.msrs)).map_err(KvmError::ioctl("KVM_SET_MSRS"))?;
        if applied == requested {
            Ok(())
        } else {
            let index = from[applied].index;
            Err(KvmError::ShortMsrs { name: "KVM_SET_MSRS", applied, requested, index })
        }
    }

    /// Moves the TSC by what the guest has moved it. A guest's write to its TSC or to
    /// `IA32_TSC_ADJUST` changes the latter and the offset by the same amount, but ours to that MSR
    /// leaves the offset as it is (`kvm_set_msr_common` in arch/x86/kvm/x86.c, Linux 6.18); so the
    /// MSR, which is part of the state anyway, says what the offset has to be.
    fn restore_tsc(&self, to: &VcpuState, from: Option<&VcpuState>) -> Result<(), KvmError> {
        let (Some(index), Some(base)) = (self.tsc_adjust, self.tsc_base) else { return Ok(()) };
        let adjust = |state: &VcpuState| state.msrs().get(index).map_or(0, |entry| entry.data);
        let adjusted = adjust(to);
        if adjusted == from.map_or(0, adjust) {
            return Ok(());
        }
        self.set_tsc_offset(base.wrapping_add(adjusted))
    }

    /// Sets one MSR.
    ///
    /// # Errors
    ///
    /// [`KvmError::ShortMsrs`] if it is refused.
    pub fn set_msr(&self, index: u32, data: u64) -> Result<(), KvmError> {
        let one = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
            .map_err(|_| KvmError::TooLarge { what: "the MSR list", needed: 1, room: 0 })?;
        match timed(|| self.fd.set_msrs(&one)).map_err(KvmError::ioctl("KVM_SET_MSRS"))? {
            1 => Ok(()),
            applied => {
                Err(KvmError::ShortMsrs { name: "KVM_SET_MSRS", applied, requested: 1, index })
            }
        }
    }

    /// Makes it run at its next entry, whatever it waited for.
    ///
    /// # Errors
    ///
    /// What `KVM_SET_MP_STATE` says.
    pub fn set_runnable(&self) -> Result<(), KvmError> {
        let state = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
        timed(|| self.fd.set_mp_state(state)).map_err(KvmError::ioctl("KVM_SET_MP_STATE"))
    }

    /// Guest TSC frequency in kHz.
    ///
    /// # Errors
    ///
    /// What `KVM_GET_TSC_KHZ` says.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        timed(|| self.fd.get_tsc_khz()).map_err(KvmError::ioctl("KVM_GET_TSC_KHZ"))
    }

    /// What has to be added to the host's TSC to get the guest's, in ticks (wrapping);
    /// `None` where KVM does not tell (`KVM_VCPU_TSC_OFFSET`, Linux 5.16).
    #[must_use]
    pub fn tsc_offset(&self) -> Option<u64> {
        let mut offset = 0_u64;
        let attr = tsc_offset_attr(&raw mut offset);
        let argument = (&raw const attr).cast_mut().cast();
        // SAFETY: KVM reads the attribute and writes the u64 that its `addr` points to; both
        // outlive the call.
        unsafe { self.ioctl("KVM_GET_DEVICE_ATTR", GET_DEVICE_ATTR, argument) }.ok()?;
        Some(offset)
    }

    /// Sets what [`Vcpu::tsc_offset`] gave on another machine of this host: guest time goes on
    /// without a step, however long the hand-over took. It belongs to an `IA32_TSC_ADJUST` of 0,
    /// which this vCPU has, and is changed with it by [`Vcpu::restore`].
    ///
    /// # Errors
    ///
    /// What `KVM_SET_DEVICE_ATTR` says.
    pub fn begin_at_tsc_offset(&mut self, offset: u64) -> Result<(), KvmError> {
        self.set_tsc_offset(offset)?;
        self.tsc_base = Some(offset);
        Ok(())
    }

    fn set_tsc_offset(&self, mut offset: u64) -> Result<(), KvmError> {
        let attr = tsc_offset_attr(&raw mut offset);
        let argument = (&raw const attr).cast_mut().cast();
        // SAFETY: KVM reads the attribute and the u64 that its `addr` points to; both outlive the
        // call.
        unsafe { self.ioctl("KVM_SET_DEVICE_ATTR", SET_DEVICE_ATTR, argument) }
    }

    /// State of the `kvm_run` page's registers, for [`super::Machine`] and boot code.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub fn boot(
        &mut self,
        regs: &kvm_bindings::kvm_regs,
        change: impl FnOnce(&mut kvm_bindings::kvm_sregs),
    ) -> Result<(), KvmError> {
        let mut sregs = timed(|| self.fd.get_sregs()).map_err(KvmError::ioctl("KVM_GET_SREGS"))?;
        change(&mut sregs);
        self.set_sregs(&sregs)?;
        timed(|| self.fd.set_regs(regs)).map_err(KvmError::ioctl("KVM_SET_REGS"))
    }
}

/// Types of a 64-bit task state segment.
const TSS_AVAILABLE: u8 = 9;
const TSS_BUSY: u8 = 11;
/// `_IOR(KVMIO, 0xa4, struct kvm_xsave)`.
const GET_XSAVE: libc::c_ulong = 0x9000_aea4;
/// `_IOW(KVMIO, 0xa5, struct kvm_xsave)`; the structure's real length is that of `KVM_GET_XSAVE2`.
const SET_XSAVE: libc::c_ulong = 0x5000_aea5;
/// `_IOR(KVMIO, 0xcf, struct kvm_xsave)`.
const GET_XSAVE2: libc::c_ulong = 0x9000_aecf;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`.
const SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`.
const GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

fn tsc_offset_attr(offset: *mut u64) -> kvm_bindings::kvm_device_attr {
    kvm_bindings::kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr: offset as u64,
        flags: 0,
    }
}
