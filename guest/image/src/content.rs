//! Where the bytes of a file lie until they are written into an image.
//!
//! A directory's files are opened by name, when their turn comes. Those of a plain tar archive lie
//! in it. What is compressed, or sparse, is kept one after the other in the [`Spool`], a file
//! without a name beside the image: an image has its files in order of their names, an archive in
//! its own, and no decoder goes back.

use std::borrow::Cow;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::ImageError;

/// Bytes read at a time.
const STEP: usize = 256 << 10;
/// `O_NOFOLLOW | O_NONBLOCK` of x86-64: a file that became a link or a pipe is not read.
const NO_SURPRISE: i32 = 0o400_000 | 0o4_000;

/// Takes bytes, piece by piece.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), ImageError>;

/// The bytes of a file.
pub enum Content {
    /// In memory.
    Bytes(Cow<'static, [u8]>),
    /// A part of an open file.
    Within {
        /// The file.
        file: Arc<File>,
        /// Its name, for errors.
        origin: Arc<Path>,
        /// Where they begin.
        offset: u64,
        /// How many they are.
        len_bytes: u64,
    },
    /// All of a file with a name.
    Named {
        /// The name.
        path: PathBuf,
        /// What it was when it was found.
        stamp: Stamp,
    },
}

/// What changes when a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    len_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of a file that was looked at.
    pub fn of(found: &Metadata) -> Self {
        Self {
            len_bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.len())
    }
}

impl Content {
    /// How many bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Within { len_bytes, .. } => *len_bytes,
            Self::Named { stamp, .. } => stamp.len_bytes,
        }
    }

    /// Hands all bytes to `sink`.
    pub fn read(&self, sink: Sink<'_>) -> Result<(), ImageError> {
        match self {
            Self::Bytes(bytes) => sink(bytes),
            Self::Within { file, origin, offset, len_bytes } => {
                read_part(file, origin, *offset, *len_bytes, sink)
            }
            Self::Named { path, stamp } => {
                let opened = OpenOptions::new().read(true).custom_flags(NO_SURPRISE).open(path);
                let file = opened.map_err(ImageError::io("open", path))?;
                let changed = || {
                    let now = file.metadata().map_err(ImageError::io("look at", path))?;
                    let same = now.is_file() && Stamp::of(&now) == *stamp;
                    if same { Ok(()) } else { Err(ImageError::Changed { path: path.clone() }) }
                };
                changed()?;
                read_part(&file, path, 0, stamp.len_bytes, sink)?;
                changed()
            }
        }
    }
}

fn read_part(
    file: &File,
    origin: &Path,
    mut offset: u64,
    mut left: u64,
    sink: Sink<'_>,
) -> Result<(), ImageError> {
    let mut buffer = vec![0; STEP.min(usize::try_from(left).unwrap_or(STEP))];
    while left > 0 {
        let many = buffer.len().min(usize::try_from(left).unwrap_or(STEP));
        let Some(part) = buffer.get_mut(..many) else { break };
        match file.read_at(part, offset) {
            Ok(0) => return Err(ImageError::Changed { path: origin.to_owned() }),
            Ok(count) => {
                sink(part.get(..count).unwrap_or_default())?;
                offset += count as u64;
                left -= count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ImageError::io("read", origin)(error)),
        }
    }
    Ok(())
}

/// Contents that lie nowhere else; gone with the process, whatever happens to it.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    file: Option<Arc<File>>,
    len_bytes: u64,
    limit_bytes: u64,
}

impl Spool {
    /// A spool in `folder` for so many bytes; nothing is made yet.
    pub fn new(folder: &Path, limit_bytes: u64) -> Self {
        Self { folder: folder.to_owned(), file: None, len_bytes: 0, limit_bytes }
    }

    /// Takes `len_bytes` from `source`, whose errors become those of `broken`.
    pub fn keep(
        &mut self,
        mut source: impl Read,
        len_bytes: u64,
        broken: impl Fn(std::io::Error) -> ImageError,
    ) -> Result<Content, ImageError> {
        let too_large = || ImageError::TooLarge { limit_bytes: self.limit_bytes };
        let end = self.len_bytes.checked_add(len_bytes).ok_or_else(too_large)?;
        if end > self.limit_bytes {
            return Err(too_large());
        }
        let file = if let Some(file) = &self.file {
            Arc::clone(file)
        } else {
            let file = tempfile::tempfile_in(&self.folder)
                .map_err(ImageError::io("make a file in", &self.folder))?;
            Arc::clone(self.file.insert(Arc::new(file)))
        };
        let mut left = len_bytes;
        let mut buffer = vec![0; STEP.min(usize::try_from(left).unwrap_or(STEP))];
        while left > 0 {
            let many = buffer.len().min(usize::try_from(left).unwrap_or(STEP));
            let Some(part) = buffer.get_mut(..many) else { break };
            match source.read(part) {
                Ok(0) => return Err(broken(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    (&*file)
                        .write_all(part.get(..count).unwrap_or_default())
                        .map_err(ImageError::io("write to a file in", &self.folder))?;
                    left -= count as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(error)),
            }
        }
        let offset = std::mem::replace(&mut self.len_bytes, end);
        let origin = Arc::from(self.folder.as_path());
        Ok(Content::Within { file, origin, offset, len_bytes })
    }
}
