//! What processes of a guest do with `/uk/libukp`, as their kernel passes it on; forks; and what the
//! host says about children.
//!
//! The target stands for the kernel: it writes requests as `include/uapi/linux/fuse.h` has them to
//! one end of a socket that keeps message borders, and the agent's file system reads the other.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use guest_agent::fs::Service;
use guest_agent::fs::fuzz::{Came, expect_barrier, fork, serve};
use guest_agent::host::{Host, HostError, Then};
use guest_wire::{ChildInfo, Status};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown,
    SocketFlags, SocketType, recvmsg, sendmsg, shutdown, socketpair,
};
use uuid::Uuid;

const MOST: usize = 60;
/// Operations (`enum fuse_opcode`).
const GETATTR: u32 = 3;
const INIT: u32 = 26;
/// Children have these names.
const NAMES: u128 = 0x4000_8000_0000_0000_0000;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Lookup {
        parent: Node,
        name: Name<'a>,
    },
    Open {
        node: Node,
        flags: u8,
        folder: bool,
    },
    Read {
        node: Node,
        handle: u8,
        offset: u8,
        size: u8,
        flags: u16,
        folder: bool,
    },
    Write {
        node: Node,
        handle: u8,
        offset: u8,
        data: &'a [u8],
    },
    Release {
        node: Node,
        handle: u8,
        folder: bool,
    },
    Poll {
        node: Node,
        handle: u8,
        flags: bool,
    },
    Setattr {
        node: Node,
        valid: u16,
        value: u8,
    },
    /// Any operation, with any body.
    Raw {
        op: u8,
        node: u64,
        body: &'a [u8],
    },
    Fork {
        came: u8,
        child: u8,
    },
    Barrier {
        thread: u8,
    },
    /// The host answers its oldest question.
    Answer {
        what: u8,
        code: i32,
    },
}

/// An inode number: mostly one that means something.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Node {
    Of { kind: u8, child: u8, serial: u8 },
    Any(u64),
}

impl Node {
    fn number(self) -> u64 {
        match self {
            Self::Of { kind, child, serial } => {
                u64::from(serial) << 32 | u64::from(child % 4) << 4 | u64::from(kind % 12)
            }
            Self::Any(number) => number,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known(u8),
    Child(u8),
    Any(&'a [u8]),
}

impl Name<'_> {
    fn bytes(&self) -> Vec<u8> {
        const KNOWN: [&str; 8] = [
            "fork",
            "vm",
            "template_instance",
            "scale_to_zero_disable",
            "snapshot",
            "status",
            "wait",
            "..",
        ];
        let mut bytes = match self {
            Self::Known(which) => KNOWN[usize::from(*which) % KNOWN.len()].as_bytes().to_vec(),
            Self::Child(child) => name(*child).to_string().into_bytes(),
            // The kernel ends names with a zero, and has none within.
            Self::Any(bytes) => bytes.iter().copied().filter(|byte| *byte != 0).take(255).collect(),
        };
        bytes.push(0);
        bytes
    }
}

fn name(child: u8) -> Uuid {
    Uuid::from_u128(NAMES | u128::from(child % 8))
}

/// A host that answers when it is told to.
#[derive(Default)]
struct Questions {
    children: Mutex<Vec<Then<ChildInfo>>>,
    waits: Mutex<Vec<Then<i32>>>,
}

impl Host for Questions {
    fn child(&self, _: Uuid, then: Then<ChildInfo>) {
        self.children.lock().expect("nobody panicked").push(then);
    }

    fn wait(&self, _: Uuid, then: Then<i32>) {
        self.waits.lock().expect("nobody panicked").push(then);
    }

    fn template(&self) {}

    fn became_child(&self) {
        let children = std::mem::take(&mut *self.children.lock().expect("nobody panicked"));
        let waits = std::mem::take(&mut *self.waits.lock().expect("nobody panicked"));
        for then in children {
            then(Err(HostError::OfParent));
        }
        for then in waits {
            then(Err(HostError::OfParent));
        }
    }
}

impl Questions {
    fn answer(&self, what: u8, code: i32) {
        let statuses = [Status::Running, Status::Stopped, Status::Template, Status::Draining];
        if what.is_multiple_of(2) {
            let mut children = self.children.lock().expect("nobody panicked");
            if children.is_empty() {
                return;
            }
            let then = children.remove(0);
            drop(children);
            let status = statuses[usize::from(what / 4) % statuses.len()];
            let exit = (status == Status::Stopped).then_some(code);
            let info = ChildInfo { status, creation_time: 7, snapshot: Uuid::nil(), exit };
            then(if what.is_multiple_of(4) { Ok(info) } else { Err(HostError::Unknown) });
        } else {
            let mut waits = self.waits.lock().expect("nobody panicked");
            if waits.is_empty() {
                return;
            }
            let then = waits.remove(0);
            drop(waits);
            then(if what % 4 == 1 { Ok(code) } else { Err(HostError::Unknown) });
        }
    }
}

/// Plays the steps.
///
/// # Panics
///
/// If a request that no one has to wait for gets no answer.
pub fn run(data: &[u8]) {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (kernel, agent) = pair.expect("sockets");
    let service = Service::new(2, Duration::ZERO);
    let host = Arc::new(Questions::default());
    service.set_host(host.clone());
    let mut kernel = Kernel { socket: kernel, unique: 1 };
    let mut init = [7_u32, 31, 0x2_0000, 0].map(u32::to_le_bytes).concat();
    init.resize(64, 0);
    kernel.send(INIT, 0, 1, &init);
    std::thread::scope(|scope| {
        let files = service.clone();
        scope.spawn(move || serve(files, agent));
        let house = service.clone();
        scope.spawn(move || house.keep_house());
        play(data, &mut kernel, &service, &host);
        shutdown(&kernel.socket, Shutdown::Both).expect("a socket");
        service.close();
    });
}

fn play(data: &[u8], kernel: &mut Kernel, service: &Arc<Service>, host: &Questions) {
    let mut rest = Unstructured::new(data);
    for _ in 0..MOST {
        if rest.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut rest) else { break };
        match step {
            Step::Fork { came, child } => {
                let came = match came % 4 {
                    0 | 1 => Came::Parent(name(child)),
                    2 => Came::Child(name(child), u64::from(child) + 1),
                    _ => Came::Failed,
                };
                fork(service, came);
            }
            Step::Barrier { thread } => expect_barrier(service, u32::from(thread % 4) + 1),
            Step::Answer { what, code } => host.answer(what, code),
            step => request(kernel, &step),
        }
        if !kernel.catch_up() {
            // It ends with a request that is none, as the specification of FUSE wants.
            break;
        }
    }
}

fn request(kernel: &mut Kernel, step: &Step<'_>) {
    let words =
        |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let io = |handle: u8, offset: u8, size: u32, flags: u32| {
        // struct fuse_read_in and fuse_write_in: fh, offset, size, flags, lock owner, flags.
        let offset = if offset == u8::MAX { u32::MAX } else { offset.into() };
        words(&[handle.into(), 0, offset, offset >> 31, size, 0, 0, 0, flags, 0])
    };
    match step {
        Step::Lookup { parent, name } => kernel.send(1, parent.number(), 1, &name.bytes()),
        Step::Open { node, flags, folder } => {
            let op = if *folder { 27 } else { 14 };
            kernel.send(op, node.number(), u32::from(flags % 4) + 1, &words(&[(*flags).into(), 0]));
        }
        Step::Read { node, handle, offset, size, flags, folder } => {
            let op = if *folder { 28 } else { 15 };
            let body = io(*handle, *offset, u32::from(*size) * 16, (*flags).into());
            kernel.send(op, node.number(), 1, &body);
        }
        Step::Write { node, handle, offset, data } => {
            let data = data.get(..1024).unwrap_or(data);
            let mut body = io(*handle, *offset, u32::try_from(data.len()).unwrap_or(0), 0);
            body.extend_from_slice(data);
            kernel.send(16, node.number(), 1, &body);
        }
        Step::Release { node, handle, folder } => {
            let op = if *folder { 29 } else { 18 };
            kernel.send(op, node.number(), 1, &words(&[(*handle).into(), 0, 0, 0, 0, 0]));
        }
        Step::Poll { node, handle, flags } => {
            let body = words(&[(*handle).into(), 0, 1, 0, u32::from(*flags), 1]);
            kernel.send(40, node.number(), 1, &body);
        }
        Step::Setattr { node, valid, value } => {
            let mut body = words(&[u32::from(*valid), 0]);
            body.resize(88, *value);
            kernel.send(4, node.number(), 1, &body);
        }
        // INIT is said once, and DESTROY ends. Of WRITE and SETXATTR `fuser` asserts that their
        // lengths agree, which those of a kernel do: one that lies stops its own init.
        Step::Raw { op, node, body } if !matches!(op % 52, 16 | 21 | 26 | 38) => {
            kernel.send(u32::from(op % 52), *node, 1, body.get(..4096).unwrap_or(body));
        }
        _ => {}
    }
}

struct Kernel {
    socket: OwnedFd,
    unique: u64,
}

impl Kernel {
    /// Sends a request with a header (`struct fuse_in_header`).
    fn send(&mut self, op: u32, node: u64, pid: u32, body: &[u8]) {
        self.unique += 1;
        let len = u32::try_from(body.len() + 40).expect("short");
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(op.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        for word in [0, 0, pid, 0] {
            bytes.extend(u32::to_le_bytes(word));
        }
        bytes.extend(body);
        let mut none = SendAncillaryBuffer::default();
        // It has hung up.
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut none, SendFlags::NOSIGNAL).unwrap_or(0);
    }

    /// Waits until the agent has read everything: until it answers one more question. Tells whether
    /// it is still there.
    fn catch_up(&mut self) -> bool {
        self.send(GETATTR, 1, 1, &[0; 16]);
        let mut buffer = vec![0; 0x2_0000];
        loop {
            let mut none = RecvAncillaryBuffer::default();
            let mut into = [IoSliceMut::new(&mut buffer)];
            let got = recvmsg(&self.socket, &mut into, &mut none, RecvFlags::empty());
            let len = got.map_or(0, |got| got.bytes);
            if len == 0 {
                return false;
            }
            // struct fuse_out_header: length, error, unique.
            let said =
                buffer.get(..4).and_then(|len| Some(u32::from_le_bytes(len.try_into().ok()?)));
            assert_eq!(said.map(|len| len as usize), Some(len), "the length of an answer");
            let unique = buffer
                .get(8..16)
                .and_then(|unique| Some(u64::from_le_bytes(unique.try_into().ok()?)));
            if unique == Some(self.unique) {
                return true;
            }
        }
    }
}
