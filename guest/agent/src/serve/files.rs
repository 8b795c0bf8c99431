//! Files, to and from the guest.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use guest_wire::{Frame, FrameError, Kind, Reply, read_frame};

use super::Connection;

/// Bytes of a file in a frame.
const CHUNK: usize = 32 * 1024;
/// Permissions, with set-user-id, set-group-id and the sticky bit.
const MODE: u32 = 0o7777;

/// Writes a file from the data that follows.
pub(super) fn write(connection: &Connection, path: &str, mode: u32) -> Result<(), FrameError> {
    let mut file = create(path, mode & MODE);
    // Everything is taken even if it cannot be written: a connection that is closed with data on it
    // may lose the answer.
    while let Some(data) = next(connection)? {
        file = file.and_then(|mut file| file.write_all(&data).map(|()| file));
    }
    match file {
        Ok(_) => connection.reply(&Reply::Done),
        Err(error) => connection.fail(path, &error),
    }
}

/// The next data; `None` at the end.
fn next(connection: &Connection) -> Result<Option<Vec<u8>>, FrameError> {
    match read_frame(&mut &*connection.reader)? {
        Some(Frame { kind: Kind::Data, payload }) => {
            Ok(Some(payload).filter(|data| !data.is_empty()))
        }
        // Without its end the file may be half of one.
        None => Err(FrameError::Truncated { got_bytes: 0 }),
        Some(Frame { kind, .. }) => {
            let message = format!("contents of a file were due, not a frame of kind {kind:?}");
            connection.reply(&Reply::Failed { errno: libc::EINVAL, message })?;
            Err(FrameError::Truncated { got_bytes: 0 })
        }
    }
}

fn create(path: &str, mode: u32) -> io::Result<File> {
    absolute(path)?;
    let mut options = OpenOptions::new();
    // A pipe without a reader would block.
    options.write(true).create(true).truncate(true).mode(mode).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path)?;
    if file.metadata()?.is_file() {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    Ok(file)
}

/// Sends a file.
pub(super) fn read(connection: &Connection, path: &str) -> Result<(), FrameError> {
    let (mut file, metadata) = match open(path) {
        Ok(opened) => opened,
        Err(error) => return connection.fail(path, &error),
    };
    let (mode, size) = (metadata.permissions().mode() & MODE, metadata.len());
    connection.reply(&Reply::File { mode, size })?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return connection.send(Kind::Data, &[]),
            Ok(n) => connection.send(Kind::Data, buffer.get(..n).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return connection.fail(path, &error),
        }
    }
}

fn open(path: &str) -> io::Result<(File, Metadata)> {
    absolute(path)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::other("is a directory; files are copied one by one"));
    }
    if !metadata.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    Ok((file, metadata))
}

fn absolute(path: &str) -> io::Result<()> {
    if Path::new(path).is_absolute() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "is not absolute; begin it with a slash"))
}
