//! The generation file, watched across a fork as a program would.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};

use crate::say::{self, ZERO, fork};

const FOLDER: &str = "/run/ukp";
/// Nothing happens in the parent for so long.
const QUIET: Duration = Duration::from_millis(500);

/// Forks with a watch on the folder. What it says is there when the fork has returned in the child;
/// in the parent it says nothing.
pub fn across_a_fork() -> Result<()> {
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, FOLDER, WatchFlags::MOVED_TO)?;
    let told = |limit: Duration| -> Result<bool> {
        let nanoseconds = i64::from(limit.subsec_nanos());
        let limit = Timespec { tv_sec: limit.as_secs().try_into()?, tv_nsec: nanoseconds };
        let mut polled = [PollFd::new(&watch, PollFlags::IN)];
        poll(&mut polled, Some(&limit))?;
        Ok(polled[0].revents().contains(PollFlags::IN))
    };
    let before = told(Duration::ZERO)?.to_string();
    let read = fork()?;
    if read != ZERO {
        let after = told(QUIET)?.to_string();
        return say::here(&[("before", before), ("after", after), ("child", read)]);
    }
    let after = told(Duration::ZERO)?;
    let mut names = Vec::new();
    if after {
        let mut buffer = Vec::with_capacity(4096);
        let mut events = Reader::new(&watch, buffer.spare_capacity_mut());
        let event = events.next().context("reading the event")?;
        names
            .push(event.file_name().map_or_else(String::new, |name| name.to_string_lossy().into()));
    }
    let generation = std::fs::read_to_string(format!("{FOLDER}/generation"))?;
    say::in_child(&[
        ("after", after.to_string()),
        ("name", names.join(" ")),
        ("generation", generation.trim().to_owned()),
    ])
}
