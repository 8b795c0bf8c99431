//! Files that a machine is booted from.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use runtime::boot;
use runtime::boot::linux::{self, Linux};
use runtime::memory::{GuestRam, RamLayout};

use crate::machine::{file, folder, ram};

const MIB: u32 = 16;

/// Kept from one input to the next: it is large.
static RAM: OnceLock<Arc<GuestRam>> = OnceLock::new();

/// Loads the bytes as what their first says.
///
/// # Panics
///
/// If a guest that was loaded leaves no room for what lies around it.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let layout = RamLayout::new(MIB);
    let ram = RAM.get_or_init(|| ram((MIB as usize) << 20));
    match first % 4 {
        0 => {
            if let Ok(loaded) = boot::load(rest, ram, &layout) {
                boot::prepare(ram, &layout, &loaded, 1, 1).expect("it fits");
            }
        }
        1 => module(rest),
        kind => {
            let (kernel, path) = file(rest);
            let initrd = if kind == 2 { PathBuf::new() } else { path.clone() };
            let text = String::from_utf8_lossy(rest);
            let cmdline = text.get(..64).unwrap_or_default();
            let tail = rest.get(..100).unwrap_or_default();
            let what =
                Linux { kernel: &path, initrd: &initrd, initrd_tail: tail, cmdline, devices: 2 };
            drop(linux::load(&what, ram, &layout, 1).map_err(|error| error.to_string()));
            drop(kernel);
        }
    }
}

/// A folder of modules, the first of which has these bytes.
fn module(bytes: &[u8]) {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder: &Path = FOLDER.get_or_init(|| {
        let folder = folder().join("modules");
        fs::create_dir_all(&folder).expect("a folder");
        folder
    });
    fs::write(folder.join("virtio_mmio.ko"), bytes).expect("written");
    guest_image::fuzz::kernel(folder).unwrap_or(0);
}
