//! `/dev/kvm` and what it offers.

use kvm_ioctls::Kvm;

use super::{Check, Report};
use crate::kvm::{Host, KvmError, NEWER_KERNEL, Needed, needed};
use crate::sys::chain;

/// The only version that there ever was (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// `KVM_CAP_XSAVE2`.
const XSAVE2: std::ffi::c_ulong = 208;
/// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.
const RING: std::ffi::c_ulong = 223;
/// `KVM_CAP_X86_TRIPLE_FAULT_EVENT`.
const TRIPLE_FAULT_EVENT: std::ffi::c_ulong = 218;
/// `KVM_CAP_VCPU_ATTRIBUTES`, by which the TSC offset is read and set.
const VCPU_ATTRIBUTES: std::ffi::c_ulong = 127;
pub(super) fn examine(report: &mut Report) {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            report.denied = matches!(error.errno(), libc::EACCES | libc::EPERM);
            report.checks.push(closed(error.errno()));
            return;
        }
    };
    let version = kvm.get_api_version();
    report.checks.push(if version == API_VERSION {
        Check::ok("/dev/kvm", format!("opens, API version {version}"))
    } else {
        let found = format!("API version {version} instead of {API_VERSION}");
        Check::fail("/dev/kvm", found, "load the kvm module of this kernel")
    });
    for Needed { name, purpose, found } in needed(&kvm) {
        report.checks.push(if found {
            Check::ok(name, purpose)
        } else {
            Check::fail(name, format!("missing; needed for {purpose}"), NEWER_KERNEL)
        });
    }
    useful(&kvm, &mut report.checks);
    // What the engine itself asks for before it starts.
    if report.forks_work()
        && let Err(error) = Host::open()
    {
        report.checks.push(Check::fail("KVM", chain(&error), NEWER_KERNEL));
    }
}

fn closed(errno: i32) -> Check {
    let source = std::io::Error::from_raw_os_error(errno);
    let advice = match errno {
        libc::ENOENT => {
            "switch virtualisation on in the firmware, or for this machine if it is virtual; then \
             load kvm_intel or kvm_amd"
        }
        libc::EACCES | libc::EPERM => {
            "add this user to the group kvm (as root: usermod -aG kvm USER) and log in again"
        }
        libc::ENODEV | libc::ENXIO => "load kvm_intel or kvm_amd; see the kernel log",
        _ => "see the kernel log",
    };
    let error = KvmError::Open { source };
    Check::fail("/dev/kvm", format!("does not open: {}", root_cause(&error)), advice)
}

fn root_cause(error: &KvmError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn useful(kvm: &Kvm, checks: &mut Vec<Check>) {
    let raw = |cap| kvm.check_extension_raw(cap);
    let entries = raw(RING).max(0) / 16;
    checks.push(if entries > 0 {
        Check::ok("dirty ring", format!("up to {entries} entries"))
    } else {
        Check::warn(
            "dirty ring",
            "missing; the bitmap is used, whose cost grows with guest memory",
            "boot Linux 6.1 or later",
        )
    });
    checks.push(if raw(XSAVE2) > 0 {
        Check::ok("KVM_CAP_XSAVE2", format!("{} bytes of extended registers", raw(XSAVE2)))
    } else {
        Check::warn("KVM_CAP_XSAVE2", "missing; guests get no AMX", "boot Linux 5.17 or later")
    });
    checks.push(if raw(TRIPLE_FAULT_EVENT) > 0 {
        Check::ok("TRIPLE_FAULT_EVENT", "a crash in a rehearsal is not taken over by the child")
    } else {
        Check::warn(
            "TRIPLE_FAULT_EVENT",
            "missing; a crash in a rehearsal can end the child, once in a great many forks",
            "boot Linux 6.1 or later",
        )
    });
    checks.push(if raw(VCPU_ATTRIBUTES) > 0 {
        Check::ok("KVM_VCPU_TSC_OFFSET", "a child's TSC goes on without a step")
    } else {
        Check::warn(
            "KVM_VCPU_TSC_OFFSET",
            "missing; a child's TSC may step",
            "boot Linux 5.16 or later",
        )
    });
}
