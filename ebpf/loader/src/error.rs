//! Why there are no probes.

use std::io;

/// Why there are no probes, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// This program was built without them.
    #[error("this program was built without probes ({0}): ./just build installs what that takes")]
    NotBuilt(&'static str),
    /// A capability is missing.
    #[error(
        "the capabilities CAP_BPF and CAP_PERFMON are missing: run as root, or once, as root: \
         setcap cap_bpf,cap_perfmon,cap_sys_resource+ep {program}"
    )]
    Capability {
        /// This program.
        program: String,
    },
    /// Inside a user namespace no capability counts.
    #[error("this is a user namespace, in which no program may be loaded: start it outside of one")]
    UserNamespace,
    /// The kernel counts processes otherwise than this one does.
    #[error(
        "this is a PID namespace of its own, in which processes have other numbers than the \
         kernel tells: start it outside of one (docker run --pid=host)"
    )]
    PidNamespace,
    /// The kernel does not describe its types.
    #[error(
        "the kernel has no BTF at /sys/kernel/btf/vmlinux: use one built with \
         CONFIG_DEBUG_INFO_BTF"
    )]
    NoBtf(#[source] io::Error),
    /// The description of the kernel's types lacks something.
    #[error("the kernel's BTF has no {what}")]
    Btf {
        /// What is not there.
        what: &'static str,
    },
    /// The kernel refused a program that the others are useless without.
    #[error("the kernel refused the probe {program}: {reason}")]
    Refused {
        /// Its name.
        program: &'static str,
        /// What the kernel says.
        reason: String,
    },
    /// The kernel refused the object as a whole.
    #[error("the probes could not be loaded")]
    Load(#[source] Box<aya::EbpfError>),
    /// A map could not be used.
    #[error("the map {map} of the probes")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel says.
        #[source]
        source: Box<aya::maps::MapError>,
    },
}

impl ProbeError {
    pub(crate) fn map<E: Into<aya::maps::MapError>>(map: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Map { map, source: Box::new(source.into()) }
    }
}
