//! Inode numbers.
//!
//! ```text
//!  63        32 31            4 3    0
//! ┌────────────┬───────────────┬──────┐
//! │ serial     │ child         │ kind │
//! └────────────┴───────────────┴──────┘
//! ```
//!
//! All that an inode is stands in its number, so there is no table of them, and those of a child
//! that is gone lead nowhere by themselves.
//!
//! The serial number makes `fork` and `wait` a new inode whenever they are looked up. The kernel
//! lets one writer at a time into an inode (`fuse_direct_write_iter`, `inode_lock`), and a write to
//! them may take as long as a child lives: of many waiters on one inode the agent would see only
//! one, and of many forks it could neither refuse one nor fail those of a parent.

use fuser::INodeNo;
use guest_wire::Status;

use crate::state::NUMBER_BITS;

const KIND_BITS: u32 = 4;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Root,
    Vm,
    Fork,
    TemplateInstance,
    ScaleToZeroDisable,
    /// A child's directory.
    Child(u32),
    /// A file in it.
    File(u32, ChildFile),
}

/// A file in a child's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChildFile {
    Snapshot,
    CreationTime,
    Status,
    Wait,
}

/// Files in the root directory.
pub(super) const ROOT_FILES: [(&str, Node); 4] = [
    ("fork", Node::Fork),
    ("vm", Node::Vm),
    ("template_instance", Node::TemplateInstance),
    ("scale_to_zero_disable", Node::ScaleToZeroDisable),
];

/// Files in a child's directory.
pub(super) const CHILD_FILES: [(&str, ChildFile); 4] = [
    ("snapshot", ChildFile::Snapshot),
    ("creation_time", ChildFile::CreationTime),
    ("status", ChildFile::Status),
    ("wait", ChildFile::Wait),
];

impl Node {
    /// The inode number, a new one with each `serial` if the node is one that needs it.
    pub(super) fn number(self, serial: u32) -> INodeNo {
        let (kind, child) = match self {
            Self::Root => (1, 0),
            Self::Vm => (2, 0),
            Self::Fork => (3, 0),
            Self::TemplateInstance => (4, 0),
            Self::ScaleToZeroDisable => (5, 0),
            Self::Child(child) => (6, child),
            Self::File(child, ChildFile::Snapshot) => (7, child),
            Self::File(child, ChildFile::CreationTime) => (8, child),
            Self::File(child, ChildFile::Status) => (9, child),
            Self::File(child, ChildFile::Wait) => (10, child),
        };
        let serial = if self.blocks() { serial } else { 0 };
        INodeNo(u64::from(serial) << 32 | u64::from(child) << KIND_BITS | kind)
    }

    /// What the number says.
    pub(super) fn of(number: INodeNo) -> Option<Self> {
        let low = number.0 >> KIND_BITS & ((1 << NUMBER_BITS) - 1);
        let child = u32::try_from(low).ok()?;
        Some(match number.0 & ((1 << KIND_BITS) - 1) {
            1 => Self::Root,
            2 => Self::Vm,
            3 => Self::Fork,
            4 => Self::TemplateInstance,
            5 => Self::ScaleToZeroDisable,
            6 => Self::Child(child),
            7 => Self::File(child, ChildFile::Snapshot),
            8 => Self::File(child, ChildFile::CreationTime),
            9 => Self::File(child, ChildFile::Status),
            10 => Self::File(child, ChildFile::Wait),
            _ => return None,
        })
    }

    /// The child that it belongs to.
    pub(super) fn child(self) -> Option<u32> {
        match self {
            Self::Child(child) | Self::File(child, _) => Some(child),
            _ => None,
        }
    }

    /// Whether it is a directory.
    pub(super) fn is_directory(self) -> bool {
        matches!(self, Self::Root | Self::Vm | Self::Child(_))
    }

    /// Whether it can be written to.
    pub(super) fn is_writable(self) -> bool {
        matches!(self, Self::TemplateInstance | Self::ScaleToZeroDisable) || self.blocks()
    }

    /// Whether writing may take long.
    fn blocks(self) -> bool {
        matches!(self, Self::Fork | Self::File(_, ChildFile::Wait))
    }
}

/// What `status` shows.
pub(super) fn status_text(status: Status) -> String {
    format!("{status}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_they_were_made_from() {
        let mut nodes: Vec<Node> = ROOT_FILES.iter().map(|(_, node)| *node).collect();
        for child in [0, 1, (1 << NUMBER_BITS) - 1] {
            nodes.push(Node::Child(child));
            nodes.extend(CHILD_FILES.iter().map(|(_, file)| Node::File(child, *file)));
        }
        for node in nodes {
            for serial in [0, 1, u32::MAX] {
                assert_eq!(Node::of(node.number(serial)), Some(node));
            }
        }
        assert_eq!(Node::Root.number(7), INodeNo::ROOT);
        assert_eq!(Node::of(INodeNo(0)), None);
    }

    #[test]
    fn what_blocks_is_a_new_inode_each_time() {
        assert_ne!(Node::Fork.number(1), Node::Fork.number(2));
        let wait = Node::File(3, ChildFile::Wait);
        assert_ne!(wait.number(1), wait.number(2));
        assert_eq!(Node::Child(3).number(1), Node::Child(3).number(2));
    }
}
