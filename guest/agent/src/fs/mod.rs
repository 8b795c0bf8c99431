//! `/uk/libukp`: the state of [`crate::state`] as a file system.
//!
//! Nothing is cached by the kernel: names and attributes are valid for no time, and files are read
//! and written directly.

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod handle;
mod house;
mod node;
mod questions;
mod read;
mod service;
mod tree;

pub(crate) use service::ForkRequest;
pub use service::Service;

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption,
    OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyPoll, ReplyWrite, Request, Session,
    SessionACL, TimeOrNow, WriteFlags,
};

use crate::console::say;
use crate::state::{Child, Progress};
use node::{ChildFile, Node};
use read::{Read, cut};
use tree::{entries, find, resolve};

/// Names and attributes are valid for no time.
const NO_TIME: Duration = Duration::ZERO;
/// What files pretend to be long: who believes it reads to the end, and who writes is within.
const SIZE: u64 = 4096;
/// Longest write. What a file takes is short, and a fork is not to be made of two halves.
const WRITE: u32 = 64 * 1024;

/// Mounts the file system and serves it in the background, until the session is dropped.
///
/// # Errors
///
/// There is no FUSE device, or the kernel refuses the mount.
pub fn mount(service: Arc<Service>, at: &Path) -> io::Result<BackgroundSession> {
    Session::new(Libukp { service, started: SystemTime::now() }, at, &config())?.spawn()
}

fn config() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("libukp".into()),
        MountOption::Subtype("ukp".into()),
        MountOption::NoExec,
        MountOption::NoSuid,
        MountOption::NoDev,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(1);
    config
}

/// The file system.
struct Libukp {
    service: Arc<Service>,
    started: SystemTime,
}

impl Libukp {
    fn attributes(&self, ino: INodeNo, node: Node) -> FileAttr {
        let (kind, perm, size, nlink) = match node {
            node if node.is_directory() => (FileType::Directory, 0o555, 0, 2),
            node if node.is_writable() => (FileType::RegularFile, 0o666, SIZE, 1),
            _ => (FileType::RegularFile, 0o444, SIZE, 1),
        };
        FileAttr {
            ino,
            size,
            blocks: 0,
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
            crtime: self.started,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Libukp {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it each `echo 1 > fork` is a request more. It does without, if it has to.
        if let Err(missing) = config.add_capabilities(InitFlags::FUSE_ATOMIC_O_TRUNC) {
            say(format_args!("this kernel's FUSE does not know {missing:?}"));
        }
        config.set_max_write(WRITE).map(|_| ()).map_err(|_| io::ErrorKind::InvalidInput.into())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut inner = self.service.lock();
        let found = resolve(&inner, parent).and_then(|directory| find(&inner, directory, name));
        match found {
            Err(errno) => reply.error(errno),
            Ok(node) => {
                inner.serial = inner.serial.wrapping_add(1);
                let ino = node.number(inner.serial);
                reply.entry(&NO_TIME, &self.attributes(ino, node), Generation(0));
            }
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match resolve(&self.service.lock(), ino) {
            Ok(node) => reply.attr(&NO_TIME, &self.attributes(ino, node)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match resolve(&self.service.lock(), ino) {
            Err(errno) => reply.error(errno),
            Ok(_) if mode.is_some() || uid.is_some() || gid.is_some() => reply.error(Errno::EPERM),
            Ok(node) if size.is_some() && !node.is_writable() => reply.error(Errno::EACCES),
            Ok(node) => reply.attr(&NO_TIME, &self.attributes(ino, node)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mut guard = self.service.lock();
        let inner = &mut *guard;
        let node = match resolve(inner, ino) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        let access = flags.acc_mode();
        if access != OpenAccMode::O_RDONLY && !node.is_writable() {
            return reply.error(Errno::EACCES);
        }
        let handle = inner.handles.open(node, inner.machine.epoch());
        if let (Node::File(child, ChildFile::Wait), OpenAccMode::O_RDONLY | OpenAccMode::O_RDWR) =
            (node, access)
        {
            inner.machine.children.opened(child, handle);
        }
        Service::opened(inner, request.pid(), handle);
        drop(guard);
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_NOFLUSH
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(handle), flags);
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut inner = self.service.lock();
        let epoch = inner.machine.epoch();
        let Some(handle) = inner.handles.get(fh.0) else { return reply.error(Errno::EBADF) };
        let node = handle.node;
        if node.child().is_some() && handle.epoch != epoch {
            return reply.error(Errno::ESTALE);
        }
        let position = handle.position(offset);
        if position > 0 {
            let rest = cut(handle.rest(position), size).to_vec();
            drop(inner);
            return reply.data(&rest);
        }
        if let Err(errno) = resolve(&inner, ino) {
            return reply.error(errno);
        }
        let nonblocking = flags.0 & libc::O_NONBLOCK != 0;
        let read = Read { tid: request.pid(), handle: fh.0, size, nonblocking };
        self.read_value(inner, node, &read, reply);
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len_bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut guard = self.service.lock();
        let inner = &mut *guard;
        let node = match resolve(inner, ino) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        if let Some(handle) = inner.handles.get(fh.0) {
            handle.written(offset.saturating_add(len_bytes.into()));
        }
        match node {
            // The kernel hands over what is longer in pieces, and each would be a fork.
            Node::Fork if len_bytes >= WRITE => reply.error(Errno::EINVAL),
            Node::Fork => {
                drop(guard);
                self.service.submit(request.pid(), len_bytes, reply);
            }
            Node::File(child, ChildFile::Wait) => {
                let progress = inner.machine.children.get(child).map(Child::progress);
                match progress {
                    Err(_) => reply.error(Errno::ESTALE),
                    Ok(Progress::Alive) => {
                        self.service.wait_for(inner, child, request.pid(), len_bytes, reply);
                    }
                    Ok(Progress::Stopped(_)) => {
                        inner.machine.children.released(child);
                        reply.written(len_bytes);
                    }
                }
            }
            Node::ScaleToZeroDisable => {
                let text = std::str::from_utf8(data).unwrap_or_default();
                if inner.machine.set_scale_to_zero(text) {
                    reply.written(len_bytes);
                } else {
                    reply.error(Errno::EINVAL);
                }
            }
            Node::TemplateInstance => {
                drop(guard);
                if data.trim_ascii() == b"1" {
                    self.service.become_template(request.pid(), len_bytes, reply);
                } else {
                    reply.error(Errno::EINVAL);
                }
            }
            _ => reply.error(Errno::EACCES),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.service.closed(fh.0);
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let mut guard = self.service.lock();
        let inner = &mut *guard;
        match resolve(inner, ino) {
            Ok(node) => {
                let handle = inner.handles.open(node, inner.machine.epoch());
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut guard = self.service.lock();
        let inner = &mut *guard;
        let epoch = inner.machine.epoch();
        let Some(handle) = inner.handles.get(fh.0) else { return reply.error(Errno::EBADF) };
        let node = handle.node;
        if node != Node::Root && handle.epoch != epoch {
            return reply.error(Errno::ESTALE);
        }
        if let Err(errno) = resolve(inner, node.number(0)) {
            return reply.error(errno);
        }
        for (next, node, name) in entries(inner, node) {
            let kind =
                if node.is_directory() { FileType::Directory } else { FileType::RegularFile };
            if next > offset && reply.add(node.number(0), next, kind, name) {
                break;
            }
        }
        drop(guard);
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.service.closed(fh.0);
        reply.ok();
    }

    fn poll(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        notifier: PollNotifier,
        events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let mut guard = self.service.lock();
        let inner = &mut *guard;
        let ready = match resolve(inner, ino) {
            Err(errno) => return reply.error(errno),
            Ok(Node::File(child, ChildFile::Wait)) => {
                let known = inner.machine.children.get(child);
                let alive = known.is_ok_and(|child| child.progress() == Progress::Alive);
                if alive && flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY) {
                    Service::poll(inner, child, fh.0, notifier);
                }
                if alive { PollEvents::empty() } else { PollEvents::POLLIN }
            }
            Ok(node) if node.is_writable() => PollEvents::POLLIN | PollEvents::POLLOUT,
            Ok(_) => PollEvents::POLLIN,
        };
        let ready =
            if ready.contains(PollEvents::POLLIN) { ready | PollEvents::POLLRDNORM } else { ready };
        reply.poll(ready & events);
    }

    fn access(&self, _: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        match resolve(&self.service.lock(), ino) {
            Err(errno) => reply.error(errno),
            Ok(node) if mask.contains(AccessFlags::W_OK) && !node.is_writable() => {
                reply.error(Errno::EACCES);
            }
            Ok(_) => reply.ok(),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // The kernel asks once and never again.
        reply.error(Errno::ENOSYS);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }
}
