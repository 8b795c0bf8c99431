//! KVM's own statistics of a vCPU (`KVM_GET_STATS_FD`): how often it left the guest and why, what
//! faults it had, as KVM counts them wherever it runs.
#![expect(unsafe_code, reason = "an ioctl that is not wrapped returns a descriptor")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VcpuFd;

use super::KvmError;
use super::calls::timed;

/// `_IO(KVMIO, 0xce)`.
const GET_STATS_FD: libc::c_ulong = 0xaece;
/// Most that one statistic's name, and the list of them, can sensibly be.
const MAX_NAME: u32 = 256;
const MAX_COUNT: u32 = 4096;

/// The statistics of one vCPU, readable while it runs.
#[derive(Debug)]
pub(super) struct Statistics(File);

impl Statistics {
    /// Those of `vcpu`; `None` if this KVM has none (before Linux 5.14).
    pub(super) fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed; no memory is passed.
        let fd = timed(|| unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_STATS_FD, 0) });
        if fd < 0 {
            return None;
        }
        // SAFETY: the call has made this descriptor for us.
        Some(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    /// Name and value of each that is a single number.
    pub(super) fn read(&self) -> Result<Vec<(String, u64)>, KvmError> {
        self.values().map_err(|source| KvmError::Ioctl { name: "reading KVM's statistics", source })
    }

    fn values(&self) -> std::io::Result<Vec<(String, u64)>> {
        let wrong = || std::io::Error::from(std::io::ErrorKind::InvalidData);
        let [_, name_size, count, _, descriptors, data] =
            words(&self.bytes(0, size_of::<kvm_stats_header>())?).ok_or_else(wrong)?;
        if name_size > MAX_NAME || count > MAX_COUNT {
            return Err(wrong());
        }
        let head = size_of::<kvm_stats_desc>();
        let each = head + name_size as usize;
        let list = self.bytes(descriptors.into(), each * count as usize)?;
        let mut values = Vec::new();
        for descriptor in list.chunks_exact(each) {
            let [_, exponent_size, offset, _] = words(&descriptor[..head]).ok_or_else(wrong)?;
            // The upper half is the number of values: more than one is a histogram.
            if exponent_size >> 16 != 1 {
                continue;
            }
            let name = descriptor[head..].split(|byte| *byte == 0).next().unwrap_or_default();
            let value = self.bytes(u64::from(data) + u64::from(offset), 8)?;
            let value = u64::from_le_bytes(value.try_into().map_err(|_| wrong())?);
            values.push((String::from_utf8_lossy(name).into_owned(), value));
        }
        Ok(values)
    }

    fn bytes(&self, at: u64, count: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }
}

/// Little-endian words of 32 bits.
fn words<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let mut words = [0; N];
    for (to, from) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *to = u32::from_le_bytes(from.try_into().ok()?);
    }
    (bytes.len() >= N * 4).then_some(words)
}
