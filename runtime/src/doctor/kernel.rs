//! What the rest of the kernel offers, and how it is set up.
#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::device::virtio::Ring;
use crate::memory::{BackingKind, Image};
use crate::sys::{self, SysError, chain};

/// Descriptors that the owner of 1,000 instances needs, two each.
const DESCRIPTORS: u64 = 2_200;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const GOVERNOR: &str = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor";

pub(super) fn examine(checks: &mut Vec<Check>) {
    checks.push(sealing());
    checks.push(userfaultfd());
    checks.push(io_uring());
    checks.push(realtime());
    checks.push(processors());
    checks.push(descriptors());
    checks.push(huge_pool());
    checks.push(shmem_thp());
    checks.extend(governor());
}

fn sealing() -> Check {
    let name = "memfd sealing";
    let image = Image::new(BackingKind::Small, 2 << 20);
    match image.and_then(|image| image.seal().map_err(|unsealed| unsealed.error)) {
        Ok(_) => Check::ok(name, "works"),
        Err(error) => Check::fail(name, chain(&error), "boot a kernel with CONFIG_MEMFD_CREATE"),
    }
}

/// As the fork engine opens it: for faults of user mode, which needs no privilege.
fn userfaultfd() -> Check {
    const USER_MODE_ONLY: libc::c_int = 1;
    let name = "userfaultfd";
    // SAFETY: takes flags and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: a new descriptor that nobody else owns.
            let file: OwnedFd = unsafe { sys::adopt(fd) };
            drop(file);
            Check::ok(name, "works: dirty pages are placed without a fault")
        }
        _ => Check::warn(
            name,
            format!("{}; dirty pages cost twice as much", chain(&SysError::last("userfaultfd"))),
            "boot a kernel with CONFIG_USERFAULTFD, or let the container use the call",
        ),
    }
}

/// As the devices of a Linux guest use it; bare guests do without.
fn io_uring() -> Check {
    let name = "io_uring";
    match Ring::new() {
        Ok(_) => Check::ok(name, "works"),
        Err(error) => Check::warn(
            name,
            format!("{}; Linux guests do not start", chain(&error)),
            "set the sysctl kernel.io_uring_disabled to 0, let the container make the call, or boot \
             Linux 5.13 or later",
        ),
    }
}

fn realtime() -> Check {
    let name = "SCHED_FIFO";
    // On a thread of its own: whatever happens, this one keeps its policy.
    let result = std::thread::spawn(|| sys::set_policy(sys::Policy::Realtime)).join();
    match result {
        Ok(Ok(())) => Check::ok(name, "allowed: a standby is not kept waiting by other processes"),
        _ => Check::warn(
            name,
            "not allowed; forks wait for other processes now and then (p99)",
            "set `@kvm - rtprio 1` in /etc/security/limits.conf, or give CAP_SYS_NICE",
        ),
    }
}

fn processors() -> Check {
    let name = "processors";
    let count = sys::affinity().count_ones();
    if count > 1 {
        Check::ok(name, format!("{count}"))
    } else {
        Check::warn(
            name,
            "one; parent and child take turns during a fork",
            "let this process use a second one",
        )
    }
}

/// `runtime run` raises the soft limit to the hard one.
fn descriptors() -> Check {
    let name = "RLIMIT_NOFILE";
    match getrlimit(Resource::Nofile).maximum {
        Some(most) if most < DESCRIPTORS => Check::warn(
            name,
            format!("at most {most} descriptors: enough for {} live instances", most / 2),
            "raise `nofile` in /etc/security/limits.conf",
        ),
        Some(most) => Check::ok(name, format!("up to {most}")),
        None => Check::ok(name, "no limit"),
    }
}

fn huge_pool() -> Check {
    let name = "hugetlb pool";
    let read = |file: &str| -> Option<u64> {
        fs::read_to_string(format!("{POOL}/{file}")).ok()?.trim().parse().ok()
    };
    let advice = "only needed for --backing hugetlb: write a number to /proc/sys/vm/nr_hugepages";
    match (read("free_hugepages"), read("nr_hugepages")) {
        (Some(free), Some(total)) if total > 0 => {
            Check::ok(name, format!("{free} of {total} pages of 2 MiB are free"))
        }
        (Some(_), Some(_)) => Check::warn(name, "empty", advice),
        _ => Check::warn(name, "this kernel has none", "only needed for --backing hugetlb"),
    }
}

fn shmem_thp() -> Check {
    let name = "shmem THP";
    // The backing's own check; it looks at the setting alone.
    match BackingKind::Thp.backing().check(0) {
        Ok(()) => Check::ok(name, "on"),
        Err(_) => Check::warn(
            name,
            "off; --backing thp falls back to pages of 4 KiB",
            "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

/// Nothing where the frequency is not this kernel's affair.
fn governor() -> Option<Check> {
    let name = "CPU governor";
    let governor = fs::read_to_string(GOVERNOR).ok()?;
    let governor = governor.trim();
    Some(if governor == "performance" {
        Check::ok(name, governor)
    } else {
        let advice = "for steady figures: cpupower frequency-set -g performance";
        Check::warn(name, format!("{governor}; a parked standby wakes on a slow processor"), advice)
    })
}
