//! What kind of pages an image is made of.

use std::fs;

use memfd::{HugetlbSize, MemfdOptions};
use serde::{Deserialize, Serialize};

use crate::sys::SysError;

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The memfd could not be made or sealed.
    #[error("{what} a memfd of {requested_mib} MiB failed")]
    Memfd {
        /// "creating", "sizing" or "sealing".
        what: &'static str,
        /// Size asked for.
        requested_mib: u64,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The huge page pool is too small.
    #[error(
        "the huge page pool has {free} free pages of 2 MiB, {needed} are needed; \
         raise /proc/sys/vm/nr_hugepages or choose another backing"
    )]
    PoolExhausted {
        /// Pages free and not reserved.
        free: u64,
        /// Pages needed.
        needed: u64,
    },
    /// Transparent huge pages for shared memory are switched off.
    #[error(
        "transparent huge pages for shared memory are off; \
         write `advise` to /sys/kernel/mm/transparent_hugepage/shmem_enabled"
    )]
    ShmemThpOff,
}

/// Names of the backings, as configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingKind {
    /// Shared memory in pages of 4 KiB.
    #[default]
    #[serde(rename = "4k")]
    Small,
    /// Shared memory with transparent huge pages.
    Thp,
    /// Pages of 2 MiB from the hugetlb pool.
    Hugetlb,
}

/// One kind of memory below an image.
pub trait Backing {
    /// Its name in configuration and reports.
    fn name(&self) -> &'static str;

    /// Bytes of the page that the first write to a private mapping copies.
    fn copy_bytes(&self) -> usize;

    /// Options of the memfd.
    fn memfd(&self) -> MemfdOptions;

    /// Whether mappings ask for transparent huge pages.
    fn advise_huge(&self) -> bool;

    /// Whether this host can give `bytes` of it.
    ///
    /// # Errors
    ///
    /// Why it cannot, and what would help.
    fn check(&self, bytes: u64) -> Result<(), MemoryError>;
}

struct Small;
struct Thp;
struct Hugetlb;

impl BackingKind {
    /// The backing of that name.
    #[must_use]
    pub fn backing(self) -> &'static dyn Backing {
        match self {
            Self::Small => &Small,
            Self::Thp => &Thp,
            Self::Hugetlb => &Hugetlb,
        }
    }
}

impl Backing for Small {
    fn name(&self) -> &'static str {
        "4k"
    }

    fn copy_bytes(&self) -> usize {
        4096
    }

    fn memfd(&self) -> MemfdOptions {
        MemfdOptions::default().allow_sealing(true)
    }

    fn advise_huge(&self) -> bool {
        false
    }

    fn check(&self, _bytes: u64) -> Result<(), MemoryError> {
        Ok(())
    }
}

impl Backing for Thp {
    fn name(&self) -> &'static str {
        "thp"
    }

    // The first write to a page of a private file mapping copies 4 KiB, also under a huge page.
    fn copy_bytes(&self) -> usize {
        4096
    }

    fn memfd(&self) -> MemfdOptions {
        Small.memfd()
    }

    fn advise_huge(&self) -> bool {
        true
    }

    // With `never` or `deny` MADV_HUGEPAGE succeeds and silently gives 4 KiB pages.
    fn check(&self, _bytes: u64) -> Result<(), MemoryError> {
        let mode = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
            .unwrap_or_default();
        if ["[always]", "[within_size]", "[advise]", "[force]"].iter().any(|on| mode.contains(on)) {
            Ok(())
        } else {
            Err(MemoryError::ShmemThpOff)
        }
    }
}

impl Backing for Hugetlb {
    fn name(&self) -> &'static str {
        "hugetlb"
    }

    fn copy_bytes(&self) -> usize {
        2 << 20
    }

    fn memfd(&self) -> MemfdOptions {
        Small.memfd().hugetlb(Some(HugetlbSize::Huge2MB))
    }

    fn advise_huge(&self) -> bool {
        false
    }

    fn check(&self, bytes: u64) -> Result<(), MemoryError> {
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
        let read = |name: &str| -> u64 {
            fs::read_to_string(format!("{pool}/{name}"))
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
        // The image, and what instance and zygote reserve for pages of their own: without the
        // reservation the first write to a page could find the pool empty and end in SIGBUS.
        let needed = 3 * bytes.div_ceil(2 << 20);
        if free < needed { Err(MemoryError::PoolExhausted { free, needed }) } else { Ok(()) }
    }
}
