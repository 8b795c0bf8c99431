//! The host's side: where its sockets lie, and what is awaited of them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use uuid::Uuid;

use crate::device::virtio::DeviceError;
use crate::sys::SysError;

/// Connections that may wait for the device.
const BACKLOG: i32 = 128;
/// The socket that is waited on for connections, among those with numbers of their own.
pub const LISTENER: u64 = 0;

/// Where the sockets of an instance lie.
#[derive(Clone, Debug)]
pub struct Address {
    folder: PathBuf,
    uuid: Uuid,
}

impl Address {
    /// Those of instance `uuid` in `folder`.
    ///
    /// # Errors
    ///
    /// If the path of a socket there would be longer than the kernel allows.
    pub fn new(folder: &Path, uuid: Uuid) -> Result<Self, DeviceError> {
        let address = Self { folder: folder.to_owned(), uuid };
        SocketAddrUnix::new(address.own_port(u32::MAX))
            .map_err(|_| DeviceError::Path { folder: folder.display().to_string() })?;
        Ok(address)
    }

    /// Where the host connects to ports of the guest.
    #[must_use]
    pub fn listener(&self) -> PathBuf {
        self.folder.join(format!("{}.vsock", self.uuid))
    }

    fn own_port(&self, port: u32) -> PathBuf {
        self.folder.join(format!("{}.vsock_{port}", self.uuid))
    }

    fn shared_port(&self, port: u32) -> PathBuf {
        self.folder.join(format!("port_{port}"))
    }

    /// Connects to whoever serves `port` for this instance, or else for all: that one is told first
    /// who it is, by the line that comes along.
    ///
    /// # Errors
    ///
    /// If nobody does.
    pub fn connect(&self, port: u32) -> Result<(OwnedFd, Option<String>), Errno> {
        match connect(&self.own_port(port)) {
            Err(Errno::NOENT) => {
                let socket = connect(&self.shared_port(port))?;
                Ok((socket, Some(format!("{}\n", self.uuid))))
            }
            socket => Ok((socket?, None)),
        }
    }

    /// Listens for the host's connections.
    ///
    /// # Errors
    ///
    /// What bind(2) says.
    pub fn listen(&self) -> Result<OwnedFd, DeviceError> {
        let path = self.listener();
        let fail = |call| {
            let path = path.display().to_string();
            move |errno| DeviceError::Listen { path, source: SysError::new(call)(errno) }
        };
        let socket = socket().map_err(fail("socket"))?;
        let address = SocketAddrUnix::new(&path).map_err(fail("bind"))?;
        rustix::net::bind(&socket, &address).map_err(fail("bind"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(fail("listen"))?;
        Ok(socket)
    }
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket()?;
    // It succeeds at once or not at all; EAGAIN: whoever listens does not accept.
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What has changed about a socket.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// The number that it was added with.
    pub number: u64,
    /// There may be something to read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// The other side is gone.
    pub hung_up: bool,
}

/// Awaits changes of many sockets; it is readable itself while there are any that were not taken.
#[derive(Clone, Debug)]
pub struct Watch(Arc<OwnedFd>);

impl Watch {
    /// One that watches nothing.
    ///
    /// # Errors
    ///
    /// `EMFILE`.
    pub fn new() -> Result<Self, SysError> {
        let fd =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(SysError::new("epoll_create1"))?;
        Ok(Self(Arc::new(fd)))
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> Arc<OwnedFd> {
        self.0.clone()
    }

    /// Watches `socket` until that is closed. Each change is told once.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn add(&self, socket: impl AsFd, number: u64) -> Result<(), Errno> {
        use epoll::EventFlags;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.0, socket, epoll::EventData::new_u64(number), flags)
    }

    /// Changes since the last time, as many as fit.
    pub fn changes(&self, mut f: impl FnMut(Change)) {
        use epoll::EventFlags;
        let mut events =
            [epoll::Event { flags: EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = epoll::wait(&self.0, events.as_mut_slice(), Some(&now)).unwrap_or(0);
        for event in events.iter().take(count) {
            let flags = event.flags;
            let ended = flags.intersects(EventFlags::HUP | EventFlags::ERR);
            f(Change {
                number: event.data.u64(),
                readable: ended || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: ended || flags.contains(EventFlags::OUT),
                hung_up: flags.contains(EventFlags::HUP),
            });
        }
    }
}
