//! A tree as an initramfs: a cpio archive in the format `newc`.
//!
//! ```text
//!   header: 6 + 13 * 8 digits | name, NUL | to 4 bytes | contents | to 4 bytes      … for each
//!   header of `TRAILER!!!`, zeros to 512 bytes
//! ```
//!
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst` and `init/initramfs.c`.)
//! Names are in order, so that a directory comes before what is in it, and the same tree makes the
//! same bytes. The contents of a file with several names come with the first of them.

use std::collections::BTreeMap;

use crate::content::Sink;
use crate::error::ImageError;
use crate::tree::{Kind, Meta, Node, NodeId, ROOT, Tree};

/// Archives begin at such an offset when several are laid one after the other.
const ALIGN: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const BLOCK: u32 = 0o060_000;
const CHARACTER: u32 = 0o020_000;
const FIFO: u32 = 0o010_000;
const SOCKET: u32 = 0o140_000;

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes in all.
    pub len_bytes: u64,
    /// Names, the root among them.
    pub entries: u64,
}

/// Writes all of `tree`, whose files may have `limit_bytes` together.
pub fn write(tree: &Tree, limit_bytes: u64, sink: Sink<'_>) -> Result<Written, ImageError> {
    let mut names: BTreeMap<NodeId, u32> = BTreeMap::new();
    let mut contents: u64 = 0;
    each(tree, &mut |_, id, node| {
        if let Kind::File(content) = &node.kind {
            let count = names.entry(id).or_default();
            *count += 1;
            if *count == 1 {
                contents = contents.saturating_add(content.len());
            }
        }
        Ok(())
    })?;
    if contents > limit_bytes {
        return Err(ImageError::TooLarge { limit_bytes });
    }
    names.retain(|_, count| *count > 1);
    let mut archive = Archive { sink, written: Written::default(), numbers: 0 };
    let mut linked: BTreeMap<NodeId, u32> = BTreeMap::new();
    each(tree, &mut |path, id, node| {
        let several = names.get(&id).copied();
        let number = match (several, linked.get(&id)) {
            (Some(count), Some(number)) => {
                return archive.again(path, node.meta, count, *number);
            }
            _ => archive.number(),
        };
        if several.is_some() {
            linked.insert(id, number);
        }
        archive.node(path, node, several.unwrap_or(1), number)
    })?;
    archive.finish()
}

type Visit<'a> = &'a mut dyn FnMut(&[u8], NodeId, &Node) -> Result<(), ImageError>;

/// Calls `visit` with every name in order, parents first.
fn each(tree: &Tree, visit: Visit<'_>) -> Result<(), ImageError> {
    let mut ahead: Vec<(Vec<u8>, NodeId)> = vec![(b".".to_vec(), ROOT)];
    while let Some((path, id)) = ahead.pop() {
        let Some(node) = tree.node(id) else { continue };
        visit(&path, id, node)?;
        for (name, slot) in tree.children(id).into_iter().flatten().rev() {
            let below = if id == ROOT { name.to_vec() } else { [&path, &b"/"[..], name].concat() };
            ahead.push((below, slot.node));
        }
    }
    Ok(())
}

struct Archive<'a> {
    sink: Sink<'a>,
    written: Written,
    numbers: u32,
}

/// What a header says besides name and length.
struct Header {
    number: u32,
    mode: u32,
    meta: Meta,
    links: u32,
    device: (u32, u32),
}

impl Archive<'_> {
    /// A number that no other file of the archive has.
    fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    fn node(
        &mut self,
        path: &[u8],
        node: &Node,
        links: u32,
        number: u32,
    ) -> Result<(), ImageError> {
        let meta = node.meta;
        let header = |mode, links, device| Header { number, mode, meta, links, device };
        let none = (0, 0);
        match &node.kind {
            Kind::Directory(_) => self.header(path, 0, &header(DIRECTORY, 2, none)),
            Kind::Fifo => self.header(path, 0, &header(FIFO, 1, none)),
            Kind::Socket => self.header(path, 0, &header(SOCKET, 1, none)),
            Kind::Device { block, major, minor } => {
                let mode = if *block { BLOCK } else { CHARACTER };
                self.header(path, 0, &header(mode, 1, (*major, *minor)))
            }
            Kind::Symlink(target) => {
                self.header(path, target.len() as u64, &header(SYMLINK, 1, none))?;
                self.put(target)?;
                self.pad(4)
            }
            Kind::File(content) => {
                self.header(path, content.len(), &header(FILE, links, none))?;
                content.read(&mut |bytes| self.put(bytes))?;
                self.pad(4)
            }
        }
    }

    /// One more name of a file that is there already.
    fn again(
        &mut self,
        path: &[u8],
        meta: Meta,
        links: u32,
        number: u32,
    ) -> Result<(), ImageError> {
        let header = Header { number, mode: FILE, meta, links, device: (0, 0) };
        self.header(path, 0, &header)
    }

    fn header(&mut self, path: &[u8], len_bytes: u64, header: &Header) -> Result<(), ImageError> {
        // The tree takes no file that is larger, and no name that is longer.
        let file = u32::try_from(len_bytes).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let Header { number, mode, meta, links, device } = header;
        let mode = mode | meta.mode & 0o7777;
        let fields = [
            *number, mode, meta.uid, meta.gid, *links, meta.mtime, file, 0, 0, device.0, device.1,
            name, 0,
        ];
        self.written.entries += 1;
        let mut bytes = b"070701".to_vec();
        for field in fields {
            bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        bytes.extend_from_slice(path);
        bytes.push(0);
        self.put(&bytes)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.written.len_bytes += bytes.len() as u64;
        (self.sink)(bytes)
    }

    fn pad(&mut self, to: usize) -> Result<(), ImageError> {
        const ZEROS: [u8; ALIGN] = [0; ALIGN];
        let over = usize::try_from(self.written.len_bytes % to as u64).unwrap_or_default();
        let zeros = ZEROS.get(..(to - over) % to);
        match zeros {
            Some([]) | None => Ok(()),
            Some(zeros) => self.put(zeros),
        }
    }

    fn finish(mut self) -> Result<Written, ImageError> {
        let entries = self.written.entries;
        let meta = Meta::root(0);
        let last = Header { number: 0, mode: 0, meta, links: 1, device: (0, 0) };
        self.header(b"TRAILER!!!", 0, &last)?;
        self.pad(ALIGN)?;
        Ok(Written { entries, ..self.written })
    }
}

/// An archive with one file alone, to be laid behind another.
pub fn single(path: &str, bytes: Vec<u8>) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    let mut sink = |bytes: &[u8]| {
        out.extend_from_slice(bytes);
        Ok(())
    };
    let mut archive = Archive { sink: &mut sink, written: Written::default(), numbers: 0 };
    let number = archive.number();
    let kind = Kind::File(crate::content::Content::Bytes(bytes.into()));
    archive.node(path.as_bytes(), &Node { meta: Meta::root(0o644), kind }, 1, number)?;
    archive.finish()?;
    Ok(out)
}
