//! Forking, in the parent and in the child.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_agent::reaper::Reaper;
use guest_agent::serve::Server;
use guest_wire::{
    Call, Kind, Reply, Request, WorkloadState, read_control, write_control, write_frame,
};
use uuid::Uuid;

use crate::Case;
use crate::rig::{Fork, LIMIT, Rig, errno, read_from, until, write_to};

pub const CASES: &[Case] = &[
    ("forks::a_shell_reads_the_uuid_of_its_child", a_shell_reads_the_uuid_of_its_child),
    ("forks::two_threads_read_their_own_child", two_threads_read_their_own_child),
    ("forks::one_open_file_is_enough", one_open_file_is_enough),
    ("forks::a_full_queue_is_busy", a_full_queue_is_busy),
    ("forks::a_write_that_comes_in_pieces_does_not_fork", in_pieces),
    ("forks::a_failed_fork_is_an_io_error", a_failed_fork_is_an_io_error),
    ("forks::the_child_reads_the_zero_uuid", the_child_reads_the_zero_uuid),
    ("forks::who_asks_meanwhile_is_answered_afterwards", who_asks_meanwhile_is_answered_afterwards),
    ("forks::what_was_queued_belonged_to_the_parent", what_was_queued_belonged_to_the_parent),
    ("forks::what_was_not_read_belonged_to_the_parent", what_was_not_read_belonged_to_the_parent),
    ("forks::a_child_of_a_child_of_a_child", a_child_of_a_child_of_a_child),
    ("forks::a_child_that_is_not_unique_is_stopped", a_child_that_is_not_unique_is_stopped),
    ("forks::what_was_open_is_stale_in_the_child", what_was_open_is_stale_in_the_child),
    ("forks::one_that_waits_is_told_in_the_child", one_that_waits_is_told_in_the_child),
    ("forks::a_folder_entered_before_is_stale", a_folder_entered_before_is_stale),
];

fn a_shell_reads_the_uuid_of_its_child() -> Result<()> {
    let rig = Rig::new()?;
    ensure!(fs::read_to_string(rig.path("fork"))?.is_empty(), "before any fork: empty");
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    rig.next(Fork::Child(a));
    rig.next(Fork::Child(b));
    let script = "echo 1 > $UKP/fork; child=$(cat $UKP/fork); echo $child; ls $UKP/vm
        echo 1 > $UKP/fork; cat $UKP/fork";
    ensure!(rig.shell(script)? == format!("{a}\n{a}\n{b}\n"));
    // Another program that did not fork reads the last one.
    ensure!(fs::read_to_string(rig.path("fork"))? == format!("{b}\n"));
    ensure!(rig.children()? == [a.to_string(), b.to_string()], "in the order of the forks");
    Ok(())
}

fn in_pieces() -> Result<()> {
    let rig = Rig::new()?;
    ensure!(errno(fs::write(rig.path("fork"), vec![b'1'; 200_000])) == libc::EINVAL);
    ensure!(rig.bell.rung.load(Ordering::SeqCst) == 0);
    rig.next(Fork::Child(Uuid::new_v4()));
    fs::write(rig.path("fork"), vec![b'1'; 5000])?;
    ensure!(rig.bell.rung.load(Ordering::SeqCst) == 1);
    Ok(())
}

/// The one that asked first has the first child, although it reads when the second was made: by its
/// own file, and by one that it opens then.
fn two_threads_read_their_own_child() -> Result<()> {
    let rig = Rig::new()?;
    for round in 0..20 {
        let children = [Uuid::new_v4(), Uuid::new_v4()];
        let answered = Barrier::new(2);
        let read = thread::scope(|scope| -> Result<_> {
            let rung = rig.bell.rung.load(Ordering::SeqCst);
            let fork = || {
                scope.spawn(|| -> Result<[String; 2]> {
                    let mut options = OpenOptions::new();
                    let file = options.read(true).write(true).open(rig.path("fork"))?;
                    let written = write_to(&file);
                    answered.wait();
                    written?;
                    Ok([read_from(&file)?, fs::read_to_string(rig.path("fork"))?])
                })
            };
            let first = fork();
            until("the doorbell rings", || rig.bell.rung.load(Ordering::SeqCst) > rung)?;
            let second = fork();
            until("the second waits", || rig.service.stats().queued == 1)?;
            for child in children {
                rig.next(Fork::Child(child));
            }
            Ok([first.join(), second.join()])
        })?;
        for (read, child) in read.into_iter().zip(children) {
            let read = read.map_err(|_| anyhow::anyhow!("panicked"))??;
            let expected = format!("{child}\n");
            ensure!(read.iter().all(|read| *read == expected), "{round}: {read:?}, not {child}");
        }
    }
    Ok(())
}

fn one_open_file_is_enough() -> Result<()> {
    let rig = Rig::new()?;
    let file = OpenOptions::new().read(true).write(true).open(rig.path("fork"))?;
    for _ in 0..3 {
        let uuid = Uuid::new_v4();
        rig.next(Fork::Child(uuid));
        write_to(&file)?;
        ensure!(read_from(&file)? == format!("{uuid}\n"));
        ensure!(read_from(&file)?.is_empty(), "the end");
    }
    Ok(())
}

fn a_full_queue_is_busy() -> Result<()> {
    let rig = Rig::with(2, Duration::from_mins(1))?;
    thread::scope(|scope| -> Result<()> {
        let mut writers = Vec::new();
        for number in 0..3 {
            writers.push(scope.spawn(|| fs::write(rig.path("fork"), "1")));
            until("it is queued", || {
                rig.bell.rung.load(Ordering::SeqCst) == 1 && rig.service.stats().queued == number
            })?;
        }
        let started = Instant::now();
        ensure!(errno(fs::write(rig.path("fork"), "1")) == libc::EBUSY);
        ensure!(started.elapsed() < Duration::from_secs(1), "refused at once");
        for _ in 0..3 {
            rig.next(Fork::Child(Uuid::new_v4()));
        }
        for writer in writers {
            writer.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        Ok(())
    })?;
    rig.fork()?;
    ensure!(rig.children()?.len() == 4);
    Ok(())
}

fn a_failed_fork_is_an_io_error() -> Result<()> {
    let rig = Rig::new()?;
    rig.next(Fork::Fail(12));
    ensure!(errno(fs::write(rig.path("fork"), "1")) == libc::EIO);
    ensure!(fs::read_to_string(rig.path("fork"))?.is_empty());
    rig.fork()?;
    let stats = rig.service.stats();
    ensure!((stats.forks, stats.failed) == (1, 1), "{stats:?}");
    Ok(())
}

fn the_child_reads_the_zero_uuid() -> Result<()> {
    let rig = Rig::new()?;
    rig.fork()?;
    let own = Uuid::new_v4();
    rig.next(Fork::Become(own, 7));
    let grandchild = Uuid::new_v4();
    rig.next(Fork::Child(grandchild));
    let script = "echo 1 > $UKP/fork; cat $UKP/fork; ls $UKP/vm; echo 1 > $UKP/fork; cat $UKP/fork";
    ensure!(rig.shell(script)? == format!("{}\n{grandchild}\n", Uuid::nil()));
    ensure!(rig.service.identity() == (own, 7));
    ensure!(*guest_agent::sync::lock(&rig.renewals.generations) == [7]);
    // Who has nothing to do with either fork.
    ensure!(fs::read_to_string(rig.path("fork"))? == format!("{grandchild}\n"));
    let birth = rig.service.stats().birth_us;
    eprintln!("from the answer to the reply, nothing renewed: {birth:?} us");
    Ok(())
}

/// A child with several processors runs before it is another machine: the host is not answered then.
fn who_asks_meanwhile_is_answered_afterwards() -> Result<()> {
    let rig = Rig::new()?;
    let server = Arc::new(Server {
        service: rig.service.clone(),
        reaper: Reaper::of_process(),
        env: BTreeMap::new(),
        cwd: "/".into(),
        group: None,
        workload: Arc::new(Mutex::new(WorkloadState::Running { pid: 1 })),
        libukp: rig.at.clone(),
        requests: AtomicUsize::new(0),
    });
    let call = |to, request| -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        server.accept(theirs.into());
        write_control(&mut &ours, &Call { to, request })?;
        Ok(ours)
    };
    let ask = || call(Uuid::nil(), Request::Ping);
    let file = std::env::temp_dir().join(Uuid::new_v4().to_string());
    let write = || Request::Write { path: file.to_string_lossy().into_owned(), mode: 0o600 };
    rig.service.welcomed(Uuid::new_v4());
    let answer = |from: &UnixStream, limit| {
        from.set_read_timeout(Some(limit))?;
        match read_control(&mut &*from)? {
            Some(Reply::Pong { uuid, .. }) => Ok(uuid),
            other => Err(anyhow::anyhow!("{other:?}")),
        }
    };
    for own in [Uuid::new_v4(), Uuid::new_v4()] {
        thread::scope(|scope| -> Result<()> {
            let rung = rig.bell.rung.load(Ordering::SeqCst);
            let forking = scope.spawn(|| fs::write(rig.path("fork"), "1"));
            until("the doorbell rings", || rig.bell.rung.load(Ordering::SeqCst) > rung)?;
            let asked = ask()?;
            // What is asked of a parent is not done in its child, too.
            let of_parent = call(rig.service.identity().0, write())?;
            let early = answer(&asked, Duration::from_millis(50));
            rig.next(Fork::Become(own, 1));
            ensure!(early.is_err(), "it was answered before it was known by whom: {early:?}");
            forking.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(answer(&asked, LIMIT)? == own);
            of_parent.set_read_timeout(Some(LIMIT))?;
            let answered = read_control::<Reply>(&mut &of_parent)?;
            ensure!(answered.is_none() && !file.exists(), "the child answered {answered:?}");
            Ok(())
        })?;
    }
    // The child is asked by its own name.
    let written = call(rig.service.identity().0, write())?;
    write_frame(&mut &written, Kind::Data, &[])?;
    written.set_read_timeout(Some(LIMIT))?;
    ensure!(read_control::<Reply>(&mut &written)? == Some(Reply::Done));
    fs::remove_file(&file)?;
    let own = rig.service.identity().0;
    // A fork that gives a child, or fails, is over, too.
    rig.fork()?;
    ensure!(answer(&ask()?, LIMIT)? == own);
    rig.next(Fork::Fail(5));
    ensure!(errno(fs::write(rig.path("fork"), "1")) == libc::EIO);
    ensure!(answer(&ask()?, LIMIT)? == own);
    Ok(())
}

fn what_was_queued_belonged_to_the_parent() -> Result<()> {
    let rig = Rig::new()?;
    thread::scope(|scope| -> Result<()> {
        let first = scope.spawn(|| fs::write(rig.path("fork"), "1"));
        until("the doorbell rings", || rig.bell.rung.load(Ordering::SeqCst) == 1)?;
        let queued: Vec<_> =
            (0..4).map(|_| scope.spawn(|| fs::write(rig.path("fork"), "1"))).collect();
        until("the others wait", || rig.service.stats().queued == 4)?;
        rig.next(Fork::Become(Uuid::new_v4(), 1));
        first.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        for writer in queued {
            let result = writer.join().map_err(|_| anyhow::anyhow!("panicked"))?;
            ensure!(errno(result) == libc::EIO);
        }
        Ok(())
    })?;
    // The child's own forks are not the parent's.
    rig.fork()?;
    ensure!(rig.bell.rung.load(Ordering::SeqCst) == 2);
    Ok(())
}

/// The agent reads a request only when it is another machine already. It was made before the barrier.
fn what_was_not_read_belonged_to_the_parent() -> Result<()> {
    let rig = Rig::new()?;
    let results = rig.write_at_birth("fork");
    rig.next(Fork::Become(Uuid::new_v4(), 1));
    fs::write(rig.path("fork"), "1")?;
    ensure!(results.recv_timeout(LIMIT)? == libc::EIO);
    rig.fork()?;
    ensure!(rig.bell.rung.load(Ordering::SeqCst) == 2, "it was not a fork of the child's");
    Ok(())
}

/// What is asked right after a fork has returned in the child was asked of the child, however often
/// that happens. Others who ask all the time see nothing but success and `EIO`.
fn a_child_of_a_child_of_a_child() -> Result<()> {
    let rig = Rig::new()?;
    for generation in 1..50 {
        rig.next(Fork::Become(Uuid::new_v4(), generation));
        fs::write(rig.path("fork"), "1")?;
        ensure!(rig.service.identity().1 == generation);
    }
    let end = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let ask = || {
            let mut errors = Vec::new();
            while !end.load(Ordering::SeqCst) {
                errors.push(errno(fs::write(rig.path("fork"), "1")));
            }
            errors
        };
        let others: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
        for generation in 50..100 {
            rig.next(Fork::Become(Uuid::new_v4(), generation));
        }
        let all = until("it became all of them", || rig.service.identity().1 == 99);
        end.store(true, Ordering::SeqCst);
        (0..8).for_each(|_| rig.next(Fork::Fail(5)));
        let mut succeeded = 0;
        for other in others {
            let errors = other.join().map_err(|_| anyhow::anyhow!("panicked"))?;
            succeeded += errors.iter().filter(|errno| **errno == 0).count();
            ensure!(errors.iter().all(|errno| [0, libc::EIO].contains(errno)), "{errors:?}");
        }
        ensure!(succeeded == 50, "{succeeded} succeeded");
        all
    })
}

fn a_child_that_is_not_unique_is_stopped() -> Result<()> {
    let rig = Rig::new()?;
    rig.renewals.fail.store(true, Ordering::SeqCst);
    rig.next(Fork::Become(Uuid::new_v4(), 1));
    ensure!(errno(fs::write(rig.path("fork"), "1")) == libc::EIO);
    ensure!(rig.stopped.load(Ordering::SeqCst));
    Ok(())
}

fn what_was_open_is_stale_in_the_child() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    let status = File::open(rig.of(uuid, "status"))?;
    let wait = OpenOptions::new().read(true).write(true).open(rig.of(uuid, "wait"))?;
    let fork = OpenOptions::new().read(true).write(true).open(rig.path("fork"))?;
    let folder =
        rustix::fs::open(rig.path("vm"), rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())?;
    ensure!(read_from(&status)? == "Running\n");
    rig.next(Fork::Become(Uuid::new_v4(), 1));
    write_to(&fork)?;
    ensure!(read_from(&fork)? == format!("{}\n", Uuid::nil()), "this one is the machine's own");
    ensure!(errno(read_from(&status)) == libc::ESTALE);
    ensure!(errno(read_from(&wait)) == libc::ESTALE);
    ensure!(errno(write_to(&wait)) == libc::ESTALE);
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut entries = rustix::fs::RawDir::new(&folder, &mut buffer);
    let listed = entries.next().map(|entry| entry.map(|_| ()));
    ensure!(listed == Some(Err(rustix::io::Errno::STALE)), "{listed:?}");
    ensure!(rig.children()?.is_empty());
    ensure!(errno(File::open(rig.of(uuid, "status"))) == libc::ENOENT);
    Ok(())
}

fn one_that_waits_is_told_in_the_child() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    thread::scope(|scope| {
        let waiter = scope.spawn(|| fs::write(rig.of(uuid, "wait"), "1"));
        thread::sleep(Duration::from_millis(50));
        ensure!(!waiter.is_finished());
        rig.next(Fork::Become(Uuid::new_v4(), 1));
        fs::write(rig.path("fork"), "1")?;
        let result = waiter.join().map_err(|_| anyhow::anyhow!("panicked"))?;
        ensure!(errno(result) == libc::ESTALE);
        Ok(())
    })
}

fn a_folder_entered_before_is_stale() -> Result<()> {
    let rig = Rig::new()?;
    let uuid = rig.fork()?;
    rig.next(Fork::Become(Uuid::new_v4(), 1));
    let script = format!(
        "cd $UKP/vm/{uuid}; cat status; echo 1 > $UKP/fork; if cat status 2>&1; then exit 1; fi"
    );
    let output = rig.shell(&script)?;
    ensure!(output.starts_with("Running\n"), "{output}");
    ensure!(output.contains("tale"), "{output}");
    Ok(())
}
