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

/// Whether this process is in that namespace; without `/proc` nobody knows, and the kernel will say.
fn is_namespace(kind: &str, first: &str) -> bool {
    fs::read_link(format!("/proc/self/ns/{kind}")).map_or(true, |link| link.as_os_str() == first)
}
