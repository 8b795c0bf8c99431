//! A tar archive, or a layer of an OCI image, put into a tree.
//!
//! ```text
//!   file ── FromFile ── gzip, zstd ── Guard ── tar ──> Tree (names)
//!                                                └───> Spool (bytes), unless they lie in `file`
//! ```

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use tar::{Archive, Entry, EntryType};

use crate::content::{Content, Spool};
use crate::decompress::{self, Coding, FromFile};
use crate::error::{EntryError, ImageError};
use crate::path::{self, Whiteout};
use crate::tree::{Kind, Meta, Tree};

/// As much as headers of one entry may take: they are read into memory.
const MOST_HEADERS: u64 = 4 << 20;

/// How names in an archive are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As they are.
    Whole,
    /// With whiteouts, on top of what is there.
    Layer,
}

/// Puts all entries of the archive into `tree`, and calls `told` with the number of bytes each time
/// that some were read.
pub fn unpack(
    origin: &Path,
    file: &Arc<File>,
    style: Style,
    tree: &mut Tree,
    spool: &mut Spool,
    told: &dyn Fn(u64),
) -> Result<(), ImageError> {
    let ended = Rc::new(Cell::new(false));
    let bytes = FromFile::new(Arc::clone(file), told, Rc::clone(&ended));
    let broken = |error: io::Error| {
        if ended.get() || error.kind() == io::ErrorKind::UnexpectedEof {
            ImageError::CutOff { path: origin.to_owned() }
        } else {
            ImageError::Archive { path: origin.to_owned(), source: error }
        }
    };
    let (coding, decoded) = decompress::open(bytes).map_err(broken)?;
    let len_bytes = file.metadata().map_err(ImageError::io("look at", origin))?.len();
    let place = (coding == Coding::Plain).then(|| (Arc::clone(file), len_bytes));
    let left = Rc::new(Cell::new(MOST_HEADERS));
    let guard = Guard { source: decoded, left: Rc::clone(&left), ended: Rc::clone(&ended) };
    let mut archive = Archive::new(guard);
    let mut unpacking =
        Unpacking { origin: Arc::from(origin), place, style, tree, spool, broken: &broken };
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        left.set(u64::MAX);
        unpacking.entry(&mut entry)?;
        io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
        left.set(MOST_HEADERS);
    }
    // Two blocks of zeros are the end. One that just stops has lost some entries, perhaps.
    if ended.get() {
        return Err(ImageError::CutOff { path: origin.to_owned() });
    }
    if coding != Coding::Plain {
        // Checksums stand at the end.
        left.set(u64::MAX);
        io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(broken)?;
    }
    Ok(())
}

/// A reader that stops where headers would take too much memory, and notes the end.
struct Guard<R> {
    source: R,
    left: Rc<Cell<u64>>,
    ended: Rc<Cell<bool>>,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::Error::other("the headers of an entry take more than 4 MiB"));
        }
        let many = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.source.read(buffer.get_mut(..many).unwrap_or_default())?;
        self.left.set(left - count as u64);
        if count == 0 && many > 0 {
            self.ended.set(true);
        }
        Ok(count)
    }
}

struct Unpacking<'a> {
    origin: Arc<Path>,
    /// The archive and its length, if contents may stay in it.
    place: Option<(Arc<File>, u64)>,
    style: Style,
    tree: &'a mut Tree,
    spool: &'a mut Spool,
    broken: &'a dyn Fn(io::Error) -> ImageError,
}

impl Unpacking<'_> {
    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), ImageError> {
        let name = entry.path_bytes().into_owned();
        let origin = Arc::clone(&self.origin);
        let wrong = |error| ImageError::entry(&origin, &name)(error);
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            return Ok(());
        }
        if self.style == Style::Layer && self.whiteout(&name).map_err(wrong)? {
            return Ok(());
        }
        let meta = meta(entry).map_err(wrong)?;
        let target = entry.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default();
        let kind = match entry.header().entry_type() {
            EntryType::Link => return self.tree.link(&name, &target).map_err(wrong),
            // As archives older than POSIX have it.
            EntryType::Regular if name.ends_with(b"/") => Kind::Directory(BTreeMap::new()),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                Kind::File(self.content(entry, &name)?)
            }
            EntryType::Directory => Kind::Directory(BTreeMap::new()),
            EntryType::Symlink => Kind::Symlink(target.into()),
            EntryType::Fifo => Kind::Fifo,
            kind @ (EntryType::Char | EntryType::Block) => {
                device(entry.header(), kind == EntryType::Block).map_err(wrong)?
            }
            other => return Err(wrong(EntryError::Kind(other.as_byte()))),
        };
        self.tree.add(&name, meta, kind).map(drop).map_err(wrong)
    }

    /// Removes what the entry hides; tells whether it is a whiteout.
    fn whiteout(&mut self, name: &[u8]) -> Result<bool, EntryError> {
        let names = path::components(name)?;
        let Some((last, way)) = names.split_last() else { return Ok(false) };
        match path::whiteout(last)? {
            None => return Ok(false),
            Some(Whiteout::Driver) => {}
            Some(Whiteout::Opaque) => self.tree.hide_all(way)?,
            Some(Whiteout::File(file)) => self.tree.hide(way, file)?,
        }
        Ok(true)
    }

    fn content<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        name: &[u8],
    ) -> Result<Content, ImageError> {
        let len_bytes = entry.size();
        let wrong = ImageError::entry(&self.origin, name);
        if len_bytes > u32::MAX.into() {
            return Err(wrong(EntryError::LargeFile { len_bytes }));
        }
        if entry.pax_extensions().map_err(self.broken)?.is_some_and(is_sparse) {
            return Err(wrong(EntryError::PaxSparse));
        }
        match &self.place {
            Some((file, end)) if !entry.header().entry_type().is_gnu_sparse() => {
                let offset = entry.raw_file_position();
                if offset.checked_add(len_bytes).is_none_or(|last| last > *end) {
                    return Err(ImageError::CutOff { path: self.origin.to_path_buf() });
                }
                let (file, origin) = (Arc::clone(file), Arc::clone(&self.origin));
                Ok(Content::Within { file, origin, offset, len_bytes })
            }
            _ => self.spool.keep(entry, len_bytes, self.broken),
        }
    }
}

fn is_sparse(extensions: tar::PaxExtensions<'_>) -> bool {
    extensions.flatten().any(|extension| extension.key_bytes().starts_with(b"GNU.sparse."))
}

fn meta<R: Read>(entry: &Entry<'_, R>) -> Result<Meta, EntryError> {
    let header = entry.header();
    let owner = |id: io::Result<u64>| {
        u32::try_from(id?).map_err(|_| io::Error::other("its owner is no number of 32 bits"))
    };
    Ok(Meta {
        mode: header.mode().map_err(EntryError::Header)? & 0o7777,
        uid: owner(header.uid()).map_err(EntryError::Header)?,
        gid: owner(header.gid()).map_err(EntryError::Header)?,
        // Later than 2106 is as late as the format has it.
        mtime: u32::try_from(header.mtime().map_err(EntryError::Header)?).unwrap_or(u32::MAX),
    })
}

fn device(header: &tar::Header, block: bool) -> Result<Kind, EntryError> {
    let major = header.device_major().map_err(EntryError::Header)?.unwrap_or(0);
    let minor = header.device_minor().map_err(EntryError::Header)?.unwrap_or(0);
    Ok(Kind::Device { block, major, minor })
}
