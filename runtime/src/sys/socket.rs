//! Sockets that keep message borders and carry descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::SysError;

/// Sends one message with file descriptors.
///
/// # Errors
///
/// `EPIPE` and `ECONNRESET` if the peer is gone, `EMSGSIZE` if the message is too long.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SysError> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(SysError { call: "sendmsg", source: io::ErrorKind::InvalidInput.into() });
    }
    let parts = [io::IoSlice::new(bytes)];
    loop {
        match rustix::net::sendmsg(socket.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SysError::new("sendmsg")(errno)),
        }
    }
}

/// Receives one message and its file descriptors; an empty message means that the peer is gone.
///
/// # Errors
///
/// `EAGAIN` on a non-blocking socket, `EMSGSIZE` for a message longer than `bytes`.
pub fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> Result<(usize, Vec<OwnedFd>), SysError> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(bytes)];
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match rustix::net::recvmsg(socket.as_fd(), &mut parts, &mut control, flags) {
            Ok(message) => break message,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SysError::new("recvmsg")(errno)),
        }
    };
    if message.flags.contains(rustix::net::ReturnFlags::TRUNC) {
        return Err(SysError {
            call: "recvmsg",
            source: io::Error::from_raw_os_error(libc::EMSGSIZE),
        });
    }
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    Ok((message.bytes, fds))
}

/// Receives one message, in as much memory as it needs; empty: the peer is gone.
///
/// # Errors
///
/// `EAGAIN` if there is none and `flags` say not to wait, `EMSGSIZE` if it is longer than `most`.
pub fn receive_whole(
    socket: impl AsFd,
    most: usize,
    flags: RecvFlags,
) -> Result<Vec<u8>, SysError> {
    let look = flags | RecvFlags::PEEK | RecvFlags::TRUNC;
    let mut nothing = [0_u8; 0];
    let length = loop {
        match rustix::net::recv(socket.as_fd(), &mut nothing, look) {
            Ok((_, length)) => break length,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SysError::new("recv")(errno)),
        }
    };
    // One that is too long is an error of the next call.
    let mut bytes = vec![0_u8; length.min(most)];
    let (length, _) = receive(socket, &mut bytes, flags)?;
    bytes.truncate(length);
    Ok(bytes)
}

/// A pair of connected sockets that keep message borders.
///
/// # Errors
///
/// `EMFILE` above all.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), SysError> {
    rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(SysError::new("socketpair"))
}
