//! The kernel inside a bzImage.
//!
//! ```text
//!   bzImage: boot sector, setup │ code that unpacks │ payload: ELF, packed ; its length │ ...
//!                               └─ payload_offset ──┘
//! ```
//!
//! A kernel unpacks itself into memory that its machine touches for the first time, page by page, and
//! moves itself to a random place; a host does the former once and keeps what came of it. Without the
//! latter the kernel lies where it was linked, as in every child of one machine anyway.
//!
//! Source: Documentation/arch/x86/boot.rst; `payload_offset`, `payload_length`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::cache::{self, NewFile};
use crate::error::ImageError;

/// A kernel is not larger, unpacked.
const MOST: usize = 256 << 20;
const ELF: &[u8] = b"\x7fELF";
/// How LZ4 begins that the kernel's build makes, in blocks of up to 8 MiB.
const LZ4: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const LZ4_BLOCK: usize = 8 << 20;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The kernel inside `kernel`, unpacked and kept; `kernel` itself if it is no bzImage, or packed in a
/// way that is not known here: that boots as well, and takes longer.
///
/// # Errors
///
/// What could not be read or written.
pub fn unpacked(kernel: &Path) -> Result<PathBuf, ImageError> {
    let bytes = fs::read(kernel).map_err(ImageError::io("read", kernel))?;
    let Some((payload, len)) = payload(&bytes) else { return Ok(kernel.to_owned()) };
    let path = cache::kernel(&blake3::hash(&bytes))?;
    if is_whole(&path, len) {
        return Ok(path);
    }
    let Some(elf) = unpack(payload, len) else { return Ok(kernel.to_owned()) };
    keep(&path, &elf)?;
    keep(&sum_of(&path), blake3::hash(&elf).to_hex().as_bytes())?;
    Ok(path)
}

/// Whether the kernel that is kept is the one that was unpacked: a host may have lost power meanwhile.
fn is_whole(path: &Path, len: usize) -> bool {
    let Ok(sum) = fs::read(sum_of(path)) else { return false };
    let there = fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == len as u64);
    there && fs::read(path).is_ok_and(|elf| blake3::hash(&elf).to_hex().as_bytes() == sum)
}

/// Where its checksum lies.
fn sum_of(path: &Path) -> PathBuf {
    path.with_extension("blake3")
}

fn keep(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let mut new = NewFile::create(path)?;
    new.write(bytes)?;
    new.keep()
}

/// What a bzImage has packed, and the length of that when it is not.
fn payload(image: &[u8]) -> Option<(&[u8], usize)> {
    let word = |at: usize| {
        let bytes = image.get(at..)?.first_chunk()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((sectors + 1) * 512).checked_add(word(0x248)?)?;
    let whole = image.get(start..start.checked_add(word(0x24c)?)?)?;
    // Whatever packed it, the build puts the length behind.
    let (packed, len) = whole.split_last_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    (len <= MOST).then_some((packed, len))
}

/// The ELF file of this length, if it is one.
fn unpack(packed: &[u8], len: usize) -> Option<Vec<u8>> {
    let read = |mut from: Box<dyn Read + '_>| {
        let mut all = Vec::new();
        from.by_ref().take(len as u64 + 1).read_to_end(&mut all).ok()?;
        Some(all)
    };
    let elf = if packed.starts_with(&GZIP) {
        read(Box::new(flate2::read::GzDecoder::new(packed)))?
    } else if packed.starts_with(&ZSTD) {
        read(Box::new(ruzstd::decoding::StreamingDecoder::new(packed).ok()?))?
    } else {
        lz4(packed.strip_prefix(&LZ4)?, len)?
    };
    (elf.len() == len && elf.starts_with(ELF)).then_some(elf)
}

/// Blocks, each with its packed length before it.
fn lz4(mut packed: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    while all.len() < len {
        let (size, rest) = packed.split_first_chunk()?;
        let (block, rest) =
            rest.split_at_checked(usize::try_from(u32::from_le_bytes(*size)).ok()?)?;
        let most = LZ4_BLOCK.min(len - all.len());
        all.extend(lz4_flex::block::decompress(block, most).ok()?);
        packed = rest;
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn word(value: usize) -> [u8; 4] {
        u32::try_from(value).expect("it is small").to_le_bytes()
    }

    fn image(packed: &[u8], len: usize) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&7_u32.to_le_bytes());
        let whole = word(packed.len() + 4);
        let len = word(len);
        image[0x24c..0x250].copy_from_slice(&whole);
        image.extend([0; 7]);
        image.extend(packed);
        image.extend(len);
        image
    }

    fn elf() -> Vec<u8> {
        let mut elf = ELF.to_vec();
        elf.extend((0..100_000_u32).flat_map(u32::to_le_bytes));
        elf
    }

    #[test]
    fn what_was_packed_is_unpacked() {
        let elf = elf();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf).expect("memory is written");
        let block = lz4_flex::block::compress(&elf);
        let size = word(block.len());
        let lz4 = [&LZ4[..], &size, &block].concat();
        for packed in [gzip.finish().expect("memory is written"), lz4] {
            let image = image(&packed, elf.len());
            let (found, len) = payload(&image).expect("it has one");
            assert_eq!(unpack(found, len).as_ref(), Some(&elf));
            // One byte less or more than it says is another file.
            assert_eq!(unpack(found, len + 1), None);
            assert_eq!(unpack(found, len - 1), None);
        }
    }

    #[test]
    fn a_kept_kernel_that_was_damaged_is_made_again() {
        let folder = tempfile::tempdir().expect("there is room");
        let path = folder.path().join("a.vmlinux");
        let elf = elf();
        assert!(!is_whole(&path, elf.len()));
        keep(&path, &elf).expect("there is room");
        assert!(!is_whole(&path, elf.len()), "its checksum was not written any more");
        let sum = blake3::hash(&elf);
        keep(&sum_of(&path), sum.to_hex().as_bytes()).expect("there is room");
        assert!(is_whole(&path, elf.len()));
        let mut damaged = elf.clone();
        damaged[elf.len() / 2..].fill(0);
        keep(&path, &damaged).expect("there is room");
        assert!(!is_whole(&path, elf.len()));
    }

    #[test]
    fn what_is_no_bzimage_has_nothing_inside() {
        assert!(payload(b"").is_none() && payload(&elf()).is_none());
        assert_eq!(unpack(b"packed by nobody knows what", 27), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_unpacked(
            bytes in prop::collection::vec(any::<u8>(), 0..2048), len in 0_usize..10_000,
        ) {
            drop(unpack(&bytes, len));
            drop(unpack(&[&LZ4[..], &bytes].concat(), len));
            prop_assert!(payload(&bytes).is_none());
            let image = image(&bytes, len);
            prop_assert_eq!(payload(&image), Some((&*bytes, len)));
        }
    }
}
