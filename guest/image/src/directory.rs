//! A directory of the host, put into a tree.
//!
//! What another file system is mounted on comes as an empty directory: `/proc` of a chroot is not
//! part of it.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::content::{Content, Stamp};
use crate::error::{EntryError, ImageError};
use crate::tree::{Kind, Meta, Tree};

/// All that is in `root`.
pub fn tree(root: &Path) -> Result<Tree, ImageError> {
    let mut tree = Tree::new();
    let top = fs::metadata(root).map_err(ImageError::io("look at", root))?;
    let wrong = |name: &Path, error| ImageError::entry(root, name.as_os_str().as_bytes())(error);
    let add = |tree: &mut Tree, name: &Path, found: &Metadata, kind| {
        let added = tree.add(name.as_os_str().as_bytes(), meta(found), kind);
        added.map(drop).map_err(|error| wrong(name, error))
    };
    let mut first_names: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut ahead: Vec<PathBuf> = vec![PathBuf::new()];
    while let Some(folder) = ahead.pop() {
        for (name, found) in listed(root, &folder)? {
            if found.nlink() > 1 && !found.is_dir() {
                let id = (found.dev(), found.ino());
                if let Some(first) = first_names.get(&id) {
                    let (path, first) = (name.as_os_str(), first.as_os_str());
                    tree.link(path.as_bytes(), first.as_bytes())
                        .map_err(|error| wrong(&name, error))?;
                    continue;
                }
                first_names.insert(id, name.clone());
            }
            let kind = kind(&root.join(&name), &found)?;
            let kind = kind.ok_or_else(|| wrong(&name, EntryError::Kind(0)))?;
            add(&mut tree, &name, &found, kind)?;
            if found.is_dir() && found.dev() == top.dev() {
                ahead.push(name);
            }
        }
    }
    Ok(tree)
}

/// What is in `folder`, in order: the first name of a file with several is always the same.
fn listed(root: &Path, folder: &Path) -> Result<Vec<(PathBuf, Metadata)>, ImageError> {
    let path = root.join(folder);
    let mut all = Vec::new();
    for entry in fs::read_dir(&path).map_err(ImageError::io("list", &path))? {
        let entry = entry.map_err(ImageError::io("list", &path))?;
        let found = entry.metadata().map_err(ImageError::io("look at", &entry.path()))?;
        all.push((folder.join(entry.file_name()), found));
    }
    all.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(all)
}

fn kind(path: &Path, found: &Metadata) -> Result<Option<Kind>, ImageError> {
    let sort = found.file_type();
    Ok(Some(if sort.is_dir() {
        Kind::Directory(BTreeMap::new())
    } else if sort.is_file() {
        Kind::File(Content::Named { path: path.to_owned(), stamp: Stamp::of(found) })
    } else if sort.is_symlink() {
        let target = fs::read_link(path).map_err(ImageError::io("read", path))?;
        Kind::Symlink(target.as_os_str().as_bytes().into())
    } else if sort.is_fifo() {
        Kind::Fifo
    } else if sort.is_socket() {
        Kind::Socket
    } else if sort.is_block_device() || sort.is_char_device() {
        let (major, minor) = numbers(found.rdev());
        Kind::Device { block: sort.is_block_device(), major, minor }
    } else {
        return Ok(None);
    }))
}

/// As `gnu_dev_major` and `gnu_dev_minor` take a number apart.
fn numbers(device: u64) -> (u32, u32) {
    let bits = |shift: u32, mask: u64| u32::try_from(device >> shift & mask).unwrap_or(u32::MAX);
    (bits(8, 0xfff), bits(0, 0xff) | bits(12, 0xf_ff00))
}

fn meta(found: &Metadata) -> Meta {
    Meta {
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        // What is before 1970 or after 2106 is as near as the format has it.
        mtime: u32::try_from(found.mtime().max(0)).unwrap_or(u32::MAX),
    }
}
