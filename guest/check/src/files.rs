//! Files that stay open.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};

use crate::say::{self, ZERO, again, fork, libukp, shown};

/// Forks with files of the child `uuid` open, and one thread waiting for it.
pub fn handles(uuid: &str) -> Result<()> {
    let of = |name: &str| libukp("vm").join(uuid).join(name);
    let both = || OpenOptions::new().read(true).write(true).open(of("wait"));
    let status = File::open(of("status"))?;
    let (mut wait, mut waiting) = (both()?, both()?);
    let folder = rustix::fs::open(libukp("vm"), OFlags::DIRECTORY, Mode::empty())?;
    let before = shown(again(&status));
    let waiter = std::thread::spawn(move || shown(waiting.write_all(b"1").map(|()| String::new())));
    std::thread::sleep(Duration::from_millis(100));
    let read = fork()?;
    if read != ZERO {
        return say::here(&[
            ("before", before),
            ("status", shown(again(&status))),
            ("waiter", if waiter.is_finished() { "told" } else { "waits" }.to_owned()),
            ("child", read),
        ]);
    }
    let mut buffer = Vec::with_capacity(4096);
    let listed = rustix::fs::RawDir::new(&folder, buffer.spare_capacity_mut())
        .next()
        .map(|entry| shown(entry.map(|_| "an entry".to_owned()).map_err(std::io::Error::from)));
    let written = wait.write_all(b"1").map(|()| String::new());
    say::in_child(&[
        ("status", shown(again(&status))),
        ("wait-read", shown(again(&wait))),
        ("wait-write", shown(written)),
        ("folder", listed.unwrap_or_else(|| "no entry".to_owned())),
        ("open", shown(fs::read_to_string(of("status")))),
        ("waiter", waiter.join().unwrap_or_default()),
        ("vm", fs::read_dir(libukp("vm"))?.count().to_string()),
    ])
}

/// The other side stops the child once it has heard `@polling`.
pub fn poll_until_stopped(uuid: &str) -> Result<()> {
    let path = libukp("vm").join(uuid).join("wait");
    let mut options = OpenOptions::new();
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).context("a flag")?;
    let patient = File::open(&path)?;
    let impatient = options.read(true).custom_flags(nonblocking).open(&path)?;
    let events = |seconds| -> Result<String> {
        let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let mut polled = [PollFd::new(&patient, PollFlags::IN)];
        poll(&mut polled, Some(&limit))?;
        Ok(if polled[0].revents().contains(PollFlags::IN) { "POLLIN" } else { "none" }.to_owned())
    };
    say::here(&[
        ("impatient", shown(again(&impatient))),
        ("patient", shown(again(&patient))),
        ("before", events(0)?),
        ("polling", String::new()),
    ])?;
    say::here(&[
        ("after", events(60)?),
        ("again", events(0)?),
        ("code", shown(again(&impatient))),
        ("same-code", shown(again(&patient))),
    ])
}
