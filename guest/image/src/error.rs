//! What can be wrong with a source, a kernel folder or the place for an image.

use std::io;
use std::path::{Path, PathBuf};

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file or directory could not be used.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source is of no kind that an image can be made from.
    #[error("{} is {found}; a directory, a tar archive or an OCI layout is needed", path.display())]
    Kind {
        /// The source.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// An image with its layers, packed once more.
    #[error("{} is a saved image, not a file system: unpack it, then name the folder; or use an exported container", path.display())]
    Saved {
        /// The source.
        path: PathBuf,
    },
    /// An archive ends before its end.
    #[error("{} is cut off: its end is missing; fetch or export it again", path.display())]
    CutOff {
        /// The archive.
        path: PathBuf,
    },
    /// An archive is none, or is damaged.
    #[error("{} cannot be read as a tar archive (plain, or compressed with gzip or zstd)", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What the decoder said.
        source: io::Error,
    },
    /// An entry of the source cannot be part of an image.
    #[error("entry `{entry}` of {}", origin.display())]
    Entry {
        /// Directory, archive or layer.
        origin: PathBuf,
        /// Its name there.
        entry: String,
        /// What is wrong with it.
        source: EntryError,
    },
    /// An OCI layout breaks its rules, or uses one that is not known here.
    #[error("{}: {why}", path.display())]
    Layout {
        /// The file that is wrong.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A blob has another content than its name says.
    #[error("{} is damaged: its digest is sha256:{found}; fetch the image again", path.display())]
    Digest {
        /// The blob.
        path: PathBuf,
        /// What it has.
        found: String,
    },
    /// No kernel for guests was fetched.
    #[error("there is no kernel for guests in {}; ./just fetches one, or name a folder that has one with --kernel-dir", dir.display())]
    NoKernel {
        /// Where one was looked for.
        dir: PathBuf,
    },
    /// A module that guests need is not there.
    #[error("{} has no module {name}, and its kernel does not have it built in{hint}", dir.display())]
    NoModule {
        /// The folder.
        dir: PathBuf,
        /// The module.
        name: String,
        /// What may help.
        hint: &'static str,
    },
    /// A module is no module.
    #[error("{} is not a kernel module: {why}", path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There is no folder for images that are kept.
    #[error("there is no cache folder: set UKP_CACHE or HOME, or name a file with -o")]
    NoCache,
    /// The image would be larger than allowed.
    #[error(
        "the contents take more than {limit_bytes} bytes; an initramfs has to fit into the guest's memory"
    )]
    TooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// A file changed while it was read.
    #[error("{} changed while it was read; try again when nobody writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// Why an entry cannot be part of an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// `..` in a path.
    #[error("its path has `..`, which could lead out of the image")]
    Parent,
    /// A NUL byte where a name is.
    #[error("its path or target has a NUL byte")]
    Nul,
    /// Nothing but slashes and dots where a name is needed.
    #[error("its path names the root directory, which can only be a directory")]
    Root,
    /// One part of a path is too long.
    #[error("a name in its path has {len_bytes} bytes; Linux takes 255")]
    LongName {
        /// Its length.
        len_bytes: usize,
    },
    /// A path or a link's target is too long.
    #[error("its path or target has {len_bytes} bytes; an initramfs takes 4095")]
    LongPath {
        /// Its length.
        len_bytes: usize,
    },
    /// A symbolic link to nothing.
    #[error("it is a link without a target")]
    NoTarget,
    /// A hard link to something that does not come before it.
    #[error("it is a hard link to `{target}`, which is not there before it, or is a directory")]
    LinkTarget {
        /// What it links to.
        target: String,
    },
    /// A path through something that is no directory.
    #[error("its path leads through `{through}`, which is not a directory")]
    Through {
        /// The file in its way.
        through: String,
    },
    /// A path through too many symbolic links.
    #[error("its path leads through more than 40 symbolic links")]
    Loop,
    /// A name that the runtime keeps for itself.
    #[error("`/.uk` is kept for the runtime's own files; remove it from the source")]
    Reserved,
    /// The name that ends a cpio archive.
    #[error("`TRAILER!!!` at the root would end the initramfs; remove it from the source")]
    Trailer,
    /// A whiteout of nothing.
    #[error("it is a whiteout that names nothing that could be removed")]
    Whiteout,
    /// A file larger than the format allows.
    #[error("it has {len_bytes} bytes; an initramfs takes files below 4 GiB")]
    LargeFile {
        /// Its size.
        len_bytes: u64,
    },
    /// A device number that does not fit.
    #[error("its device number {major}:{minor} is not one of Linux")]
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// More entries or longer names than are taken.
    #[error(
        "it is one too many: sources with up to {entries} entries, and {mib} MiB of names, are taken"
    )]
    TooMany {
        /// Limit of entries.
        entries: usize,
        /// Limit of names.
        mib: usize,
    },
    /// A kind of entry that has no place in a file system.
    #[error("it is of a kind that is not known (type {0:#04x})")]
    Kind(u8),
    /// A sparse file in pax format.
    #[error(
        "it is a sparse file in pax format; make the archive with --format=gnu or without --sparse"
    )]
    PaxSparse,
    /// A field of its header makes no sense.
    #[error("its header is damaged")]
    Header(#[source] io::Error),
}

impl ImageError {
    /// For `map_err` after a call on `path`.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }

    /// For `map_err` after something was done with an entry of `origin`.
    pub(crate) fn entry(origin: &Path, entry: &[u8]) -> impl FnOnce(EntryError) -> Self {
        move |source| Self::Entry { origin: origin.to_owned(), entry: shown(entry), source }
    }

    /// Whether the system is in the way, and not what somebody asked for.
    #[must_use]
    pub fn is_system(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() != io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// Whether it is for lack of permission.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// A name from a source as it can be printed: one line, no control characters, not endless.
pub(crate) fn shown(name: &[u8]) -> String {
    const MOST: usize = 200;
    let text: String = name.get(..MOST).unwrap_or(name).escape_ascii().to_string();
    if name.len() > MOST { format!("{text}…") } else { text }
}
