//! Errors of the command line, and its exit codes.

use std::fmt;
use std::io::ErrorKind;

use guest_image::ImageError;
use runtime::kvm::KvmError;
use runtime::sys::{self, SysError};

/// The arguments make no sense, or name a file or an instance that is none (`EX_USAGE`).
pub const USAGE: u8 = 64;
/// This host cannot fork machines (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// Something went wrong that should not (`EX_SOFTWARE`).
pub const INTERNAL: u8 = 70;
/// No permission (`EX_NOPERM`).
pub const PERMISSION: u8 = 77;

/// Printed below the help of the program, and of verbs whose exit codes scripts look at.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done; `run` and `wait`: the instance ended with 0
  64   usage: arguments, file or instance name are wrong
  69   this host cannot fork machines (no KVM, or one that lacks something)
  70   internal error
  77   no permission (on /dev/kvm above all)
  125  the guest crashed
  137  the instance was killed
  `run` and `wait` otherwise end with the instance's own code; `run` ends with
  128 + n after signal n.";

/// One line that says what is wrong and what to do.
#[derive(Debug)]
pub struct CliError {
    /// What the program ends with.
    pub code: u8,
    message: String,
}

impl fmt::Display for CliError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line, whatever a message brought along.
        let mut parts = self.message.lines().map(str::trim).filter(|line| !line.is_empty());
        formatter.write_str(parts.next().unwrap_or("unknown"))?;
        parts.try_for_each(|part| write!(formatter, " {part}"))
    }
}

impl CliError {
    /// Wrong arguments.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: USAGE, message: message.into() }
    }

    /// Everything that should not happen.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { code: INTERNAL, message: message.into() }
    }

    /// An instance that ended for a reason.
    pub fn instance(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<SysError> for CliError {
    fn from(error: SysError) -> Self {
        let denied = error.source.kind() == ErrorKind::PermissionDenied;
        let code = if denied { PERMISSION } else { INTERNAL };
        Self { code, message: sys::chain(&error) }
    }
}

impl From<KvmError> for CliError {
    fn from(error: KvmError) -> Self {
        let code = match &error {
            KvmError::Open { source } if source.kind() == ErrorKind::PermissionDenied => PERMISSION,
            KvmError::Open { .. } | KvmError::MissingCapability { .. } => UNAVAILABLE,
            KvmError::Ioctl { .. } | KvmError::ShortMsrs { .. } | KvmError::TooLarge { .. } => {
                INTERNAL
            }
        };
        Self { code, message: sys::chain(&error) }
    }
}

impl From<ImageError> for CliError {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            denied if denied.is_denied() => PERMISSION,
            system if system.is_system() => INTERNAL,
            _ => USAGE,
        };
        Self { code, message: sys::chain(&error) }
    }
}

/// An exit code as a process can have it.
pub fn exit_code(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let error = CliError::usage("a:\n  b\n\nc");
        assert_eq!(error.to_string(), "a: b c");
    }

    #[test]
    fn a_closed_device_says_why() {
        let open = |errno| KvmError::Open { source: std::io::Error::from_raw_os_error(errno) };
        assert_eq!(CliError::from(open(libc::EACCES)).code, PERMISSION);
        assert_eq!(CliError::from(open(libc::ENOENT)).code, UNAVAILABLE);
    }
}
