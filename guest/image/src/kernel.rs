//! The kernel of guests, and its modules in the order in which they are loaded.
//!
//! A kernel folder has `vmlinuz`, modules (`*.ko`, in whatever folders), and `modules.builtin` where
//! the kernel was made with one. What a module needs stands in itself, in the section `.modinfo`, so
//! no `modules.dep` is wanted, which a package does not have before it is installed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::cache;
use crate::error::ImageError;

/// What guests load, besides what these need.
pub const WANTED: [&str; 6] = [
    "virtio_mmio",
    "virtio_rng",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "fuse",
    "overlay",
];

/// Folders below a kernel folder that are looked into: more is no kernel folder.
const MOST_FOLDERS: usize = 4096;
/// No module is larger.
const MOST_BYTES: u64 = 64 << 20;

/// A kernel module.
#[derive(Debug)]
pub struct Module {
    /// Its file's name.
    pub file: String,
    /// Its file's contents.
    pub bytes: Vec<u8>,
}

/// The folder with the kernel and the modules of guests that `./just` fetches.
///
/// # Errors
///
/// If none was fetched.
pub fn kernel_dir() -> Result<PathBuf, ImageError> {
    let dir = cache::folder()?.join("guest-kernel");
    vmlinuz(&dir).map(|_| dir)
}

/// The kernel in `dir`.
pub fn vmlinuz(dir: &Path) -> Result<PathBuf, ImageError> {
    let path = dir.join("vmlinuz");
    match fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(path),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(ImageError::io("look at", &path)(error))
        }
        _ => Err(ImageError::NoKernel { dir: dir.to_owned() }),
    }
}

/// The modules that guests load, each after those that it needs.
pub fn modules(dir: &Path) -> Result<Vec<Module>, ImageError> {
    let present = Folder::read(dir)?;
    let mut ordered = Vec::new();
    let mut known = BTreeSet::new();
    for name in WANTED {
        present.load(name, &mut known, &mut ordered)?;
    }
    Ok(ordered)
}

/// The modules of a folder by name, and what its kernel has built in.
struct Folder<'a> {
    dir: &'a Path,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    compressed: bool,
}

impl<'a> Folder<'a> {
    fn read(dir: &'a Path) -> Result<Self, ImageError> {
        let mut folder =
            Self { dir, files: BTreeMap::new(), built_in: BTreeSet::new(), compressed: false };
        let mut ahead = vec![dir.to_owned()];
        let mut seen = 0;
        while let Some(path) = ahead.pop() {
            seen += 1;
            if seen > MOST_FOLDERS {
                break;
            }
            for entry in fs::read_dir(&path).map_err(ImageError::io("list", &path))? {
                let entry = entry.map_err(ImageError::io("list", &path))?;
                let sort = entry.file_type().map_err(ImageError::io("look at", &entry.path()))?;
                if sort.is_dir() {
                    ahead.push(entry.path());
                } else if sort.is_file() {
                    folder.file(&entry)?;
                }
            }
        }
        Ok(folder)
    }

    fn file(&mut self, entry: &fs::DirEntry) -> Result<(), ImageError> {
        let file_name = entry.file_name();
        let Some(name) = file_name.to_str() else { return Ok(()) };
        if name == "modules.builtin" {
            let path = entry.path();
            let text = fs::read_to_string(&path).map_err(ImageError::io("read", &path))?;
            let files = text.lines().filter_map(|line| line.rsplit('/').next());
            self.built_in.extend(files.filter_map(|file| file.strip_suffix(".ko")).map(plain));
        } else if let Some(name) = name.strip_suffix(".ko") {
            self.files.insert(plain(name), entry.path());
        } else {
            self.compressed |=
                [".ko.xz", ".ko.zst", ".ko.gz"].iter().any(|end| name.ends_with(end));
        }
        Ok(())
    }

    /// Puts the module behind those that it needs. Each is looked at once, so a circle ends too.
    fn load(
        &self,
        name: &str,
        known: &mut BTreeSet<String>,
        ordered: &mut Vec<Module>,
    ) -> Result<(), ImageError> {
        let name = plain(name);
        if self.built_in.contains(&name) || !known.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            let hint = if self.compressed { "; unpack compressed modules with xz -d" } else { "" };
            return Err(ImageError::NoModule { dir: self.dir.to_owned(), name, hint });
        };
        let found = fs::metadata(path).map_err(ImageError::io("look at", path))?;
        if found.len() > MOST_BYTES {
            let why = format!("it has {} bytes", found.len());
            return Err(ImageError::Module { path: path.clone(), why });
        }
        let bytes = fs::read(path).map_err(ImageError::io("read", path))?;
        let needs = needs(&bytes).map_err(|why| ImageError::Module { path: path.clone(), why })?;
        for needed in needs {
            self.load(&needed, known, ordered)?;
        }
        ordered.push(Module { file: format!("{name}.ko"), bytes });
        Ok(())
    }
}

/// `-` and `_` are the same in names of modules.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// The names after `depends=` in a module's `.modinfo`.
fn needs(module: &[u8]) -> Result<Vec<String>, String> {
    let file = object::File::parse(module).map_err(|error| error.to_string())?;
    let section = file.section_by_name(".modinfo").ok_or("it has no section .modinfo")?;
    let info = section.data().map_err(|error| error.to_string())?;
    let depends = info
        .split(|byte| *byte == 0)
        .find_map(|line| line.strip_prefix(b"depends="))
        .ok_or("it does not say what it needs")?;
    let names = std::str::from_utf8(depends).map_err(|error| error.to_string())?;
    Ok(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_module_is_refused() {
        assert!(needs(b"").is_err());
        assert!(needs(b"\x7fELF and nothing more").is_err());
    }

    #[test]
    fn a_hyphen_is_an_underscore() {
        assert_eq!(plain("virtio-rng"), "virtio_rng");
    }
}
