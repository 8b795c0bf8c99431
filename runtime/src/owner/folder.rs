//! Where owners put their sockets.
//!
//! ```text
//!   $XDG_RUNTIME_DIR/ukp/          or /run/user/UID/ukp, or /tmp/ukp-UID; 0700
//!     3f0c…/                       one owner: a random name, never one that somebody chose
//!       owner                      its instances call here
//!       control                    the command line calls here, if the owner serves it
//! ```
//!
//! An owner holds a lock on its folder as long as it lives, however it ends: a folder that is not
//! locked belongs to nobody, and whoever finds it removes it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use uuid::Uuid;

use crate::sys::SysError;

/// How often a name is drawn again if somebody takes the new folder for a dead one.
const ATTEMPTS: usize = 8;

/// A folder of this process's own; removed when dropped.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Holds the lock.
    _lock: OwnedFd,
}

impl Folder {
    pub(super) fn new() -> Result<Self, SysError> {
        let base = runtime_folder()?;
        // Those of dead owners go first.
        drop(live(&base));
        for _ in 0..ATTEMPTS {
            let path = base.join(name());
            DirBuilder::new().mode(0o700).create(&path).map_err(making)?;
            let Ok(lock) = open(&path) else { continue };
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)
                .map_err(SysError::new("flock"))?;
            // Between its creation and the lock somebody may have removed it.
            if path.is_dir() {
                return Ok(Self { path, _lock: lock });
            }
        }
        Err(making(io::ErrorKind::Interrupted.into()))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.path));
    }
}

/// A new name, no longer than it must be: the paths of sockets have little room.
fn name() -> String {
    let (half, _) = Uuid::new_v4().as_u64_pair();
    format!("{half:016x}")
}

fn is_name(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The folders of all owners of this user that live. Those of dead ones are removed.
///
/// # Errors
///
/// If the folder that they lie in is not ours, or cannot be read.
pub fn folders() -> Result<Vec<PathBuf>, SysError> {
    Ok(live(&runtime_folder()?))
}

fn live(base: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_name));
    let mut folders: Vec<_> = ours.map(|entry| entry.path()).filter(|path| is_live(path)).collect();
    folders.sort();
    folders
}

/// Whether the folder's owner lives; removes it otherwise.
fn is_live(path: &Path) -> bool {
    let Ok(folder) = open(path) else { return false };
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            drop(fs::remove_dir_all(path));
            false
        }
        Err(_) => true,
    }
}

fn open(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The folder that the owners' folders lie in, made if it is not there.
fn runtime_folder() -> Result<PathBuf, SysError> {
    let user = rustix::process::geteuid().as_raw();
    let folder = place(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), user);
    match DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            let shown = folder.display();
            let text = format!("{shown}: {error}; set XDG_RUNTIME_DIR to a folder that exists");
            return Err(making(io::Error::new(error.kind(), text)));
        }
    }
    // In /tmp somebody else may have made it first, or a link in its place.
    let found = fs::symlink_metadata(&folder).map_err(making)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        let shown = folder.display();
        let text = format!(
            "{shown} is not a folder that this user alone can use; remove it, or set XDG_RUNTIME_DIR"
        );
        return Err(making(io::Error::new(io::ErrorKind::PermissionDenied, text)));
    }
    Ok(folder)
}

fn place(configured: Option<PathBuf>, user: u32) -> PathBuf {
    let session = PathBuf::from(format!("/run/user/{user}"));
    match configured {
        Some(folder) if folder.is_absolute() => folder.join("ukp"),
        _ if session.is_dir() => session.join("ukp"),
        _ => PathBuf::from(format!("/tmp/ukp-{user}")),
    }
}

fn making(source: io::Error) -> SysError {
    SysError { call: "making a folder for sockets", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_runtime_dir_is_not_used() {
        assert_eq!(place(Some("/x/y".into()), 7), Path::new("/x/y/ukp"));
        let user = u32::MAX;
        let default = Path::new("/tmp/ukp-4294967295");
        assert_eq!(place(Some("x".into()), user), default);
        assert_eq!(place(None, user), default);
    }

    #[test]
    fn only_locked_folders_stay() {
        let base = std::env::temp_dir().join(format!("ukp-test-{}", Uuid::new_v4().simple()));
        fs::create_dir(&base).expect("a new folder");
        let dead = base.join(name());
        let alive = base.join(name());
        let other = base.join("something-else");
        for folder in [&dead, &alive, &other] {
            fs::create_dir(folder).expect("a new folder");
        }
        let lock = open(&alive).expect("it was just made");
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).expect("nobody else has it");
        assert_eq!(live(&base), std::slice::from_ref(&alive));
        assert!(!dead.exists());
        assert!(other.exists());
        fs::remove_dir_all(&base).expect("it is ours");
    }
}
