//! An OCI layout: `index.json` and then blobs, with a line `---` between them. Nobody guesses a
//! digest, so `@0@` stands for that of the first blob, and so on.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use guest_image::fuzz::oci;
use sha2::{Digest, Sha256};

use crate::archive::is_whole;
use crate::machine::folder;

const MOST: usize = 6;

const BETWEEN: &[u8] = b"\n---\n";

fn root() -> PathBuf {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let made = || {
        let root = folder().join("oci");
        fs::create_dir_all(root.join("blobs/sha256")).expect("a folder");
        fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
        root
    };
    ROOT.get_or_init(made).clone()
}

/// Writes the layout, reads it, and looks at the initramfs that comes of it.
///
/// # Panics
///
/// If that is none.
pub fn run(data: &[u8]) {
    let mut parts = split(data).into_iter().take(MOST);
    let index = parts.next().unwrap_or_default();
    let root = root();
    let put = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).expect("written");
    let mut digests = Vec::new();
    for part in parts {
        let bytes = filled(part, &digests);
        let digest = hex(&bytes);
        put(&format!("blobs/sha256/{digest}"), &bytes);
        digests.push(digest);
    }
    put("index.json", &filled(index, &digests));
    let result = oci(&root);
    for digest in digests {
        // Two parts may be the same.
        fs::remove_file(root.join("blobs/sha256").join(digest)).unwrap_or(());
    }
    if let Ok(image) = result {
        is_whole(&image);
    }
}

fn split(data: &[u8]) -> Vec<&[u8]> {
    let (mut parts, mut rest) = (Vec::new(), data);
    while let Some(at) = rest.windows(BETWEEN.len()).position(|window| window == BETWEEN) {
        let (part, more) = rest.split_at(at);
        parts.push(part);
        rest = &more[BETWEEN.len()..];
    }
    parts.push(rest);
    parts
}

fn filled(text: &[u8], digests: &[String]) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(text) else { return text.to_vec() };
    let mut text = text.to_owned();
    for (number, digest) in digests.iter().enumerate() {
        text = text.replace(&format!("@{number}@"), &format!("sha256:{digest}"));
    }
    text.into_bytes()
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").expect("memory");
    }
    text
}
