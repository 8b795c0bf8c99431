//! The host's side: where its sockets lie.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

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
        // The ring waits for one that blocks alone.
        let socket = socket(SocketFlags::empty()).map_err(fail("socket"))?;
        let address = SocketAddrUnix::new(&path).map_err(fail("bind"))?;
        rustix::net::bind(&socket, &address).map_err(fail("bind"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(fail("listen"))?;
        Ok(socket)
    }
}

fn socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | flags;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket(SocketFlags::NONBLOCK)?;
    // It succeeds at once or not at all, so it is no work for the ring; EAGAIN: whoever listens does
    // not accept.
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
