//! The process that standbys are forked from: an instance's memory as of the last sync, and nothing
//! else.
//!
//! It has one thread and no KVM object, so fork(2) is safe and cheap in it, and the kernel shares
//! every page among all children at any depth. It reads commands from a socket and ends when the
//! other side does.
//!
//! **Invariant:** only zygotes and standbys that have not made a KVM object yet call fork(2).
#![expect(unsafe_code, reason = "fork(2), and giving up inherited descriptors")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::apply::{PageBits, apply_plainly};
use super::consolidate::Consolidation;
use super::link::{self, Link};
use super::standby;
use super::step::ForkCause;
use crate::beacon;
use crate::kvm::Host;
use crate::memory::{BackingKind, Image, Mapping, MemoryError, Sealed};
use crate::program::{self, Part};
use crate::proto::{InstanceConfig, MAX_MESSAGE};
use crate::sys::{self, Forked, SysError};

/// How long a zygote may take for one command.
const PATIENCE: Timespec = Timespec { tv_sec: 15, tv_nsec: 0 };

/// From an instance to its zygote.
#[derive(Debug, Serialize, Deserialize)]
enum Command {
    /// Map this sealed image (its descriptor comes along).
    Adopt { bytes: u64, kind: BackingKind },
    /// Apply these journal entries.
    Sync { from: u32, to: u32 },
    /// Fork a standby into this slot (its socket comes along).
    Spawn { slot: u32, parent: Uuid },
}

/// The answer to a command.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Spawned { pid: i32 },
    Failed { errno: i32 },
}

/// What a zygote is made of. A standby inherits all of it.
#[derive(Debug)]
pub struct Womb {
    /// KVM's abilities, asked once.
    pub host: Host,
    /// Configuration of the instance.
    pub config: InstanceConfig,
    /// The instance's link.
    pub link: Link,
    /// The sealed image, once there is one.
    pub image: Option<Image<Sealed>>,
    /// The instance's memory as of the last sync.
    pub mapping: Option<Mapping>,
    /// Pages of it that differ from the sealed image.
    pub owned: Option<PageBits>,
}

/// Which side of [`Zygote::fork`] this is.
#[derive(Debug)]
pub enum Twin {
    /// The calling process goes on.
    Instance {
        /// The line to the other one.
        zygote: Zygote,
        /// As it was given.
        womb: Womb,
    },
    /// The new process, whose [`live`] it is.
    Zygote {
        /// A copy of it.
        womb: Womb,
        /// The line to the other one.
        line: OwnedFd,
    },
}

/// What a process that was forked to become a standby begins with.
#[derive(Debug)]
pub(super) struct Embryo {
    pub(super) womb: Womb,
    pub(super) slot: usize,
    pub(super) parent: Uuid,
    pub(super) line: OwnedFd,
}

/// An instance's end of the connection to its zygote.
#[derive(Debug)]
pub struct Zygote {
    socket: OwnedFd,
    pid: Pid,
    /// Journal entries that it has applied.
    tail: u32,
}

impl Zygote {
    /// Forks the zygote of this process.
    ///
    /// # Safety
    ///
    /// This process has one thread. In the new process nothing but what this returns is used again: the
    /// caller's other descriptors are closed there, without running destructors.
    ///
    /// # Errors
    ///
    /// What socketpair(2) and fork(2) say.
    pub unsafe fn fork(womb: Womb) -> Result<Twin, SysError> {
        let (ours, theirs) = sys::socket_pair()?;
        // SAFETY: one thread, by this function's contract.
        match unsafe { sys::fork() }? {
            Forked::Parent { child } => {
                drop(theirs);
                let zygote = Self { socket: ours, pid: child, tail: 0 };
                Ok(Twin::Instance { zygote, womb })
            }
            Forked::Child => {
                let keep = womb.descriptors(&theirs);
                std::mem::forget(ours);
                // SAFETY: nothing but `womb` and `theirs` is used from here on.
                unsafe { sys::close_all_but(&keep) };
                beacon::role(beacon::Role::Zygote);
                sys::set_process_name("ukp-zygote");
                sys::reap_children_automatically();
                Ok(Twin::Zygote { womb, line: theirs })
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Journal entries that it has applied.
    #[must_use]
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// The journal starts again at 0; the zygote has applied all of it.
    pub fn rewind(&mut self) {
        self.tail = 0;
    }

    /// Starts a zygote from nothing, for an instance that has lost its own. It has the image and
    /// nothing that changed since.
    ///
    /// # Errors
    ///
    /// What starting a process says, or that it ended at once.
    pub fn raise(
        config: &InstanceConfig,
        link: &Link,
        image: &Image<Sealed>,
        tail: u32,
    ) -> Result<Self, ForkCause> {
        let (ours, theirs) = sys::socket_pair()?;
        // Its end is noticed on the line; as SIGCHLD is ignored the kernel reaps it.
        let child = program::spawn(Part::Zygote, &theirs, Stdio::inherit())?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let zygote = Self { socket: ours, pid: pid.ok_or(ForkCause::ZygoteGone)?, tail };
        let bytes = serde_json::to_vec(config).map_err(|_| ForkCause::ZygoteGone)?;
        sys::send(&zygote.socket, &bytes, &[link.file().as_fd(), link.bell().as_fd()])?;
        zygote.adopt(image)?;
        Ok(zygote)
    }

    /// Hands the sealed image over.
    ///
    /// # Errors
    ///
    /// What the zygote says, or that it is gone.
    pub fn adopt(&self, image: &Image<Sealed>) -> Result<(), ForkCause> {
        let command = Command::Adopt { bytes: image.bytes(), kind: image.kind() };
        self.ask(&command, &[image.file()]).map(|_| ())
    }

    /// Brings it up to journal entry `to`.
    ///
    /// # Errors
    ///
    /// What the zygote says, or that it is gone.
    pub fn sync(&mut self, to: u32) -> Result<(), ForkCause> {
        if self.tail < to {
            self.ask(&Command::Sync { from: self.tail, to }, &[])?;
            self.tail = to;
        }
        Ok(())
    }

    /// Forks a standby into `slot`; it will talk over `socket`.
    ///
    /// # Errors
    ///
    /// What fork(2) says in the zygote, or that it is gone.
    pub fn spawn(&self, slot: u32, parent: Uuid, socket: BorrowedFd<'_>) -> Result<i32, ForkCause> {
        match self.ask(&Command::Spawn { slot, parent }, &[socket])? {
            Answer::Spawned { pid } => Ok(pid),
            Answer::Done | Answer::Failed { .. } => Err(ForkCause::ZygoteGone),
        }
    }

    fn ask(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Result<Answer, ForkCause> {
        let bytes = serde_json::to_vec(command).map_err(|_| ForkCause::ZygoteGone)?;
        let gone = |_: SysError| ForkCause::ZygoteGone;
        sys::send(&self.socket, &bytes, fds).map_err(gone)?;
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        // A signal is no reason to leave an answer behind that the next command would take for its.
        rustix::io::retry_on_intr(|| poll(&mut ready, Some(&PATIENCE)))
            .map_err(SysError::new("poll"))?;
        if ready[0].revents().is_empty() {
            // It may be stopped or stuck; either way it is of no use.
            rustix::process::kill_process(self.pid, rustix::process::Signal::KILL).unwrap_or(());
            return Err(ForkCause::ZygoteGone);
        }
        let mut buffer = [0_u8; 256];
        let (len, _) = sys::receive(&self.socket, &mut buffer, rustix::net::RecvFlags::empty())
            .map_err(gone)?;
        match serde_json::from_slice(&buffer[..len]) {
            Ok(Answer::Failed { errno }) => Err(ForkCause::Child { errno }),
            Ok(answer) => Ok(answer),
            // Nothing was received: the line is closed.
            Err(_) => Err(ForkCause::ZygoteGone),
        }
    }
}

impl Womb {
    /// Descriptors that a process made from it needs, and `socket`.
    pub(super) fn descriptors(&self, socket: &OwnedFd) -> Vec<i32> {
        let own = [self.link.file(), self.link.bell(), socket].map(AsRawFd::as_raw_fd);
        let image = self.image.as_ref().map(|image| image.file().as_raw_fd());
        own.into_iter().chain(image).chain([self.host.as_raw_fd()]).collect()
    }

    fn adopt(&mut self, file: OwnedFd, bytes: u64, kind: BackingKind) -> Result<(), MemoryError> {
        let image = Image::<Sealed>::adopt(file, bytes, kind)?;
        let mapping = image.map_private()?;
        beacon::guest(&mapping);
        self.owned = Some(PageBits::new(&mapping));
        self.mapping = Some(mapping);
        self.image = Some(image);
        Ok(())
    }
}

/// Becomes the zygote of an instance that has lost its own. `socket` is the line to it, and the
/// first message on it carries the configuration and the link.
pub fn serve_raised(socket: OwnedFd) -> ! {
    beacon::role(beacon::Role::Zygote);
    sys::set_process_name("ukp-zygote");
    sys::open_to_its_own();
    sys::reap_children_automatically();
    match raised_womb(&socket) {
        Ok(womb) => live(womb, socket),
        // The instance sees the line closed.
        Err(_) => std::process::exit(1),
    }
}

fn raised_womb(socket: &OwnedFd) -> Result<Womb, ForkCause> {
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    let (len, fds) = sys::receive(socket, &mut buffer, rustix::net::RecvFlags::empty())?;
    let config: InstanceConfig =
        serde_json::from_slice(&buffer[..len]).map_err(|_| ForkCause::ZygoteGone)?;
    let [file, bell] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| ForkCause::ZygoteGone)?;
    let link = Link::adopt(link::capacity(config.ring_entries, config.vcpus), file, bell)?;
    Ok(Womb { host: Host::open()?, config, link, image: None, mapping: None, owned: None })
}

/// The life of a zygote, and of all that come out of it.
///
/// A standby's process returns here from where it was forked, and so does its own zygote's. If they went
/// on from there, the stack would be deeper with each generation: a fork would come to pages that nobody
/// has touched yet, for which the kernel takes 2 us per ancestor, and one day to its end.
pub fn live(mut womb: Womb, mut line: OwnedFd) -> ! {
    loop {
        let embryo = serve(womb, &line);
        // A standby has nothing to say there.
        drop(line);
        (womb, line) = standby::run(embryo);
    }
}

/// Does what the instance says, until it is gone. Returns in processes that are to become standbys.
fn serve(mut womb: Womb, socket: &OwnedFd) -> Embryo {
    let mut buffer = [0_u8; 256];
    let mut consolidation = Consolidation::default();
    loop {
        let (len, mut fds) =
            match sys::receive(socket, &mut buffer, rustix::net::RecvFlags::empty()) {
                Ok((len, fds)) if len > 0 => (len, fds),
                // The instance is gone, and with it the need for standbys.
                _ => std::process::exit(0),
            };
        let answer = match serde_json::from_slice(&buffer[..len]) {
            Ok(Command::Adopt { bytes, kind }) => {
                match fds.pop().map(|file| womb.adopt(file, bytes, kind)) {
                    Some(Ok(())) => Answer::Done,
                    Some(Err(error)) => Answer::Failed { errno: ForkCause::from(error).errno() },
                    None => Answer::Failed { errno: libc::EBADF },
                }
            }
            Ok(Command::Sync { from, to }) => match (&womb.mapping, &mut womb.owned) {
                (Some(mapping), Some(owned)) => {
                    let applied = apply_plainly(&womb.link, mapping, from, to, |page| {
                        owned.insert(page);
                        consolidation.note(page);
                    });
                    match applied {
                        Ok(()) => Answer::Done,
                        Err(cause) => Answer::Failed { errno: cause.errno() },
                    }
                }
                _ => Answer::Failed { errno: libc::ENODATA },
            },
            Ok(Command::Spawn { slot, parent }) => {
                consolidation.step(&mut womb);
                match fds.pop() {
                    // SAFETY: a zygote never starts a thread.
                    Some(line) => match unsafe { sys::fork() } {
                        Ok(Forked::Parent { child }) => {
                            Answer::Spawned { pid: child.as_raw_nonzero().get() }
                        }
                        Ok(Forked::Child) => {
                            return Embryo { womb, slot: slot as usize, parent, line };
                        }
                        Err(error) => Answer::Failed { errno: error.errno() },
                    },
                    None => Answer::Failed { errno: libc::EBADF },
                }
            }
            Err(_) => Answer::Failed { errno: libc::EINVAL },
        };
        let Ok(bytes) = serde_json::to_vec(&answer) else { std::process::exit(1) };
        if sys::send(socket.as_fd(), &bytes, &[]).is_err() {
            std::process::exit(0);
        }
    }
}
