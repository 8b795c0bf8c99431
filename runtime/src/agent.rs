//! Asks the agent in a Linux guest: is it there, run this, copy that.
//!
//! Each question is a connection of its own to the instance's socket, by the convention
//! of Firecracker's vsock: `CONNECT port`, `OK port`, and from there on what the guest says.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_wire::{
    AGENT_PORT, Call, Frame, FrameError, Kind, Reply, Request, Terminal, control, read_frame,
    write_control, write_frame,
};
use thiserror::Error;
use uuid::Uuid;

/// How long an agent may take to say that it is there.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a fork may take, which may have to wait for others.
const FORK: Duration = Duration::from_mins(1);
/// Bytes of a file in one frame.
const PIECE: usize = 32 * 1024;
/// Longest answer to `CONNECT`.
const LINE: usize = 64;

/// Why an agent does not do what it was asked for.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Nobody listens.
    #[error("the instance has no agent socket (a bare guest has no agent): {}", path.display())]
    NoSocket {
        /// Where.
        path: PathBuf,
        /// What connect(2) says.
        source: io::Error,
    },
    /// The guest refuses the connection.
    #[error("no agent answers in the guest: it was booted without one, or is not up yet")]
    NoAgent,
    /// The connection failed on the way.
    #[error("the connection to the agent failed")]
    Lost(#[source] FrameError),
    /// The agent does not say what the protocol wants.
    #[error("the agent said what does not fit: {0}")]
    Unexpected(String),
    /// What the agent refuses, or cannot do.
    #[error("in the guest: {message}")]
    Refused {
        /// Linux's error number.
        errno: i32,
        /// What failed.
        message: String,
    },
    /// A file here.
    #[error("here: {0}")]
    Local(#[source] io::Error),
}

/// The socket of an instance in its owner's folder.
#[must_use]
pub fn socket_of(folder: &Path, instance: Uuid) -> PathBuf {
    folder.join(format!("{instance}.vsock"))
}

/// A connection to an agent, for one request.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    /// Where its socket is, and whose it is.
    at: (PathBuf, Uuid),
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the environment of the guest's workload.
    pub env: BTreeMap<String, String>,
    /// Where; the workload's directory if absent.
    pub cwd: Option<String>,
    /// With a terminal of this size.
    pub tty: Option<Terminal>,
}

/// Something that a running program says.
#[derive(Debug)]
pub enum Said {
    /// On its output.
    Out(Vec<u8>),
    /// On its error output.
    Err(Vec<u8>),
    /// It has ended.
    Exited(i32),
}

impl Agent {
    /// Connects to the agent of an instance, whose socket is in `folder`.
    ///
    /// # Errors
    ///
    /// That there is no instance, or no agent in it.
    pub fn connect(folder: &Path, instance: Uuid) -> Result<Self, AgentError> {
        let socket = &socket_of(folder, instance);
        let lost = |error| AgentError::Lost(FrameError::Io(error));
        let mut stream = UnixStream::connect(socket)
            .map_err(|source| AgentError::NoSocket { path: socket.to_owned(), source })?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).map_err(lost)?;
        // Byte by byte: what follows the line is not ours to read yet.
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() < LINE && line.last() != Some(&b'\n') {
            match stream.read(&mut byte) {
                Ok(0) => return Err(AgentError::NoAgent),
                Ok(_) => line.push(byte[0]),
                // Its driver has not looked at what waits for it.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Err(AgentError::NoAgent);
                }
                Err(error) => return Err(lost(error)),
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(AgentError::NoAgent);
        }
        Ok(Self { stream, at: (folder.to_owned(), instance) })
    }

    /// A door for the fuzz targets: a connection that was made already.
    #[cfg(feature = "fuzzing")]
    #[doc(hidden)]
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        Self { stream, at: <_>::default() }
    }

    /// Who is there: UUID and generation, as the guest knows them.
    ///
    /// # Errors
    ///
    /// What became of the connection.
    pub fn ping(mut self) -> Result<(Uuid, u64), AgentError> {
        self.ask(Request::Ping)?;
        match self.reply()? {
            Reply::Pong { uuid, generation } => Ok((uuid, generation)),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes the guest fork itself; returns the child, as the guest knows it.
    ///
    /// # Errors
    ///
    /// That the fork failed, or what became of the connection.
    pub fn fork(mut self) -> Result<Uuid, AgentError> {
        self.stream.set_read_timeout(Some(FORK)).map_err(|error| AgentError::Lost(error.into()))?;
        self.ask(Request::Fork)?;
        match self.reply()? {
            Reply::Forked { uuid } => Ok(uuid),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells the workload to end, with SIGTERM.
    ///
    /// # Errors
    ///
    /// What became of the connection.
    pub fn terminate(mut self) -> Result<(), AgentError> {
        self.ask(Request::Terminate)?;
        match self.reply()? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts a program. Its input goes through [`Running::input`].
    ///
    /// # Errors
    ///
    /// Why it does not run, or what became of the connection.
    pub fn exec(mut self, command: &Command) -> Result<Running, AgentError> {
        let Command { argv, env, cwd, tty } = command.clone();
        self.ask(Request::Exec { argv, env, cwd, tty })?;
        // A fork of the guest comes first, and it may be silent for as long as it runs.
        self.stream.set_read_timeout(None).map_err(|error| AgentError::Lost(error.into()))?;
        match self.reply()? {
            Reply::Started { pid } => Ok(Running { agent: self, pid }),
            other => Err(unexpected(&other)),
        }
    }

    fn signal(mut self, pid: u32, number: i32) -> Result<(), AgentError> {
        self.ask(Request::Signal { pid, number })?;
        match self.reply()? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Writes a file in the guest.
    ///
    /// # Errors
    ///
    /// What became of it, there or here.
    pub fn write(mut self, path: &str, mode: u32, from: &mut impl Read) -> Result<(), AgentError> {
        self.ask(Request::Write { path: path.to_owned(), mode })?;
        let mut piece = vec![0; PIECE];
        loop {
            let len = from.read(&mut piece).map_err(AgentError::Local)?;
            if let Err(error) = write_frame(&mut self.stream, Kind::Data, &piece[..len]) {
                // It may have said why it stopped to listen.
                return Err(self.reply().err().unwrap_or(AgentError::Lost(error)));
            }
            if len == 0 {
                break;
            }
        }
        match self.reply()? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads a file of the guest. `begin` gets its permissions and gives what it is written to.
    ///
    /// # Errors
    ///
    /// What became of it, there or here.
    pub fn read<W: Write>(
        mut self,
        path: &str,
        begin: impl FnOnce(u32) -> io::Result<W>,
    ) -> Result<W, AgentError> {
        self.ask(Request::Read { path: path.to_owned() })?;
        let mut to = match self.reply()? {
            Reply::File { mode, .. } => begin(mode).map_err(AgentError::Local)?,
            other => return Err(unexpected(&other)),
        };
        loop {
            let frame = self.frame()?;
            match frame.kind {
                Kind::Data if frame.payload.is_empty() => return Ok(to),
                Kind::Data => to.write_all(&frame.payload).map_err(AgentError::Local)?,
                _ => return Err(unexpected(&reply_in(&frame)?)),
            }
        }
    }

    fn ask(&mut self, request: Request) -> Result<(), AgentError> {
        let call = Call { to: self.at.1, request };
        write_control(&mut self.stream, &call).map_err(AgentError::Lost)
    }

    fn frame(&mut self) -> Result<Frame, AgentError> {
        let end = || AgentError::Lost(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
        read_frame(&mut self.stream).map_err(AgentError::Lost)?.ok_or_else(end)
    }

    fn reply(&mut self) -> Result<Reply, AgentError> {
        reply_in(&self.frame()?)
    }
}

/// A program that runs in a guest.
#[derive(Debug)]
pub struct Running {
    agent: Agent,
    /// Its process id in the guest.
    pid: u32,
}

impl Running {
    /// The way to its input, from any thread.
    ///
    /// # Errors
    ///
    /// If there is no descriptor left.
    pub fn input(&self) -> Result<ProgramInput, AgentError> {
        self.agent.stream.try_clone().map(ProgramInput).map_err(AgentError::Local)
    }

    /// The way to send it signals, from any thread.
    #[must_use]
    pub fn signals(&self) -> ProgramSignals {
        ProgramSignals { at: self.agent.at.clone(), pid: self.pid }
    }

    /// What it says next.
    ///
    /// # Errors
    ///
    /// What became of it.
    pub fn hear(&mut self) -> Result<Said, AgentError> {
        let frame = self.agent.frame()?;
        match frame.kind {
            Kind::Stdout => Ok(Said::Out(frame.payload)),
            Kind::Stderr => Ok(Said::Err(frame.payload)),
            _ => match reply_in(&frame)? {
                Reply::Exited { code } => Ok(Said::Exited(code)),
                other => Err(unexpected(&other)),
            },
        }
    }
}

/// Sends signals to a program, whether it reads its input or not.
#[derive(Clone, Debug)]
pub struct ProgramSignals {
    at: (PathBuf, Uuid),
    pid: u32,
}

impl ProgramSignals {
    /// Sends a signal to the program's process group, if it has not ended.
    ///
    /// # Errors
    ///
    /// That there is no such signal, or what became of the connection.
    pub fn send(&self, number: i32) -> Result<(), AgentError> {
        let (folder, instance) = &self.at;
        Agent::connect(folder, *instance)?.signal(self.pid, number)
    }
}

/// The way to a program's input.
#[derive(Debug)]
pub struct ProgramInput(UnixStream);

impl ProgramInput {
    /// Sends bytes; none closes it.
    ///
    /// # Errors
    ///
    /// That the program has ended, or the connection.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        write_frame(&mut self.0, Kind::Data, bytes).map_err(AgentError::Lost)
    }

    /// Sends a new size of the terminal.
    ///
    /// # Errors
    ///
    /// As [`ProgramInput::send`].
    pub fn tell(&mut self, what: guest_wire::Input) -> Result<(), AgentError> {
        write_control(&mut self.0, &what).map_err(AgentError::Lost)
    }
}

/// The reply in a frame; a refusal is an error.
fn reply_in(frame: &Frame) -> Result<Reply, AgentError> {
    match control(frame).map_err(AgentError::Lost)? {
        Reply::Failed { errno, message } => Err(AgentError::Refused { errno, message }),
        reply => Ok(reply),
    }
}

fn unexpected(reply: &Reply) -> AgentError {
    AgentError::Unexpected(format!("{reply:?}"))
}
