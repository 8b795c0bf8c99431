//! What the tests of images share: sources made in a temporary folder, and a reader of images.
#![expect(dead_code, reason = "each test file uses a part of it")]

use std::fs::{self, File};
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use cpio::NewcReader;
use guest_image::{Built, ImageError, Options, Source, build};
use tempfile::TempDir;

/// One entry of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: u32,
    pub links: u32,
    pub device: (u32, u32),
    pub ino: u32,
    pub bytes: Vec<u8>,
}

/// All entries of the archive at the beginning of `bytes`, and where it ends.
pub fn read(bytes: &[u8]) -> (Vec<Entry>, usize) {
    let mut cursor = Cursor::new(bytes);
    let mut entries = Vec::new();
    loop {
        let mut reader = NewcReader::new(&mut cursor).expect("an entry");
        let head = reader.entry();
        if head.is_trailer() {
            reader.finish().expect("the end");
            break;
        }
        let mut entry = Entry {
            name: head.name().to_owned(),
            mode: head.mode(),
            owner: (head.uid(), head.gid()),
            mtime: head.mtime(),
            links: head.nlink(),
            device: (head.rdev_major(), head.rdev_minor()),
            ino: head.ino(),
            bytes: Vec::new(),
        };
        reader.read_to_end(&mut entry.bytes).expect("contents");
        reader.finish().expect("padding");
        entries.push(entry);
    }
    (entries, usize::try_from(cursor.position()).expect("a position"))
}

/// Those that come from the source.
pub fn of_source(bytes: &[u8]) -> Vec<Entry> {
    let own = ["proc", "sys", "dev", "dev/console", "run", "tmp", "uk", "uk/libukp", "etc"];
    let (mut entries, _) = read(bytes);
    entries.retain(|entry| !own.contains(&&*entry.name) && !entry.name.starts_with(".uk"));
    entries
}

pub fn named<'a>(entries: &'a [Entry], name: &str) -> &'a Entry {
    entries.iter().find(|entry| entry.name == name).unwrap_or_else(|| panic!("no {name}"))
}

/// A module as far as anything here looks at it: an ELF object with `.modinfo`.
pub fn module(depends: &str) -> Vec<u8> {
    let info = format!("license=GPL\0depends={depends}\0name=x\0");
    let names = b"\0.modinfo\0.shstrtab\0";
    let at = |offset: usize| (offset as u64).to_le_bytes();
    let sections = (64 + info.len() + names.len()).next_multiple_of(8);
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0\x01\0\0\0".to_vec();
    bytes.extend([0; 16]);
    bytes.extend(at(sections));
    bytes.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
    bytes.extend(info.as_bytes());
    bytes.extend(names);
    bytes.resize(sections + 64, 0);
    for (name, kind, offset, len) in
        [(1_u32, 1_u32, 64, info.len()), (10, 3, 64 + info.len(), names.len())]
    {
        bytes.extend(name.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(at(offset));
        bytes.extend(at(len));
        bytes.extend([0; 8]);
        bytes.extend(at(1));
        bytes.extend([0; 8]);
    }
    bytes
}

/// A folder for one test: sources, a kernel, a cache.
pub struct Bench {
    folder: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().expect("a folder") };
        let kernel = bench.path("kernel");
        fs::create_dir_all(kernel.join("deep")).expect("a folder");
        for (file, bytes) in [
            ("vmlinuz", b"kernel".to_vec()),
            ("modules.builtin", b"kernel/fs/fuse/fuse.ko\n".to_vec()),
            ("virtio_mmio.ko", module("virtio,virtio_ring")),
            ("virtio-rng.ko", module("virtio,rng-core")),
            ("rng-core.ko", module("")),
            ("virtio_console.ko", module("virtio,virtio_ring")),
            ("virtio.ko", module("virtio_ring")),
            ("virtio_ring.ko", module("")),
            ("vsock.ko", module("")),
            ("deep/vmw_vsock_virtio_transport.ko", module("virtio,vsock")),
            ("deep/overlay.ko", module("")),
            ("unwanted.ko", module("nothing")),
        ] {
            fs::write(kernel.join(file), bytes).expect("a file");
        }
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("a file");
        path
    }

    /// An image beside the sources.
    pub fn image(&self, source: &Path) -> Result<(Built, Vec<u8>), ImageError> {
        self.image_with(source, &Options::default())
    }

    pub fn image_with(
        &self,
        source: &Path,
        options: &Options<'_>,
    ) -> Result<(Built, Vec<u8>), ImageError> {
        fs::create_dir_all(self.path("out")).expect("a folder");
        let out = self.path("out/image.cpio");
        let kernel = self.path("kernel");
        let options = Options { output: Some(&out), kernel_dir: Some(&kernel), ..*options };
        let built = build(&Source::find(source)?, &options);
        let left: Vec<_> = fs::read_dir(self.path("out")).expect("a folder").collect();
        assert_eq!(left.len(), usize::from(built.is_ok()), "{left:?}");
        let built = built?;
        let bytes = fs::read(&out).expect("the image");
        fs::remove_file(&out).expect("it was there");
        Ok((built, bytes))
    }

    /// The entries of an image of these bytes.
    pub fn entries(&self, source: &[u8]) -> Vec<Entry> {
        let source = self.write("source.tar", source);
        of_source(&self.image(&source).expect("an image").1)
    }

    /// Why there is no image of these bytes: the error with all that is below it.
    pub fn refusal(&self, source: &[u8]) -> String {
        let source = self.write("source.tar", source);
        why(&self.image(&source).expect_err("a refusal"))
            .replace(&format!("{}/", self.folder.path().display()), "")
    }
}

pub fn why(error: &ImageError) -> String {
    let mut text = error.to_string();
    let mut below: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = below {
        text = format!("{text}: {error}");
        below = error.source();
    }
    text
}

/// A tar archive, entry by entry, with names as they are given.
pub struct Tar(pub tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Any entry; what `set` does to its header is done last.
    pub fn put(
        mut self,
        kind: tar::EntryType,
        name: &str,
        link: &str,
        bytes: &[u8],
        set: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(1000);
        header.set_gid(100);
        header.set_mtime(7);
        header.set_size(bytes.len() as u64);
        // `set_path` would refuse what is tried here.
        let raw = header.as_old_mut();
        raw.name[..name.len()].copy_from_slice(name.as_bytes());
        raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
        set(&mut header);
        header.set_cksum();
        self.0.append(&header, bytes).expect("an entry");
        self
    }

    pub fn file(self, name: &str, text: &str) -> Self {
        self.put(tar::EntryType::Regular, name, "", text.as_bytes(), |_| {})
    }

    pub fn directory(self, name: &str) -> Self {
        self.put(tar::EntryType::Directory, name, "", b"", |_| {})
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.put(tar::EntryType::Symlink, name, target, b"", |_| {})
    }

    pub fn link(self, name: &str, target: &str) -> Self {
        self.put(tar::EntryType::Link, name, target, b"", |_| {})
    }

    pub fn done(self) -> Vec<u8> {
        self.0.into_inner().expect("an archive")
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

pub fn touch(path: &Path, seconds: u64) {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    File::open(path).expect("a file").set_modified(time).expect("its time");
}
