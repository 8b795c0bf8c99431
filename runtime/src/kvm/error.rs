//! Errors of KVM calls.

use std::io;

/// What to do where KVM lacks something.
pub const NEWER_KERNEL: &str = "boot a newer kernel, or one whose KVM offers it";

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {}", open_hint(.source))]
    Open {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A capability that everything depends on is missing.
    #[error("this KVM lacks {capability}, which is needed for {purpose}; {NEWER_KERNEL}")]
    MissingCapability {
        /// Name as in the KVM API.
        capability: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// An ioctl failed.
    #[error("{name} failed")]
    Ioctl {
        /// Name as in the KVM API.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not all MSRs were read or written: the one after the last counted is refused.
    #[error("{name} handled {applied} of {requested} MSRs and stopped at {index:#x}")]
    ShortMsrs {
        /// `KVM_GET_MSRS` or `KVM_SET_MSRS`.
        name: &'static str,
        /// MSRs handled.
        applied: usize,
        /// MSRs asked for.
        requested: usize,
        /// The MSR that was refused.
        index: u32,
    },
    /// The state of a vCPU does not fit its place in a snapshot.
    #[error("{what} needs {needed}, there is room for {room}")]
    TooLarge {
        /// What does not fit.
        what: &'static str,
        /// Size needed.
        needed: usize,
        /// Size there is.
        room: usize,
    },
}

fn open_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT) => {
            "there is no such device; load the kvm module or enable virtualisation in the firmware"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "no permission; add this user to the group `kvm` and log in again"
        }
        _ => "see `runtime doctor`",
    }
}

impl KvmError {
    /// For `map_err` behind an ioctl.
    pub(super) fn ioctl(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Ioctl { name, source: io::Error::from_raw_os_error(error.errno()) }
    }

    /// The errno behind it, `EIO` if there is none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Open { source } | Self::Ioctl { source, .. } => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            Self::MissingCapability { .. } => libc::ENOSYS,
            Self::ShortMsrs { .. } | Self::TooLarge { .. } => libc::EIO,
        }
    }
}
