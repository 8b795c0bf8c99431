//! A tar archive, perhaps compressed, that becomes an initramfs.

use std::sync::Arc;

use guest_image::fuzz::{decompress, tar};

use crate::machine::file;

/// As much as is decompressed.
const MOST: u64 = 4 << 20;

/// Takes the bytes as an archive, and reads the initramfs that comes of it.
///
/// # Panics
///
/// If that is none.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    decompress(rest, MOST).unwrap_or(0);
    let (file, _) = file(rest);
    if let Ok(image) = tar(&Arc::new(file), first % 2 == 0) {
        is_whole(&image);
    }
}

/// An initramfs has an end, and every name in it is one below the root.
pub(crate) fn is_whole(image: &[u8]) {
    assert_eq!(image.len() % 512, 0);
    let mut rest = image;
    loop {
        let reader = cpio::newc::Reader::new(rest).expect("an entry");
        if reader.entry().is_trailer() {
            break;
        }
        let name = reader.entry().name().to_owned();
        assert!(!name.starts_with('/') && name.split('/').all(|part| part != ".."), "{name}");
        rest = reader.finish().expect("its contents");
    }
}
