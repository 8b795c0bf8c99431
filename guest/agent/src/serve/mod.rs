//! What the host asks the agent for: one request on each connection.

mod exec;
mod files;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest_wire::{
    Call, FrameError, Kind, Reply, Request, WorkloadState, read_control, write_control, write_frame,
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::Signal;

use crate::cli::{self, CliError};
use crate::console::{chain, say};
use crate::fs::Service;
use crate::processes::since_boot;
use crate::reaper::Reaper;
use crate::sync::lock;

/// Most requests at the same time.
const REQUESTS: usize = 64;
/// How long a connection may be without a request.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Answers requests.
pub struct Server {
    /// Who this instance is.
    pub service: Arc<Service>,
    /// Starts programs.
    pub reaper: Arc<Reaper>,
    /// Environment of programs.
    pub env: BTreeMap<String, String>,
    /// Where they run.
    pub cwd: PathBuf,
    /// The control group that they join.
    pub group: Option<Arc<File>>,
    /// The workload.
    pub workload: Arc<Mutex<WorkloadState>>,
    /// Where `/uk/libukp` is mounted.
    pub libukp: PathBuf,
    /// Requests at this moment.
    pub requests: AtomicUsize,
}

/// A connection. Output of several threads goes to it, a frame at a time.
#[derive(Clone)]
struct Connection {
    reader: Arc<File>,
    writer: Arc<Mutex<File>>,
}

impl Connection {
    fn reply(&self, reply: &Reply) -> Result<(), FrameError> {
        write_control(&mut *lock(&self.writer), reply)
    }

    fn send(&self, kind: Kind, bytes: &[u8]) -> Result<(), FrameError> {
        write_frame(&mut *lock(&self.writer), kind, bytes)
    }

    fn fail(&self, what: &str, error: &io::Error) -> Result<(), FrameError> {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        self.reply(&Reply::Failed { errno, message: format!("{what}: {error}") })
    }
}

impl Server {
    /// Answers the request on `stream` in a thread of its own.
    pub fn accept(self: &Arc<Self>, stream: OwnedFd) {
        let server = self.clone();
        let name = std::thread::Builder::new().name("ukp-serve".into());
        if let Err(error) = name.spawn(move || server.serve(stream)) {
            say(format_args!("a request is not answered, there is no thread for it: {error}"));
        }
    }

    /// Answers the request on `stream`, to its end.
    pub fn serve(&self, stream: OwnedFd) {
        let others = self.requests.fetch_add(1, Ordering::SeqCst);
        let result = self.answer(stream, others);
        self.requests.fetch_sub(1, Ordering::SeqCst);
        match result {
            // The host is gone, or this is a child and it never was there.
            Ok(()) | Err(FrameError::Io(_) | FrameError::Truncated { .. }) => {}
            Err(error) => say(format_args!("a request of the host failed: {}", chain(&error))),
        }
    }

    fn answer(&self, stream: OwnedFd, others: usize) -> Result<(), FrameError> {
        let limit = |limit| set_socket_timeout(stream.as_fd(), Timeout::Recv, limit);
        limit(Some(REQUEST_LIMIT)).map_err(io::Error::from)?;
        let reader = File::from(stream.try_clone()?);
        let request = read_control(&mut &reader);
        limit(None).map_err(io::Error::from)?;
        let connection =
            Connection { reader: Arc::new(reader), writer: Arc::new(Mutex::new(stream.into())) };
        let Call { to, request } = match request {
            Ok(Some(call)) => call,
            Ok(None) => return Ok(()),
            Err(error) => {
                let message = chain(&error);
                connection.reply(&Reply::Failed { errno: libc::EINVAL, message })?;
                return Err(error);
            }
        };
        if others >= REQUESTS {
            let message = format!("{others} requests are being answered already");
            return connection.reply(&Reply::Failed { errno: libc::EBUSY, message });
        }
        // Another processor of a child may be here before the child is another machine.
        self.service.settle();
        if self.service.was(to) {
            // The parent does it, and has the connection: this end of it is about to be reset.
            return Ok(());
        }
        match request {
            Request::Ping => {
                let (uuid, generation) = self.service.identity();
                connection.reply(&Reply::Pong { uuid, generation })
            }
            Request::Status => {
                let workload = *lock(&self.workload);
                let uptime_ms = u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX);
                connection.reply(&Reply::Status { workload, uptime_ms })
            }
            Request::Exec { argv, env, cwd, tty } => {
                let program = exec::Program { argv, env, cwd, tty };
                exec::run(self, &connection, &program)
            }
            Request::Write { path, mode } => files::write(&connection, &path, mode),
            Request::Read { path } => files::read(&connection, &path),
            Request::Fork => self.fork(&connection),
            Request::Signal { pid, number } => {
                let Some(signal) = Signal::from_named_raw(number) else {
                    let message = format!("there is no signal {number}");
                    return connection.reply(&Reply::Failed { errno: libc::EINVAL, message });
                };
                self.reaper.signal(pid, signal);
                connection.reply(&Reply::Done)
            }
            Request::Terminate => {
                if let WorkloadState::Running { pid } = *lock(&self.workload) {
                    self.reaper.signal(pid, Signal::TERM);
                }
                connection.reply(&Reply::Done)
            }
        }
    }

    /// By the file system, so that it takes its turn among the forks of programs.
    fn fork(&self, connection: &Connection) -> Result<(), FrameError> {
        match cli::fork(&self.libukp) {
            Ok((uuid, _)) => match uuid.parse() {
                Ok(uuid) => connection.reply(&Reply::Forked { uuid }),
                Err(_) => connection.fail("fork", &io::Error::from_raw_os_error(libc::EIO)),
            },
            Err(error) => {
                let errno = match &error {
                    CliError::Io { source, .. } => source.raw_os_error(),
                    _ => None,
                };
                let errno = errno.unwrap_or(libc::EIO);
                connection.reply(&Reply::Failed { errno, message: chain(&error) })
            }
        }
    }
}

#[cfg(test)]
mod tests;
