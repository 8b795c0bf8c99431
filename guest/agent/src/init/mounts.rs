//! What every program expects to be mounted, and the console.

use std::ffi::CStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::console::say;

/// A file system to be mounted.
struct Wanted {
    kind: &'static CStr,
    at: &'static str,
    options: &'static CStr,
    flags: MountFlags,
    /// Whether its folder is made; otherwise it is mounted where the image has one.
    make: bool,
}

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const WANTED: [Wanted; 7] = [
    Wanted {
        kind: c"devtmpfs",
        at: "/dev",
        options: c"mode=0755",
        flags: MountFlags::NOSUID,
        make: true,
    },
    Wanted { kind: c"proc", at: "/proc", options: c"", flags: PLAIN, make: true },
    Wanted { kind: c"sysfs", at: "/sys", options: c"", flags: PLAIN, make: true },
    Wanted {
        kind: c"devpts",
        at: "/dev/pts",
        options: c"mode=0620,ptmxmode=0666",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        make: true,
    },
    Wanted {
        kind: c"tmpfs",
        at: "/run",
        options: c"mode=0755",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        make: true,
    },
    Wanted {
        kind: c"tmpfs",
        at: "/tmp",
        options: c"mode=1777",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        make: false,
    },
    Wanted {
        kind: c"cgroup2",
        at: "/sys/fs/cgroup",
        options: c"nsdelegate",
        flags: PLAIN,
        make: false,
    },
];

/// Mounts all. What this kernel does not have is told, and what needs it will tell more.
pub(super) fn mount_all() {
    for wanted in WANTED {
        if let Err(error) = one(&wanted) {
            say(format_args!("cannot mount {}: {error}", wanted.at));
        }
    }
}

fn one(wanted: &Wanted) -> io::Result<()> {
    let at = Path::new(wanted.at);
    if wanted.make {
        fs::create_dir_all(at)?;
    } else if !at.is_dir() {
        return Ok(());
    }
    if is_mount_point(at)? {
        return Ok(());
    }
    match mount(wanted.kind, wanted.at, wanted.kind, wanted.flags, wanted.options) {
        Ok(()) => Ok(()),
        // A kernel without control groups is one too.
        Err(Errno::NODEV) if wanted.kind == c"cgroup2" => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether something is mounted there: the kernel, or who started this, may have done it.
fn is_mount_point(at: &Path) -> io::Result<bool> {
    let Some(parent) = at.parent() else { return Ok(true) };
    Ok(fs::metadata(at)?.dev() != fs::metadata(parent)?.dev())
}

/// Where the kernel's messages go.
pub(super) const CONSOLE: &str = "/dev/console";
/// A console of whole buffers, which is there once its module is loaded.
pub(super) const FAST_CONSOLE: &str = "/dev/hvc0";

/// Makes a terminal this process's standard input, output and error, but not the one that controls it.
pub(super) fn open_console(path: &str) -> io::Result<()> {
    let flags = OFlags::NOCTTY.bits().cast_signed();
    let console = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}
