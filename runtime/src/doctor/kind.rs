//! What runs guest code here: found out by running some.
//!
//! Flags in `/proc/cpuinfo` tell nothing: a KVM below which there is no VMX or SVM shows none, and
//! one that emulates SVM shows it. So three programs are timed on a vCPU of their own:
//!
//! | | CPL-0 loop | exit and back |
//! | --- | --- | --- |
//! | direct: user mode runs natively, kernel mode is interpreted (`kvm_pvm`) | 0.7–1.7 M instructions/s | 12–35 µs |
//! | nested: standard KVM, itself in a virtual machine | 200 M/s and more | from 8 µs up to hundreds |
//! | hardware | 2,000 M/s and more | 1–3 µs |
//!
//! Where the lines are drawn, and why there:
//!
//! - **Interpreted below 20 M/s** ([`INTERPRETED_BELOW`]): the geometric middle between KVM's
//!   emulator and the slowest thing that is not an interpreter, a nested guest under a dynamic
//!   translator. Both are a factor of more than ten away.
//! - **Emulated below 1,000 M/s** ([`EMULATED_BELOW`]): `dec` and `jnz` take one cycle together on
//!   every processor with VMX or SVM, so even one at 1 GHz does 2,000 M/s; a dynamic translator
//!   makes several instructions of them.
//! - **Nested from 6 µs** ([`NESTED_FROM_US`]): an exit to user space and back costs 1 to 3 µs on
//!   hardware, mitigations included. One level down each exit is reflected by the outer hypervisor
//!   and costs at least two of its own exits and several emulated VMCS or VMCB accesses.
//!
//! The shortest of several rounds counts: noise only ever adds. The exit alone does not tell direct
//! from nested, nor does the loop alone tell nested from hardware; together they do.

use std::sync::OnceLock;
use std::time::Instant;

use guest_abi::entry::ELF_BASE;
use guest_abi::port;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuExit;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::Check;
use crate::boot::{self, BootError, Loaded};
use crate::kvm::{DirtyMode, Host, KvmError, Machine, MachineConfig, Vcpu};
use crate::memory::{BackingKind, Image, MemoryError, RamLayout, guest_ram};

/// Million instructions a second.
const INTERPRETED_BELOW: f64 = 20.0;
/// Million instructions a second.
const EMULATED_BELOW: f64 = 1000.0;
/// Microseconds.
const NESTED_FROM_US: f64 = 6.0;

/// Iterations of a loop that an interpreter gets through in 5 ms.
const FEW: u32 = 3_000;
/// Iterations of a loop that takes a processor 1 ms, and a dynamic translator 20 ms at most.
const MANY: u32 = 2_000_000;
/// Exits timed one by one.
const EXITS: u32 = 100;
/// Rounds of the loop.
const ROUNDS: u32 = 3;

/// What guest code runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostKind {
    /// User mode is native, kernel mode is interpreted: for bare guests.
    Direct,
    /// Standard KVM below another hypervisor or an emulator: everything runs, exits are slow.
    Nested,
    /// Standard KVM on the processor itself.
    Hardware,
}

impl HostKind {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nested => "nested",
            Self::Hardware => "hardware",
        }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostSpeed {
    /// What it means.
    pub kind: HostKind,
    /// Million instructions a second in CPL 0.
    pub kernel_mips: f64,
    /// Million instructions a second in CPL 3.
    pub user_mips: f64,
    /// Shortest time from one exit over the guest to the next, in µs.
    pub exit_us: f64,
}

/// Why guest code could not be timed.
#[derive(Debug, thiserror::Error)]
pub enum KindError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest could not be set up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The guest did something else than it was told.
    #[error("a loop in CPL {cpl} ended with {exit} instead of a port access")]
    Exit {
        /// Privilege level.
        cpl: u8,
        /// What came.
        exit: String,
    },
}

/// The kind of this host. Measured once in a process; takes less than 100 ms.
///
/// # Errors
///
/// Why no guest code can be run.
pub fn host_kind() -> Result<HostKind, KindError> {
    host_speed().map(|speed| speed.kind)
}

/// The measurement behind [`host_kind`].
///
/// # Errors
///
/// As [`host_kind`].
pub fn host_speed() -> Result<HostSpeed, KindError> {
    static SPEED: OnceLock<HostSpeed> = OnceLock::new();
    if let Some(speed) = SPEED.get() {
        return Ok(*speed);
    }
    let speed = measure()?;
    Ok(*SPEED.get_or_init(|| speed))
}

fn measure() -> Result<HostSpeed, KindError> {
    let host = Host::open()?;
    let layout = RamLayout::new(RamLayout::MIN_MIB);
    let mapping = Image::new(BackingKind::Small, layout.bytes())?.map_shared()?;
    let config = MachineConfig { layout, vcpus: 1, dirty: DirtyMode::Bitmap, ring_entries: 1024 };
    let (machine, mut vcpus, _log) = Machine::new(&host, config, &mapping, false)?;
    let ram = guest_ram(&mapping, &layout)?;
    let loaded = Loaded { entry: ELF_BASE, end: ELF_BASE + 4096 };
    boot::prepare(&ram, &layout, &loaded, 1, 0)?;
    ram.write_slice(&PROGRAM, GuestAddress(ELF_BASE)).map_err(BootError::from)?;
    let Some(vcpu) = vcpus.first_mut() else {
        return Err(KvmError::TooLarge { what: "the machine", needed: 1, room: 0 }.into());
    };
    boot::start(vcpu, &loaded)?;
    let mut guest = Guest { vcpu, cpl: 3 };
    let exit_us = guest.exit_us()?;
    let user_mips = guest.mips(exit_us)?;
    guest.cpl = 0;
    let kernel_mips = guest.mips(exit_us)?;
    drop(vcpus);
    drop(machine);
    let kind = classify(kernel_mips, exit_us);
    Ok(HostSpeed { kind, kernel_mips, user_mips, exit_us })
}

fn classify(kernel_mips: f64, exit_us: f64) -> HostKind {
    if kernel_mips < INTERPRETED_BELOW {
        HostKind::Direct
    } else if kernel_mips < EMULATED_BELOW || exit_us >= NESTED_FROM_US {
        HostKind::Nested
    } else {
        HostKind::Hardware
    }
}

pub(super) fn check(speed: &HostSpeed) -> Check {
    let what = match speed.kind {
        HostKind::Direct => "direct: user mode is native, kernel mode interpreted; for bare guests",
        HostKind::Nested => "nested: everything runs, but each exit costs a detour",
        HostKind::Hardware => "hardware: everything runs natively",
    };
    let HostSpeed { kernel_mips, user_mips, exit_us, .. } = speed;
    let found = format!(
        "{what} (CPL 0 {kernel_mips:.1} M instructions/s, CPL 3 {user_mips:.0} M/s, exit {exit_us:.1} µs)"
    );
    match speed.kind {
        HostKind::Nested => {
            Check::warn("host kind", found, "run on the outermost host if forks are to be fast")
        }
        HostKind::Direct | HostKind::Hardware => Check::ok("host kind", found),
    }
}

/// Counts `ecx` down to 0, then writes to a port again and again.
///
/// ```text
/// 0:  ff c9        dec ecx
/// 2:  75 fc        jnz 0
/// 4:  ef           out dx, eax
/// 5:  eb fd        jmp 4
/// ```
const PROGRAM: [u8; 7] = [0xff, 0xc9, 0x75, 0xfc, 0xef, 0xeb, 0xfd];
/// Instructions of one iteration.
const PER_ITERATION: f64 = 2.0;

struct Guest<'a> {
    vcpu: &'a mut Vcpu,
    cpl: u8,
}

impl Guest<'_> {
    /// Shortest time from one exit to the next, nothing being set in between.
    fn exit_us(&mut self) -> Result<f64, KindError> {
        self.run_us(1)?;
        let mut least = f64::INFINITY;
        for _ in 0..EXITS {
            least = least.min(self.next_exit_us()?);
        }
        Ok(least)
    }

    fn mips(&mut self, exit_us: f64) -> Result<f64, KindError> {
        let few = self.least_us(FEW)? - exit_us;
        // Too short to be an interpreter, and too short to be measured well.
        let (count, us) = if few < f64::from(FEW) * PER_ITERATION / INTERPRETED_BELOW {
            (MANY, self.least_us(MANY)? - exit_us)
        } else {
            (FEW, few)
        };
        Ok(f64::from(count) * PER_ITERATION / us.max(0.001))
    }

    fn least_us(&mut self, iterations: u32) -> Result<f64, KindError> {
        let mut least = f64::INFINITY;
        for _ in 0..ROUNDS {
            least = least.min(self.run_us(iterations)?);
        }
        Ok(least)
    }

    /// Time of one `KVM_RUN` in which the loop is gone through.
    fn run_us(&mut self, iterations: u32) -> Result<f64, KindError> {
        self.vcpu.settle()?;
        let regs = kvm_regs {
            rip: ELF_BASE,
            rcx: iterations.into(),
            rdx: port::READY.into(),
            // IOPL 3; bit 1 is always set.
            rflags: 0x3002,
            ..Default::default()
        };
        let cpl = self.cpl;
        self.vcpu.boot(&regs, |sregs| set_level(sregs, cpl))?;
        self.next_exit_us()
    }

    fn next_exit_us(&mut self) -> Result<f64, KindError> {
        let cpl = self.cpl;
        let begin = Instant::now();
        loop {
            match self.vcpu.run()? {
                Some(VcpuExit::IoOut(..)) => return Ok(begin.elapsed().as_secs_f64() * 1e6),
                // A signal.
                None => {}
                Some(exit) => return Err(KindError::Exit { cpl, exit: format!("{exit:?}") }),
            }
        }
    }
}

/// Flat segments of that level. The page tables let both levels in.
fn set_level(sregs: &mut kvm_sregs, cpl: u8) {
    let (code, data) = if cpl == 0 { (0x10, 0x18) } else { (0x33, 0x2b) };
    sregs.cs.selector = code;
    sregs.cs.dpl = cpl;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        segment.selector = data;
        segment.dpl = cpl;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_hosts_are_told_apart() {
        // kvm_pvm.
        assert_eq!(classify(1.2, 12.0), HostKind::Direct);
        // SVM under QEMU's translator.
        assert_eq!(classify(300.0, 150.0), HostKind::Nested);
        // VMX in a cloud machine.
        assert_eq!(classify(6000.0, 20.0), HostKind::Nested);
        assert_eq!(classify(6000.0, 1.5), HostKind::Hardware);
        assert_eq!(classify(2200.0, 3.0), HostKind::Hardware);
    }
}
