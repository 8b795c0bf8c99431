//! What this host can do, and what a test may switch on for its own time.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::census;

const KVM: &str = "/dev/kvm";
const SHMEM_THP: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Settings of the host belong to one test at a time.
static SETTINGS: Mutex<()> = Mutex::new(());

/// Why no machine can be run here, if none can.
#[must_use]
pub fn without_kvm() -> Option<String> {
    runtime::kvm::Host::open().err().map(|error| {
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text = format!("{text}: {source}");
        }
        text
    })
}

/// Why a crash that KVM has not yet told is no part of a vCPU's state, if it is not.
#[must_use]
pub fn without_triple_fault_event() -> Option<String> {
    let host = runtime::kvm::Host::open().ok()?;
    let lacks = !host.has_triple_fault_event();
    lacks.then(|| "this KVM has no KVM_CAP_X86_TRIPLE_FAULT_EVENT (Linux 6.1)".into())
}

/// Why there can be no probes, if there can be none.
#[must_use]
pub fn without_probes() -> Option<String> {
    let probes = ebpf_loader::Probes::load(ebpf_loader::Level::On);
    probes.err().map(|error| runtime::sys::chain(&error))
}

/// Whether soak tests run in full (`UKP_SOAK=1`).
#[must_use]
pub fn soak() -> bool {
    std::env::var_os("UKP_SOAK").is_some_and(|value| value == "1")
}

/// A setting that is put back when this is dropped.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    before: String,
    _settings: MutexGuard<'static, ()>,
}

impl Setting {
    /// `chosen` picks what is set now from what the file says. It is read under the lock: before,
    /// it may be what another test has set for its own time.
    fn change(path: &str, chosen: impl Fn(&str) -> Option<&str>, value: &str) -> Result<Self> {
        let settings = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let text = fs::read_to_string(path)?;
        let before = chosen(&text).with_context(|| format!("{path} says {text}"))?.to_owned();
        fs::write(path, value).with_context(|| format!("writing {value} to {path}"))?;
        Ok(Self { path: path.into(), before, _settings: settings })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, &self.before) {
            eprintln!("{} could not be put back to {}: {error}", self.path.display(), self.before);
        }
    }
}

/// The mode in brackets among those that a file of the kernel offers.
fn bracketed(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

fn writable(path: &str) -> bool {
    fs::OpenOptions::new().write(true).open(path).is_ok()
}

/// Why this process cannot have a program run by another user, if it cannot.
#[must_use]
pub fn without_root() -> Option<String> {
    let root = rustix::process::geteuid().is_root();
    (!root).then(|| "only root gives a program capabilities and runs it as somebody else".into())
}

/// `/dev/kvm` for everybody, until this is dropped.
#[derive(Debug)]
pub struct KvmForAll {
    before: fs::Permissions,
}

impl KvmForAll {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// If its permissions cannot be changed.
    pub fn new() -> Result<Self> {
        let before = fs::metadata(KVM)?.permissions();
        fs::set_permissions(KVM, fs::Permissions::from_mode(0o666))?;
        Ok(Self { before })
    }
}

impl Drop for KvmForAll {
    fn drop(&mut self) {
        if let Err(error) = fs::set_permissions(KVM, self.before.clone()) {
            eprintln!("the permissions of {KVM} could not be put back: {error}");
        }
    }
}

/// Why transparent huge pages for shared memory cannot be had, if they cannot.
#[must_use]
pub fn without_thp() -> Option<String> {
    (!writable(SHMEM_THP)).then(|| format!("{SHMEM_THP} cannot be written"))
}

/// Lets shared memory have transparent huge pages when it asks for them.
///
/// # Errors
///
/// If the setting cannot be changed.
pub fn shmem_thp() -> Result<Setting> {
    Setting::change(SHMEM_THP, bracketed, "advise")
}

/// Why huge pages cannot be reserved, if they cannot.
#[must_use]
pub fn without_huge_pages() -> Option<String> {
    let path = format!("{POOL}/nr_hugepages");
    if !writable(&path) {
        return Some(format!("{path} cannot be written"));
    }
    let (all, free) = (pool("nr_hugepages"), pool("free_hugepages"));
    (all != free).then(|| format!("somebody uses the pool: {free} of {all} huge pages are free"))
}

/// A pool of exactly `pages` huge pages.
///
/// # Errors
///
/// If the setting cannot be changed, or memory is too fragmented for so many.
pub fn huge_pages(pages: u64) -> Result<Setting> {
    let path = format!("{POOL}/nr_hugepages");
    let setting = Setting::change(&path, |text| Some(text.trim()), &pages.to_string())?;
    // Those of a test before this one may still be on their way back.
    let free = || pool("free_hugepages") == pages && pool("resv_hugepages") == 0;
    let settled = census::eventually(Duration::from_secs(5), || {
        free() || fs::write(&path, pages.to_string()).is_ok() && free()
    });
    let got = pool("nr_hugepages");
    ensure!(
        settled && got == pages,
        "{} of {got} huge pages are free, not {pages}",
        pool("free_hugepages")
    );
    Ok(setting)
}

/// A figure of the huge page pool: `free_hugepages`, `resv_hugepages`, `nr_hugepages`.
#[must_use]
pub fn pool(figure: &str) -> u64 {
    fs::read_to_string(format!("{POOL}/{figure}"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}
