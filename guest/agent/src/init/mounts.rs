//! What every program expects to be mounted, and the console.

use std::ffi::CStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

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
    match mount(wanted.kind, wanted.at, wanted.kind, wanted.flags, wanted.options) {
        // The kernel may have mounted its devices itself; a kernel without control groups is one.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(Errno::NODEV) if wanted.kind == c"cgroup2" => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes the console this process's standard input, output and error.
pub(super) fn open_console() -> io::Result<()> {
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}
