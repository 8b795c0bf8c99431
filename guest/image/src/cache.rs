//! Images that are kept: a file each, and beside it what is known of it.
//!
//! ```text
//!   images/<hash of the inputs>.cpio      written under another name, then renamed
//!   images/<hash of the inputs>.json      length and checksum of the former; written after it
//! ```
//!
//! An image whose checksum is not the one beside it is made again.

use std::env;
use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::content::{Content, Stamp};
use crate::error::ImageError;
use crate::own::Config;

/// Begins the name of a file that is being written.
const NEW: &str = ".new-";
/// Nobody writes for so long without a pause.
const STALE: Duration = Duration::from_hours(1);

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its length.
    pub bytes: u64,
    /// Its checksum.
    pub blake3: String,
    /// Names in it.
    pub entries: u64,
    /// Its modules, as the guest finds them.
    pub modules: Vec<String>,
    /// What it runs.
    pub config: Option<Config>,
    /// As whom its makers wanted it to run.
    pub user: Option<String>,
}

/// The folder for everything that is kept: `UKP_CACHE`, or `ukp-runtime` in the user's cache.
///
/// # Errors
///
/// That neither it nor a home is known.
pub fn folder() -> Result<PathBuf, ImageError> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = set("UKP_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|caches| caches.join("ukp-runtime")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/ukp-runtime")))
        .ok_or(ImageError::NoCache)?;
    std::path::absolute(&folder).map_err(ImageError::io("find", &folder))
}

/// Where the image with this key lies, if it is made.
pub fn image(cache: Option<&Path>, key: &blake3::Hash) -> Result<PathBuf, ImageError> {
    let images = cache.map_or_else(folder, |cache| Ok(cache.to_owned()))?.join("images");
    fs::create_dir_all(&images).map_err(ImageError::io("make", &images))?;
    sweep(&images);
    Ok(images.join(format!("{key}.cpio")))
}

/// Where the unpacked kernel with this key lies, if it is made.
pub fn kernel(key: &blake3::Hash) -> Result<PathBuf, ImageError> {
    let kernels = folder()?.join("kernels");
    fs::create_dir_all(&kernels).map_err(ImageError::io("make", &kernels))?;
    sweep(&kernels);
    Ok(kernels.join(format!("{key}.vmlinux")))
}

/// Removes what a process that was killed has begun. What cannot be removed is no reason to fail.
fn sweep(images: &Path) {
    for entry in fs::read_dir(images).into_iter().flatten().flatten() {
        let begun = entry.file_name().to_string_lossy().starts_with(NEW);
        let age = entry.metadata().and_then(|found| found.modified()).map(|time| time.elapsed());
        if begun && matches!(age, Ok(Ok(age)) if age > STALE) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// What is known of a whole image at `path`; nothing if there is none, or a damaged one.
pub fn look(path: &Path) -> Result<Option<Facts>, ImageError> {
    let Ok(text) = fs::read(beside(path)) else { return Ok(None) };
    let Ok(facts) = serde_json::from_slice::<Facts>(&text) else { return Ok(None) };
    match fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() == facts.bytes => {
            let content = Content::Named { path: path.to_owned(), stamp: Stamp::of(&found) };
            let mut hasher = blake3::Hasher::new();
            content.read(&mut |bytes| {
                hasher.update(bytes);
                Ok(())
            })?;
            let right = hasher.finalize().to_hex().as_str() == facts.blake3;
            Ok(right.then_some(facts))
        }
        Ok(_) => Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ImageError::io("look at", path)(error)),
    }
}

/// Puts down what is known of the image at `path`.
pub fn note(path: &Path, facts: &Facts) -> Result<(), ImageError> {
    let beside = beside(path);
    let text = serde_json::to_vec(facts)
        .map_err(|error| ImageError::io("write", &beside)(error.into()))?;
    let mut new = NewFile::create(&beside)?;
    new.write(&text)?;
    new.keep()
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension("json")
}

/// A file that has its name only when it is whole.
pub struct NewFile<'a> {
    path: &'a Path,
    out: BufWriter<NamedTempFile<File>>,
}

impl<'a> NewFile<'a> {
    /// Makes it in the folder of `path`.
    pub fn create(path: &'a Path) -> Result<Self, ImageError> {
        let folder = folder_of(path);
        let new = tempfile::Builder::new()
            .prefix(NEW)
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(folder)
            .map_err(ImageError::io("make a file in", folder))?;
        Ok(Self { path, out: BufWriter::with_capacity(256 << 10, new) })
    }

    /// Adds bytes to it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.out.write_all(bytes).map_err(ImageError::io("write", self.path))
    }

    /// Gives it its name; what had it before is replaced.
    pub fn keep(self) -> Result<(), ImageError> {
        let failed = ImageError::io("write", self.path);
        match self.out.into_inner() {
            Ok(new) => new.persist(self.path).map(drop).map_err(|error| failed(error.error)),
            Err(error) => Err(failed(error.into_error())),
        }
    }
}

/// The folder that a file lies in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
