//! What this host lacks for probes, asked before the kernel says no.

use std::fs;

use rustix::thread::CapabilitySet;

use crate::error::ProbeError;

/// The first PID and user namespaces have these numbers in every kernel.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

/// The reason why probes cannot work here, if one is known beforehand.
pub(crate) fn check() -> Result<(), ProbeError> {
    if !is_namespace("user", FIRST_USER_NAMESPACE) {
        return Err(ProbeError::UserNamespace);
    }
    let has = rustix::thread::capabilities(None).map(|sets| sets.effective);
    let has = has.unwrap_or(CapabilitySet::empty());
    let both = CapabilitySet::BPF | CapabilitySet::PERFMON;
    if !has.contains(both) && !has.contains(CapabilitySet::SYS_ADMIN) {
        let program = std::env::current_exe();
        let program = program.map_or("runtime".to_owned(), |path| path.display().to_string());
        return Err(ProbeError::Capability { program });
    }
    if !is_namespace("pid", FIRST_PID_NAMESPACE) {
        return Err(ProbeError::PidNamespace);
    }
    Ok(())
}

/// Buckets that there is room for: a thousandth of this host's memory.
///
/// A child has some 90 a few seconds after its birth, an instance that forks 200: 1,000 of them need
/// more than the least.
pub(crate) fn buckets() -> u32 {
    const LEAST: u64 = 65_536;
    const MOST: u64 = 1 << 20;
    /// An entry without its values, and each processor's value (`htab_elem` in
    /// kernel/bpf/hashtab.c).
    const ENTRY: u64 = 64;
    const VALUE: u64 = 16;
    let memory = rustix::system::sysinfo();
    #[expect(clippy::useless_conversion, reason = "a C long, which may have another width")]
    let bytes = u64::from(memory.totalram) * u64::from(memory.mem_unit);
    let processors = aya::util::nr_cpus().unwrap_or(1) as u64;
    let room = bytes / 1000 / (ENTRY + VALUE * processors);
    u32::try_from(room.clamp(LEAST, MOST)).unwrap_or(u32::MAX)
}

/// Whether this process is in that namespace; without `/proc` nobody knows, and the kernel will say.
fn is_namespace(kind: &str, first: &str) -> bool {
    fs::read_link(format!("/proc/self/ns/{kind}")).map_or(true, |link| link.as_os_str() == first)
}
