//! The state of one vCPU as plain data, and the order in which KVM takes it.
//!
//! Order of restoring, with reasons (arch/x86/kvm, Linux 6.18):
//!
//! 1. `XCRS` before `XSAVE`: the area is checked against `XCR0`.
//! 2. `SREGS` before `MSRS`: `EFER` and the APIC base decide which MSR writes are legal.
//! 3. `SREGS` before `LAPIC`: the APIC base decides between xAPIC and x2APIC layout.
//! 4. `LAPIC` before the TSC-deadline MSR: a write to it is dropped unless the LAPIC timer is in
//!    deadline mode. `Host` sorts it last in the list and `MSRS` comes after `LAPIC`.
//! 5. `MP_STATE` after `LAPIC`: setting the LAPIC of a halted vCPU may make it runnable.
//! 6. `VCPU_EVENTS` last: `SREGS` clears a pending exception.

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};

/// Room for MSRs in a state.
pub const MAX_MSRS: usize = 192;
/// Room for the extended register area (AMX tile data included).
pub const MAX_XSAVE: usize = 12 * 1024;

/// Everything that KVM holds of one vCPU.
///
/// Plain data: it is written by one process and read by another through shared memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// Local APIC with its timer.
    pub lapic: kvm_lapic_state,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Running, halted, waiting for SIPI.
    pub mp: kvm_mp_state,
    /// Number of `msrs` in use.
    pub msr_count: u32,
    /// MSRs, in the order of the host's list.
    pub msrs: [kvm_msr_entry; MAX_MSRS],
    /// Bytes of `xsave` in use.
    pub xsave_bytes: u32,
    /// FPU, SSE, AVX and further registers.
    pub xsave: [u8; MAX_XSAVE],
}

impl Default for VcpuState {
    fn default() -> Self {
        Self {
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            events: kvm_vcpu_events::default(),
            lapic: kvm_lapic_state::default(),
            xcrs: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            mp: kvm_mp_state::default(),
            msr_count: 0,
            msrs: [kvm_msr_entry::default(); MAX_MSRS],
            xsave_bytes: 0,
            xsave: [0; MAX_XSAVE],
        }
    }
}

impl VcpuState {
    /// The MSRs in use. The count comes from shared memory and is bounded here.
    #[must_use]
    pub fn msrs(&self) -> &[kvm_msr_entry] {
        &self.msrs[..(self.msr_count as usize).min(MAX_MSRS)]
    }

    /// Copies what is in use of `from`.
    pub fn copy_from(&mut self, from: &Self) {
        self.regs = from.regs;
        self.sregs = from.sregs;
        self.events = from.events;
        self.lapic = from.lapic;
        self.xcrs = from.xcrs;
        self.debug = from.debug;
        self.mp = from.mp;
        self.msr_count = from.msr_count;
        self.msrs[..from.msrs().len()].copy_from_slice(from.msrs());
        self.xsave_bytes = from.xsave_bytes;
        self.xsave[..from.xsave().len()].copy_from_slice(from.xsave());
    }

    /// The extended register area in use.
    #[must_use]
    pub fn xsave(&self) -> &[u8] {
        &self.xsave[..(self.xsave_bytes as usize).min(MAX_XSAVE)]
    }
}
