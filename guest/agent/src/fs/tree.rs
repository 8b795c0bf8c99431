//! Names and what they lead to.

use std::ffi::OsStr;

use fuser::{Errno, INodeNo};
use uuid::Uuid;

use super::node::{CHILD_FILES, Node, ROOT_FILES};
use super::service::Inner;

/// The node with this number, if what it belongs to is still there.
pub(super) fn resolve(inner: &Inner, ino: INodeNo) -> Result<Node, Errno> {
    let node = Node::of(ino).ok_or(Errno::ESTALE)?;
    match node.child().map(|child| inner.machine.children.get(child)) {
        Some(Err(_)) => Err(Errno::ESTALE),
        _ => Ok(node),
    }
}

/// The node called `name` in `directory`.
pub(super) fn find(inner: &Inner, directory: Node, name: &OsStr) -> Result<Node, Errno> {
    let name = name.to_str().ok_or(Errno::ENOENT)?;
    let found = match directory {
        Node::Root => ROOT_FILES.iter().find(|(called, _)| *called == name).map(|(_, node)| *node),
        Node::Vm => child_called(inner, name).map(Node::Child),
        Node::Child(child) => {
            let file = CHILD_FILES.iter().find(|(called, _)| *called == name);
            file.map(|(_, file)| Node::File(child, *file))
        }
        _ => return Err(Errno::ENOTDIR),
    };
    found.ok_or(Errno::ENOENT)
}

/// Names are UUIDs in lower case, with dashes, and in no other form.
fn child_called(inner: &Inner, name: &str) -> Option<u32> {
    let uuid = Uuid::try_parse(name).ok().filter(|uuid| uuid.to_string() == name)?;
    inner.machine.children.find(uuid)
}

/// Names and nodes in a directory, each with the place after it.
pub(super) fn entries(inner: &Inner, directory: Node) -> Vec<(u64, Node, String)> {
    let named = |at: usize, node, name: &str| (at as u64 + 3, node, name.to_owned());
    let mut entries = vec![(1, directory, ".".to_owned()), (2, Node::Root, "..".to_owned())];
    match directory {
        Node::Root => {
            let files = ROOT_FILES.iter().enumerate();
            entries.extend(files.map(|(at, (name, node))| named(at, *node, name)));
        }
        Node::Vm => {
            let children = inner.machine.children.iter();
            entries.extend(children.map(|(number, child)| {
                (u64::from(number) + 3, Node::Child(number), child.uuid.to_string())
            }));
        }
        Node::Child(child) => {
            let files = CHILD_FILES.iter().enumerate();
            entries
                .extend(files.map(|(at, (name, file))| named(at, Node::File(child, *file), name)));
        }
        _ => {}
    }
    entries
}
