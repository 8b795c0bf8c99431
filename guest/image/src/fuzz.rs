//! A door for the fuzz targets: sources without the agent and modules around them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use crate::archive::{self, Style};
use crate::content::Spool;
use crate::error::ImageError;
use crate::tree::Tree;
use crate::{cpio, decompress, oci};

/// As much as contents may have together.
const LIMIT: u64 = 1 << 20;

/// An archive that was taken, as an initramfs.
///
/// # Errors
///
/// Why it was not.
pub fn tar(file: &Arc<File>, layer: bool) -> Result<Vec<u8>, ImageError> {
    let origin = Path::new("source");
    let style = if layer { Style::Layer } else { Style::Whole };
    let (mut tree, mut spool) = (Tree::new(), Spool::new(&std::env::temp_dir(), LIMIT));
    archive::unpack(origin, file, style, &mut tree, &mut spool, &|_| {})?;
    initramfs(&tree)
}

/// An OCI layout that was taken, as an initramfs.
///
/// # Errors
///
/// Why it was not.
pub fn oci(root: &Path) -> Result<Vec<u8>, ImageError> {
    let image = oci::Image::open(root)?;
    drop((image.user().map(str::to_owned), image.config(None), image.len_bytes()));
    let mut spool = Spool::new(&std::env::temp_dir(), LIMIT);
    initramfs(&image.tree(&mut spool, &|_| {})?)
}

/// So many bytes were in what may be compressed; no more than `most` are looked at.
///
/// # Errors
///
/// What is wrong with it.
pub fn decompress(bytes: &[u8], most: u64) -> io::Result<u64> {
    let (_, decoded) = decompress::open(bytes)?;
    io::copy(&mut decoded.take(most), &mut io::sink())
}

/// What modules of a kernel say about themselves is looked at.
///
/// # Errors
///
/// What is wrong with the folder.
pub fn kernel(folder: &Path) -> Result<usize, ImageError> {
    crate::kernel::modules(folder).map(|modules| modules.len())
}

fn initramfs(tree: &Tree) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    cpio::write(tree, LIMIT, &mut |part| {
        bytes.extend_from_slice(part);
        Ok(())
    })?;
    Ok(bytes)
}
