//! What several targets have in common: memory of a guest, a folder, the guest's side of a queue.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use runtime::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Memory of a guest, from address 0 on.
pub fn ram(bytes: usize) -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory"))
}

/// Writes what fits.
pub fn poke(ram: &GuestRam, at: u64, bytes: &[u8]) {
    // What lies outside of memory is written by nobody.
    drop(ram.write(bytes, GuestAddress(at)));
}

/// A folder of this process alone, in memory.
///
/// # Panics
///
/// If none can be made.
pub fn folder() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let made = || {
        // Whoever names one removes it.
        let ours = || format!("/dev/shm/ukp-fuzz-{}", std::process::id()).into();
        let path: PathBuf = std::env::var_os("UKP_FUZZ_FOLDER").map_or_else(ours, PathBuf::from);
        std::fs::create_dir_all(&path).expect("a folder");
        path
    };
    FOLDER.get_or_init(made).clone()
}

/// A file with these bytes, in memory, and a path that leads to it.
pub fn file(bytes: &[u8]) -> (File, PathBuf) {
    let file = memfd::MemfdOptions::default().create("fuzz").expect("a file").into_file();
    (&file).write_all(bytes).expect("written");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}
