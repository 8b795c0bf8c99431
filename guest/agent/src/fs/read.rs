//! What files show.

use std::sync::MutexGuard;

use fuser::{Errno, ReplyData};
use uuid::Uuid;

use super::Libukp;
use super::node::{ChildFile, Node, status_text};
use super::questions::constant_text;
use super::service::Inner;
use crate::state::{ForkValue, Progress};

/// A read, as the kernel asks for it.
pub(super) struct Read {
    pub(super) tid: u32,
    pub(super) handle: u64,
    pub(super) size: u32,
    pub(super) nonblocking: bool,
}

impl Libukp {
    /// Reads from the beginning.
    pub(super) fn read_value(
        &self,
        mut guard: MutexGuard<'_, Inner>,
        node: Node,
        read: &Read,
        reply: ReplyData,
    ) {
        let inner = &mut *guard;
        let text = match node {
            Node::Fork => match inner.machine.readers.read(read.tid, &crate::processes::Proc) {
                ForkValue::Empty => String::new(),
                ForkValue::Child => format!("{}\n", Uuid::nil()),
                ForkValue::Parent(child) => format!("{child}\n"),
            },
            Node::TemplateInstance => String::new(),
            Node::ScaleToZeroDisable => format!("{}\n", inner.machine.scale_to_zero_disable),
            Node::File(child, ChildFile::Wait) => {
                match inner.machine.children.read_code(child, read.handle) {
                    Err(_) => return reply.error(Errno::ESTALE),
                    Ok(Progress::Stopped(code)) => format!("{code}\n"),
                    Ok(Progress::Alive) if read.nonblocking => return reply.error(Errno::EAGAIN),
                    Ok(Progress::Alive) => String::new(),
                }
            }
            Node::File(child, file) => {
                let Ok(known) = inner.machine.children.get(child) else {
                    return reply.error(Errno::ESTALE);
                };
                match (file, known.progress(), known.constants) {
                    (ChildFile::Status, Progress::Stopped(_), _) => {
                        status_text(guest_wire::Status::Stopped)
                    }
                    (ChildFile::Snapshot | ChildFile::CreationTime, _, Some(constants)) => {
                        constant_text(constants, file)
                    }
                    _ => {
                        let uuid = known.uuid;
                        let to = (read.handle, read.size);
                        return self.service.ask(guard, (child, file), uuid, to, reply);
                    }
                }
            }
            Node::Root | Node::Vm | Node::Child(_) => return reply.error(Errno::EISDIR),
        };
        if let Some(handle) = inner.handles.get(read.handle) {
            handle.keep(text.as_bytes());
        }
        drop(guard);
        reply.data(cut(text.as_bytes(), read.size));
    }
}

/// As much of `bytes` as was asked for.
pub(super) fn cut(bytes: &[u8], size: u32) -> &[u8] {
    usize::try_from(size).ok().and_then(|size| bytes.get(..size)).unwrap_or(bytes)
}
