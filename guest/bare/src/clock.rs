//! kvmclock (Documentation/virt/kvm/x86/msr.rst, `MSR_KVM_SYSTEM_TIME_NEW`).
#![expect(unsafe_code, reason = "KVM writes the clock: only volatile accesses are allowed")]

use core::ptr;

use guest_abi::entry;

use crate::{cpu, error::Bad};

/// Readings of a clock under update before it counts as broken. KVM updates it on the vCPU's own
/// way into the guest, so the vCPU that it belongs to never has to retry even once.
const MAX_TRIES: u32 = 1000;

/// Nanoseconds of `vcpu`'s kvmclock; 0 if the runtime has not switched it on.
pub(crate) fn now_ns(vcpu: u64) -> Result<u64, Bad> {
    for _ in 0..MAX_TRIES {
        // `pvclock_vcpu_time_info`: version and padding, TSC stamp, system time, then the scale.
        let [before, stamp, system_ns, scale] = read(vcpu);
        if before == 0 {
            return Ok(0);
        }
        let ticks = cpu::tsc().wrapping_sub(stamp);
        let [after, ..] = read(vcpu);
        if before == after && before & 1 == 0 {
            return Ok(system_ns.wrapping_add(scaled(ticks, scale)));
        }
    }
    Err(Bad::Clock)
}

/// `ticks` in nanoseconds, by a 32-bit multiplier and a signed 8-bit shift.
fn scaled(ticks: u64, scale: u64) -> u64 {
    let [m0, m1, m2, m3, shift, ..] = scale.to_le_bytes();
    let multiplier = u32::from_le_bytes([m0, m1, m2, m3]);
    let shift = shift.cast_signed();
    let distance = u32::from(shift.unsigned_abs());
    let shifted = if shift < 0 {
        ticks.checked_shr(distance).unwrap_or(0)
    } else {
        ticks.checked_shl(distance).unwrap_or(0)
    };
    #[expect(clippy::cast_possible_truncation, reason = "nanoseconds wrap after 584 years")]
    let ns = ((u128::from(shifted) * u128::from(multiplier)) >> 32) as u64;
    ns
}

/// The 32 bytes of the clock, in order: the version is read first.
fn read(vcpu: u64) -> [u64; 4] {
    assert!(vcpu < entry::MAX_VCPUS, "vCPU {vcpu}");
    #[expect(clippy::cast_possible_truncation, reason = "x86-64: addresses are 64 bits wide")]
    let area = ptr::with_exposed_provenance::<u64>(entry::clock(vcpu) as usize);
    [0, 1, 2, 3].map(|word| {
        // SAFETY: the clock areas of all vCPUs are mapped RAM by the memory map, aligned to 64,
        // at least 32 bytes long (`vcpu` was checked), and nothing of Rust's lives there.
        unsafe { area.wrapping_add(word).read_volatile() }
    })
}
