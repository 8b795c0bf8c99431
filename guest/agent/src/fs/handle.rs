//! Open files.

use std::collections::BTreeMap;

use super::node::Node;

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: Node,
    /// When it was opened; see [`crate::state::Machine::epoch`].
    pub(super) epoch: u64,
    /// Where the last write ended.
    base: u64,
    /// What was read at the beginning, for reads that go on from there.
    content: Vec<u8>,
}

impl Handle {
    /// Where a read at `offset` begins in the value.
    ///
    /// Writing moves the position of an open file, but what is read then is not what was written:
    /// a program that opens `fork` once, writes and reads wants the value from its beginning.
    pub(super) fn position(&self, offset: u64) -> u64 {
        offset.checked_sub(self.base).unwrap_or(offset)
    }

    /// A write ended at `offset`.
    pub(super) fn written(&mut self, offset: u64) {
        self.base = offset;
        self.content.clear();
    }

    /// This was read from the beginning.
    pub(super) fn keep(&mut self, content: &[u8]) {
        self.content = content.to_vec();
    }

    /// What a read that goes on at `position` gets.
    pub(super) fn rest(&self, position: u64) -> &[u8] {
        let position = usize::try_from(position).unwrap_or(usize::MAX);
        self.content.get(position..).unwrap_or_default()
    }
}

/// All that are open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    handles: BTreeMap<u64, Handle>,
    next: u64,
}

impl Handles {
    pub(super) fn open(&mut self, node: Node, epoch: u64) -> u64 {
        self.next += 1;
        self.handles.insert(self.next, Handle { node, epoch, base: 0, content: Vec::new() });
        self.next
    }

    pub(super) fn get(&mut self, number: u64) -> Option<&mut Handle> {
        self.handles.get_mut(&number)
    }

    pub(super) fn close(&mut self, number: u64) -> Option<Handle> {
        self.handles.remove(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_write_reading_begins_where_it_ended() {
        let mut handles = Handles::default();
        let number = handles.open(Node::Fork, 0);
        let handle = handles.get(number).unwrap();
        assert_eq!(handle.position(0), 0);
        handle.written(2);
        assert_eq!(handle.position(2), 0);
        assert_eq!(handle.position(5), 3);
        assert_eq!(handle.position(0), 0, "after a seek");
        handle.keep(b"abc");
        assert_eq!(handle.rest(1), b"bc");
        assert_eq!(handle.rest(3), b"");
        assert_eq!(handle.rest(u64::MAX), b"");
        assert!(handles.close(number).is_some());
        assert!(handles.close(number).is_none());
    }
}
