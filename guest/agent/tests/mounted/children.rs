//! Children under `vm/`.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_wire::Status;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uuid::Uuid;

use crate::Case;
use crate::rig::{Rig, errno, read_from, snapshot, until, write_to};

pub const CASES: &[Case] = &[
    ("children::what_the_files_show", what_the_files_show),
    ("children::the_status_is_that_of_the_moment", the_status_is_that_of_the_moment),
    ("children::what_is_read_only_refuses_root", what_is_read_only_refuses_root),
    ("children::many_waiters_are_let_go_at_once", many_waiters_are_let_go_at_once),
    ("children::shells_wait_and_read_the_code", shells_wait_and_read_the_code),
    ("children::one_that_has_stopped_is_not_waited_for", one_that_has_stopped_is_not_waited_for),
    ("children::reading_wait_does_not_block", reading_wait_does_not_block),
    ("children::poll_tells_when_the_code_is_there", poll_tells_when_the_code_is_there),
    ("children::a_waiter_can_be_killed", a_waiter_can_be_killed),
    ("children::a_child_goes_when_its_code_was_read", a_child_goes_when_its_code_was_read),
    ("children::a_child_goes_with_the_retention_time", a_child_goes_with_the_retention_time),
    ("children::one_that_the_host_does_not_know_is_stale", unknown_is_stale),
    ("children::a_host_that_learns_of_a_child_late", a_host_that_learns_of_a_child_late),
    ("children::a_silent_host_is_an_io_error", a_silent_host_is_an_io_error),
];

fn what_the_files_show() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    ensure!(uuid.get_version_num() == 4);
    let mut names = Vec::new();
    for entry in fs::read_dir(rig.of(uuid, ""))? {
        names.push(entry?.file_name().into_string().unwrap_or_default());
    }
    names.sort();
    ensure!(names == ["creation_time", "snapshot", "status", "wait"]);
    ensure!(fs::read_to_string(rig.of(uuid, "snapshot"))? == format!("{}\n", snapshot()));
    ensure!(fs::read_to_string(rig.of(uuid, "creation_time"))? == "1700000000\n");
    ensure!(fs::read_to_string(rig.of(uuid, "wait"))?.is_empty());
    let upper = rig.path("vm").join(uuid.to_string().to_uppercase());
    ensure!(errno(fs::metadata(upper)) == libc::ENOENT, "a UUID has one form");
    ensure!(errno(fs::metadata(rig.of(Uuid::new_v4(), ""))) == libc::ENOENT);
    Ok(())
}

fn the_status_is_that_of_the_moment() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let open = File::open(rig.of(uuid, "status"))?;
    for status in
        [Status::Starting, Status::Running, Status::Draining, Status::Stopping, Status::Template]
    {
        rig.host.set(uuid, status);
        let expected = format!("{status:?}\n");
        ensure!(fs::read_to_string(rig.of(uuid, "status"))? == expected);
        rustix::fs::seek(&open, rustix::fs::SeekFrom::Start(0))?;
        ensure!(read_from(&open)? == expected);
    }
    rig.host.stop(uuid, 0);
    ensure!(fs::read_to_string(rig.of(uuid, "status"))? == "Stopped\n");
    Ok(())
}

fn what_is_read_only_refuses_root() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    for file in ["snapshot", "creation_time", "status"] {
        for truncate in [false, true] {
            let opened = OpenOptions::new().write(true).truncate(truncate).open(rig.of(uuid, file));
            ensure!(errno(opened) == libc::EACCES, "{file}");
        }
    }
    ensure!(errno(fs::write(rig.of(uuid, "new"), "1")) == libc::EPERM);
    ensure!(errno(fs::create_dir(rig.path("vm/new"))) == libc::EPERM);
    ensure!(errno(fs::remove_file(rig.path("fork"))) == libc::EPERM);
    Ok(())
}

fn many_waiters_are_let_go_at_once() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    thread::scope(|scope| {
        let wait = || {
            scope.spawn(|| -> Result<String> {
                let file = OpenOptions::new().read(true).write(true).open(rig.of(uuid, "wait"))?;
                write_to(&file)?;
                Ok(read_from(&file)?)
            })
        };
        let waiters: Vec<_> = (0..30).map(|_| wait()).collect();
        thread::sleep(Duration::from_millis(100));
        ensure!(waiters.iter().all(|waiter| !waiter.is_finished()), "they block");
        rig.host.stop(uuid, 42);
        for waiter in waiters {
            let code = waiter.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(code == "42\n", "{code:?}");
        }
        Ok(())
    })?;
    until("it is gone", || rig.children().is_ok_and(|children| children.is_empty()))
}

fn shells_wait_and_read_the_code() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let script = format!("echo 1 > $UKP/vm/{uuid}/wait; cat $UKP/vm/{uuid}/wait");
    thread::scope(|scope| {
        let shells: Vec<_> = (0..3).map(|_| scope.spawn(|| rig.shell(&script))).collect();
        thread::sleep(Duration::from_millis(200));
        rig.host.stop(uuid, 143);
        for shell in shells {
            ensure!(shell.join().map_err(|_| anyhow::anyhow!("panicked"))?? == "143\n");
        }
        Ok(())
    })
}

fn one_that_has_stopped_is_not_waited_for() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    rig.host.stop(uuid, 0);
    let started = Instant::now();
    fs::write(rig.of(uuid, "wait"), "1")?;
    ensure!(started.elapsed() < Duration::from_secs(1));
    ensure!(fs::read_to_string(rig.of(uuid, "wait"))? == "0\n");
    Ok(())
}

fn reading_wait_does_not_block() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let mut options = OpenOptions::new();
    let nonblocking =
        options.read(true).custom_flags(libc::O_NONBLOCK).open(rig.of(uuid, "wait"))?;
    ensure!(errno(read_from(&nonblocking)) == libc::EAGAIN);
    let plain = File::open(rig.of(uuid, "wait"))?;
    ensure!(read_from(&plain)?.is_empty());
    rig.host.stop(uuid, 9);
    ensure!(read_from(&nonblocking)? == "9\n");
    ensure!(read_from(&plain)? == "9\n");
    Ok(())
}

fn poll_tells_when_the_code_is_there() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let file = File::open(rig.of(uuid, "wait"))?;
    let polled = |milliseconds: i64| -> Result<PollFlags> {
        let limit =
            Timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 };
        let mut fds = [PollFd::new(&file, PollFlags::IN)];
        poll(&mut fds, Some(&limit))?;
        Ok(fds[0].revents())
    };
    ensure!(polled(50)?.is_empty());
    thread::scope(|scope| -> Result<()> {
        let poller = scope.spawn(|| polled(10_000));
        thread::sleep(Duration::from_millis(100));
        let stopped = Instant::now();
        rig.host.stop(uuid, 3);
        let events = poller.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        ensure!(events.contains(PollFlags::IN), "{events:?}");
        ensure!(stopped.elapsed() < Duration::from_secs(2), "by the notification");
        Ok(())
    })?;
    ensure!(polled(0)?.contains(PollFlags::IN));
    ensure!(read_from(&file)? == "3\n");
    Ok(())
}

/// The kernel does not let a process go that waits for an answer, unless there is one.
fn a_waiter_can_be_killed() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let script = format!("echo 1 > {}", rig.of(uuid, "wait").display());
    let mut shell = Command::new("/bin/sh").args(["-c", &script]).spawn()?;
    thread::sleep(Duration::from_millis(200));
    ensure!(shell.try_wait()?.is_none());
    shell.kill()?;
    until("it is dead", || shell.try_wait().is_ok_and(|status| status.is_some()))
}

fn a_child_goes_when_its_code_was_read() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let status = File::open(rig.of(uuid, "status"))?;
    rig.host.stop(uuid, 0);
    ensure!(read_from(&status)? == "Stopped\n", "it is there until its code was read");
    ensure!(rig.shell(&format!("cat $UKP/vm/{uuid}/wait; ls $UKP/vm"))? == "0\n");
    ensure!(errno(File::open(rig.of(uuid, "status"))) == libc::ENOENT);
    rustix::fs::seek(&status, rustix::fs::SeekFrom::Start(0))?;
    ensure!(errno(read_from(&status)) == libc::ESTALE);
    Ok(())
}

fn a_child_goes_with_the_retention_time() -> Result<()> {
    let rig = Rig::with(16, Duration::from_millis(300))?;
    let (stops, lives) = (rig.fork()?, rig.fork()?);
    let wait = File::open(rig.of(stops, "wait"))?;
    rig.host.stop(stops, 0);
    ensure!(rig.children()?.len() == 2);
    until("it is gone", || rig.children().is_ok_and(|children| children == [lives.to_string()]))?;
    ensure!(errno(read_from(&wait)) == libc::ESTALE);
    Ok(())
}

fn unknown_is_stale() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = Uuid::new_v4();
    // The host forgot it before it was asked.
    rig.next(crate::rig::Fork::Child(uuid));
    rig.host.forget(uuid);
    fs::write(rig.path("fork"), "1")?;
    until("it is gone", || rig.children().is_ok_and(|children| children.is_empty()))?;
    ensure!(errno(File::open(rig.of(uuid, "status"))) == libc::ENOENT);
    Ok(())
}

fn a_silent_host_is_an_io_error() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    rig.host.silence();
    let started = Instant::now();
    ensure!(errno(fs::read_to_string(rig.of(uuid, "status"))) == libc::EIO);
    ensure!(started.elapsed() < Duration::from_secs(8));
    ensure!(rig.children()?.len() == 1, "the rest of the file system lives");
    Ok(())
}

fn a_host_that_learns_of_a_child_late() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = Uuid::new_v4();
    rig.next(crate::rig::Fork::Child(uuid));
    rig.host.forget(uuid);
    fs::write(rig.path("fork"), "1")?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read_to_string(rig.of(uuid, "status")));
        let waiter = scope.spawn(|| fs::write(rig.of(uuid, "wait"), "1"));
        thread::sleep(Duration::from_millis(300));
        rig.host.add(uuid);
        let status = reader.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        ensure!(status == "Running\n");
        thread::sleep(Duration::from_millis(300));
        rig.host.stop(uuid, 1);
        Ok(waiter.join().map_err(|_| anyhow::anyhow!("panicked"))??)
    })
}
