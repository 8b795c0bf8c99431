//! Where Linux guests run.

use std::fmt;

use runtime::doctor::{HostKind, host_kind};

/// Where Linux guests run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this machine's KVM.
    Here(HostKind),
    /// On the nested test host.
    Emulated {
        /// Why not here.
        why: String,
    },
}

impl Place {
    /// Looks at this machine.
    #[must_use]
    pub fn choose() -> Self {
        match host_kind() {
            Ok(HostKind::Direct) => Self::Emulated {
                why: "this machine's KVM interprets kernels (a direct host)".to_owned(),
            },
            Ok(kind) => Self::Here(kind),
            Err(error) => {
                Self::Emulated { why: format!("no KVM here ({})", runtime::sys::chain(&error)) }
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(kind) => write!(formatter, "on this machine's KVM ({} host)", kind.name()),
            Self::Emulated { why } => write!(
                formatter,
                "{why}: using the nested test host, software emulation; Linux is up in about 20 s"
            ),
        }
    }
}
