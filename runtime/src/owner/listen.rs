//! The owner's socket and the thread that hears what comes over it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::state::{Shared, TURNED_AWAY};
use crate::instance::READY;
use crate::proto::{Envelope, MAX_MESSAGE};
use crate::sys::{self, SysError};

/// Number of the listening socket among the connections.
const LISTENING: u64 = 0;
/// Number of the eventfd of [`Shared::settle`].
const SETTLE: u64 = u64::MAX;
/// Connections that wait to be accepted: a fan-out calls all at once.
const BACKLOG: i32 = 1024;
/// Messages of one instance that are heard in one turn: more than a socket holds, so that all is heard
/// that was said before, and few enough that one that never stops does not keep the others waiting.
const TURN: usize = 1024;
/// Until it is looked again, where not even a descriptor to give up is left.
const FULL: Duration = Duration::from_millis(20);

/// Listens at `path`.
pub(super) fn socket(path: &Path) -> Result<OwnedFd, SysError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(SysError::new("socket"))?;
    // There is room for 107 bytes.
    let long = "binding a socket in so long a path (XDG_RUNTIME_DIR, or /tmp without it)";
    let address = SocketAddrUnix::new(path).map_err(SysError::new(long))?;
    rustix::net::bind(&socket, &address).map_err(SysError::new("bind"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(SysError::new("listen"))?;
    Ok(socket)
}

/// Sends a request.
pub(super) fn send(socket: &OwnedFd, envelope: &Envelope) -> Result<(), SysError> {
    let bytes = serde_json::to_vec(envelope)
        .map_err(|error| SysError { call: "writing a request", source: error.into() })?;
    sys::send(socket.as_fd(), &bytes, &[])
}

/// Starts the thread.
pub(super) fn start(shared: &Arc<Shared>, socket: OwnedFd) -> Result<(), SysError> {
    let data = epoll::EventData::new_u64(LISTENING);
    epoll::add(&shared.epoll, &socket, data, epoll::EventFlags::IN)
        .map_err(SysError::new("epoll_ctl"))?;
    let data = epoll::EventData::new_u64(SETTLE);
    epoll::add(&shared.epoll, &shared.settling, data, epoll::EventFlags::IN)
        .map_err(SysError::new("epoll_ctl"))?;
    let shared = shared.clone();
    std::thread::Builder::new()
        .name("owner".into())
        .spawn(move || run(&shared, &socket))
        .map(drop)
        .map_err(|source| SysError { call: "starting the owner's thread", source })
}

fn run(shared: &Shared, socket: &OwnedFd) {
    let mut spare = spare_descriptor();
    let mut events = Vec::with_capacity(64);
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    while !shared.state().stopped {
        events.clear();
        let room = rustix::buffer::spare_capacity(&mut events);
        // EINTR: look again.
        epoll::wait(&shared.epoll, room, None).unwrap_or(0);
        for event in &events {
            match event.data.u64() {
                LISTENING => accept(shared, socket, &mut spare),
                SETTLE => shared.settled(),
                number => hear(shared, number, &mut buffer),
            }
        }
    }
}

/// A descriptor to give up when there is no other.
fn spare_descriptor() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC).ok()
}

fn accept(shared: &Shared, socket: &OwnedFd, spare: &mut Option<OwnedFd>) {
    loop {
        match rustix::net::accept_with(socket, SocketFlags::CLOEXEC) {
            Ok(connection) => {
                // Only processes of this user are our instances.
                let ours = rustix::net::sockopt::socket_peercred(&connection)
                    .is_ok_and(|peer| peer.uid == rustix::process::geteuid());
                if ours {
                    // Without room in the set the child sees its connection closed, and ends.
                    drop(shared.adopt(connection, None));
                }
            }
            // No descriptor is left: whoever calls is turned away, and ends, instead of being asked
            // about for ever.
            Err(Errno::MFILE | Errno::NFILE) => {
                if spare.take().is_none() {
                    std::thread::sleep(FULL);
                } else {
                    drop(rustix::net::accept_with(socket, SocketFlags::CLOEXEC));
                    shared.note(TURNED_AWAY);
                }
                *spare = spare_descriptor();
                return;
            }
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return,
        }
    }
}

/// Whether a root has said that it is there, within `time`.
pub(super) fn is_ready(root: &OwnedFd, time: Duration) -> bool {
    let time = Timespec::try_from(time).ok();
    let mut ready = [PollFd::new(root, PollFlags::IN)];
    let there = rustix::io::retry_on_intr(|| poll(&mut ready, time.as_ref()));
    let mut buffer = [0_u8; READY.len()];
    there.is_ok_and(|ready| ready > 0)
        && sys::receive(root, &mut buffer, RecvFlags::DONTWAIT).is_ok_and(|(len, _)| len > 0)
}

fn hear(shared: &Shared, number: u64, buffer: &mut [u8]) {
    let Some(socket) = shared.state().connection(number).map(|it| it.socket.clone()) else {
        return;
    };
    for _ in 0..TURN {
        match sys::receive(socket.as_fd(), buffer, RecvFlags::DONTWAIT) {
            Ok((len, _)) if len > 0 => {
                // What an instance says is input: a message that is none is passed over.
                if let Ok(event) = serde_json::from_slice(&buffer[..len])
                    && !shared.event(number, event)
                {
                    // It sees its connection closed, and ends.
                    return shared.closed(number);
                }
            }
            Err(error) if error.errno() == libc::EAGAIN => return,
            _ => return shared.closed(number),
        }
    }
}
