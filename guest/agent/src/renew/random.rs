//! The kernel's random number generator, by the ioctls that random(4) documents.
#![expect(unsafe_code, reason = "rustix and nix have no function for these ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOW('R', 0x03, int [2])`
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// `struct rand_pool_info`, with its buffer.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    len_bytes: libc::c_int,
    bytes: [u8; 32],
}

/// Adds bytes that nobody else knows, and counts all their bits.
pub(super) fn credit(device: &File, bytes: &[u8; 32]) -> io::Result<()> {
    let pool = Pool { entropy_bits: 256, len_bytes: 32, bytes: *bytes };
    // SAFETY: the request reads the two numbers and as many bytes behind them as the second one
    // says, which are all part of `pool`; it lives until the call returns.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) })
}

/// Makes the generator start from what was added, now.
pub(super) fn reseed(device: &File) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_the_ones_that_the_kernel_knows() {
        let device = std::fs::OpenOptions::new().write(true).open("/dev/urandom").unwrap();
        if rustix::process::geteuid().is_root() {
            credit(&device, &[7; 32]).unwrap();
            reseed(&device).unwrap();
        } else {
            assert_eq!(reseed(&device).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    }
}
