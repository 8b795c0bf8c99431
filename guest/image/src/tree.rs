//! A file system in memory: names, owners, modes, and where the bytes of each file lie.
//!
//! ```text
//!   Tree ── nodes: [ root, "etc", "hosts", … ]       a hard link: two names with one node
//!              │
//!              └─ Directory { name -> (node, layer that wrote the name) }
//! ```
//!
//! Everything that a source names is put in through [`Tree::directory`], which follows symbolic
//! links as a process inside the image would: an absolute one begins at the root, and `..` stays
//! there. So each name lies in a real directory, and whoever unpacks the image never writes through
//! a link.

use std::collections::BTreeMap;

use crate::content::Content;
use crate::error::{EntryError, shown};
use crate::path::{self, PATH_BYTES};

/// As many names as are taken: about 200 MiB of memory.
const MOST_ENTRIES: usize = 1 << 20;
/// As much as names and targets of links may take together.
const MOST_NAMES_MIB: usize = 64;
/// As the kernel has it (`MAXSYMLINKS`).
const MOST_LINKS: u32 = 40;
/// The name that is kept for the runtime.
pub const RESERVED: &[u8] = b".uk";

/// A node's place in a tree.
pub type NodeId = usize;

/// Where every path begins.
pub const ROOT: NodeId = 0;

/// Owner, permissions and time of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The twelve bits of chmod(2).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u32,
}

impl Meta {
    /// Of root, as of 1970.
    pub const fn root(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: 0 }
    }
}

/// What a node is.
#[derive(Debug)]
pub enum Kind {
    /// A directory.
    Directory(BTreeMap<Box<[u8]>, Slot>),
    /// A regular file.
    File(Content),
    /// A symbolic link to this.
    Symlink(Box<[u8]>),
    /// A block or character device.
    Device {
        /// Block, not character.
        block: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A name of a UNIX socket.
    Socket,
}

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The node.
    pub node: NodeId,
    layer: u32,
}

/// A file, directory or the like.
#[derive(Debug)]
pub struct Node {
    /// Owner and so on.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
}

/// A directory that was reached, and the length of its path.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    node: NodeId,
    len_bytes: usize,
}

const TOP: Place = Place { node: ROOT, len_bytes: 0 };

/// A whole file system.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    names_bytes: usize,
    layer: u32,
    own: bool,
}

impl Tree {
    /// An empty root directory.
    pub fn new() -> Self {
        let kind = Kind::Directory(BTreeMap::new());
        let root = Node { meta: Meta::root(0o755), kind };
        Self { nodes: vec![root], names_bytes: 0, layer: 0, own: false }
    }

    /// What comes now lies above what is there: whiteouts remove only the latter.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// What comes now are the runtime's own files.
    pub fn take_over(&mut self) {
        self.own = true;
    }

    /// The node, if there is one of this number.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id)
    }

    /// What `id` contains, if it is a directory.
    pub fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Slot>> {
        match self.nodes.get(id).map(|node| &node.kind) {
            Some(Kind::Directory(children)) => Some(children),
            _ => None,
        }
    }

    /// Finds a node; symbolic links are followed but in the last part.
    pub fn find(&mut self, path: &[u8]) -> Result<Option<NodeId>, EntryError> {
        let names = path::components(path)?;
        let Some((last, way)) = names.split_last() else { return Ok(Some(ROOT)) };
        Ok(self.directory(way, false)?.and_then(|place| self.child(place.node, last)))
    }

    /// Puts in what `path` names. What was there before is replaced, but a directory that becomes a
    /// directory keeps its contents.
    pub fn add(&mut self, path: &[u8], meta: Meta, kind: Kind) -> Result<NodeId, EntryError> {
        let names = path::components(path)?;
        let is_directory = matches!(kind, Kind::Directory(_));
        let Some((last, way)) = names.split_last() else {
            // The root itself is always root's, with 0755: that of a temporary folder is 0700.
            return if is_directory { Ok(ROOT) } else { Err(EntryError::Root) };
        };
        let place = self.parent(way)?;
        if is_directory
            && let Some(old) = self.child(place.node, last)
            && let Some(Node { meta: old_meta, kind: Kind::Directory(_) }) = self.nodes.get_mut(old)
        {
            *old_meta = meta;
            self.name(place, last, old)?;
            return Ok(old);
        }
        self.admit(place, last)?;
        let node = self.make(meta, kind)?;
        self.name(place, last, node)?;
        Ok(node)
    }

    /// Gives what `target` names another name.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), EntryError> {
        let wrong = || EntryError::LinkTarget { target: shown(target) };
        let node = self.find(target)?.ok_or_else(wrong)?;
        if self.children(node).is_some() {
            return Err(wrong());
        }
        let names = path::components(path)?;
        let (last, way) = names.split_last().ok_or(EntryError::Root)?;
        let place = self.parent(way)?;
        self.name(place, last, node)
    }

    /// Removes what lower layers have of `name` in the directory `way`.
    pub fn hide(&mut self, way: &[&[u8]], name: &[u8]) -> Result<(), EntryError> {
        let Some(place) = self.directory(way, false)? else { return Ok(()) };
        let Some(node) = self.child(place.node, name) else { return Ok(()) };
        let left = self.hide_below(node);
        let layer = self.layer;
        if let Some(children) = self.children_mut(place.node)
            && !left
            && children.get(name).is_some_and(|slot| slot.layer < layer)
        {
            children.remove(name);
        }
        Ok(())
    }

    /// Removes what lower layers have in the directory `way`.
    pub fn hide_all(&mut self, way: &[&[u8]]) -> Result<(), EntryError> {
        if let Some(place) = self.directory(way, false)? {
            self.hide_below(place.node);
        }
        Ok(())
    }

    /// Removes names of lower layers; tells whether anything is left. A path is at most
    /// [`PATH_BYTES`] long, so this does not go deep.
    fn hide_below(&mut self, node: NodeId) -> bool {
        let layer = self.layer;
        let Some(children) = self.children_mut(node).map(std::mem::take) else { return false };
        let mut left = BTreeMap::new();
        for (name, slot) in children {
            if self.hide_below(slot.node) || slot.layer == layer {
                left.insert(name, slot);
            }
        }
        let some = !left.is_empty();
        if let Some(children) = self.children_mut(node) {
            *children = left;
        }
        some
    }

    fn parent(&mut self, way: &[&[u8]]) -> Result<Place, EntryError> {
        // Not there cannot be: it is made.
        Ok(self.directory(way, true)?.unwrap_or(TOP))
    }

    /// The directory that `way` leads to, through symbolic links. If `make`, it is made where it is
    /// missing; `None` otherwise.
    fn directory(&mut self, way: &[&[u8]], make: bool) -> Result<Option<Place>, EntryError> {
        let mut ahead: Vec<Box<[u8]>> = way.iter().rev().map(|name| Box::from(*name)).collect();
        let mut above: Vec<Place> = Vec::new();
        let mut at = TOP;
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    at = above.pop().unwrap_or(TOP);
                    continue;
                }
                _ => {}
            }
            let child = match self.child(at.node, &name) {
                Some(child) => child,
                None if make => {
                    self.admit(at, &name)?;
                    let made = self.make(Meta::root(0o755), Kind::Directory(BTreeMap::new()))?;
                    self.name(at, &name, made)?;
                    made
                }
                None => return Ok(None),
            };
            match self.nodes.get(child).map(|node| &node.kind) {
                Some(Kind::Directory(_)) => {
                    above.push(at);
                    at = Place { node: child, len_bytes: at.len_bytes + name.len() + 1 };
                }
                Some(Kind::Symlink(target)) => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(EntryError::Loop);
                    }
                    if target.starts_with(b"/") {
                        above.clear();
                        at = TOP;
                    }
                    ahead.extend(target.split(|byte| *byte == b'/').rev().map(Box::from));
                }
                _ => return Err(EntryError::Through { through: shown(&name) }),
            }
        }
        Ok(Some(at))
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.children(directory)?.get(name).map(|slot| slot.node)
    }

    fn children_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, Slot>> {
        match self.nodes.get_mut(id).map(|node| &mut node.kind) {
            Some(Kind::Directory(children)) => Some(children),
            _ => None,
        }
    }

    /// Whether `name` may stand in `place`.
    fn admit(&self, place: Place, name: &[u8]) -> Result<(), EntryError> {
        let len_bytes = place.len_bytes + name.len();
        match (place.node, name) {
            (ROOT, RESERVED) if !self.own => Err(EntryError::Reserved),
            (ROOT, b"TRAILER!!!") => Err(EntryError::Trailer),
            _ if len_bytes > PATH_BYTES => Err(EntryError::LongPath { len_bytes }),
            _ => Ok(()),
        }
    }

    fn name(&mut self, place: Place, name: &[u8], node: NodeId) -> Result<(), EntryError> {
        self.admit(place, name)?;
        self.spend(name.len())?;
        let layer = self.layer;
        if let Some(children) = self.children_mut(place.node) {
            children.insert(Box::from(name), Slot { node, layer });
        }
        Ok(())
    }

    fn make(&mut self, meta: Meta, kind: Kind) -> Result<NodeId, EntryError> {
        match &kind {
            Kind::Symlink(target) => self.spend(path::target(target)?.len())?,
            Kind::Device { major, minor, .. } if *major > 0xfff || *minor > 0xf_ffff => {
                return Err(EntryError::Device { major: *major, minor: *minor });
            }
            Kind::File(content) if content.len() > u64::from(u32::MAX) => {
                return Err(EntryError::LargeFile { len_bytes: content.len() });
            }
            _ => {}
        }
        self.nodes.push(Node { meta, kind });
        Ok(self.nodes.len() - 1)
    }

    /// Everything that takes memory is counted, also what is replaced later.
    fn spend(&mut self, bytes: usize) -> Result<(), EntryError> {
        // A name costs its place too, and a source may repeat it without end.
        self.names_bytes += bytes;
        if self.nodes.len() > MOST_ENTRIES || self.names_bytes > MOST_NAMES_MIB << 20 {
            return Err(EntryError::TooMany { entries: MOST_ENTRIES, mib: MOST_NAMES_MIB });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
