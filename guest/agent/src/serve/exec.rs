//! Programs that the host runs in the guest.
//!
//! ```text
//!  host ──> input thread (this one) ──> stdin or terminal ──> program
//!  host <── pumps <── stdout, stderr or terminal <──────────────┘
//!  host <── Exited, when the program has ended and its output was sent
//! ```
//!
//! Signals are requests of their own. A program does not end with its connection. In a child it goes on
//! although the parent's connection is not the child's: its output goes nowhere, its input has ended.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_wire::{Frame, FrameError, Input, Kind, Reply, Terminal, control, read_frame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionread;
use rustix::net::Shutdown;
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::{Connection, Server};
use crate::session::{ControlledBy, own_session};

/// Bytes of output in a frame, at most.
const CHUNK: usize = 32 * 1024;
/// Bytes that a pipe takes without blocking once it takes any, and those that a terminal does.
const PIPE_INPUT: usize = 4096;
const TERMINAL_INPUT: usize = 256;
/// How long output may come after the program's end, from others that have its pipes.
const GRACE: Duration = Duration::from_millis(500);
/// Between two looks whether a program that takes no input, or gives no output, has ended.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Ends the input of a terminal.
const END_OF_TRANSMISSION: u8 = 4;

/// What to run.
pub(super) struct Program {
    pub(super) argv: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) cwd: Option<String>,
    pub(super) tty: Option<Terminal>,
}

/// The ends of its standard streams that are ours.
struct Streams {
    input: Option<File>,
    outputs: Vec<(Kind, File)>,
    terminal: bool,
}

/// Runs it.
pub(super) fn run(
    server: &Server,
    connection: &Connection,
    program: &Program,
) -> Result<(), FrameError> {
    let ended = Arc::new(AtomicBool::new(false));
    let (sender, code) = channel();
    let (pid, streams) = match start(server, program, sender, &ended) {
        Ok(started) => started,
        Err(error) => {
            let name = program.argv.first().map_or("argv", String::as_str);
            return connection.fail(name, &error);
        }
    };
    // If the host is gone, the program's output goes nowhere.
    connection.reply(&Reply::Started { pid }).unwrap_or_default();
    let (sent, pumps) = channel::<()>();
    for (kind, output) in streams.outputs {
        let (to, sent, ended) = (connection.clone(), sent.clone(), ended.clone());
        let pumps = move || {
            pump(&to, kind, output, &ended);
            drop(sent);
        };
        if let Err(error) = spawn(pumps) {
            return given_up(server, connection, pid, &error);
        }
    }
    drop(sent);
    let finisher = connection.clone();
    if let Err(error) = spawn(move || finish(&finisher, &code, &pumps)) {
        return given_up(server, connection, pid, &error);
    }
    let mut input = ProgramInput { file: streams.input, terminal: streams.terminal, ended };
    input.follow(connection);
    Ok(())
}

/// A machine may be short of threads, and its first process must not end for that.
fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("ukp-exec".into()).spawn(work).map(drop)
}

/// Nobody would hear of the program.
fn given_up(
    server: &Server,
    connection: &Connection,
    pid: u32,
    error: &io::Error,
) -> Result<(), FrameError> {
    server.reaper.signal(pid, Signal::KILL);
    connection.fail("a thread for the program's output", error)
}

fn start(
    server: &Server,
    program: &Program,
    code: Sender<i32>,
    ended: &Arc<AtomicBool>,
) -> io::Result<(u32, Streams)> {
    let [name, arguments @ ..] = program.argv.as_slice() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is empty; name a program"));
    };
    let mut command = Command::new(name);
    command.args(arguments).env_clear().envs(&server.env).envs(&program.env);
    command.current_dir(program.cwd.as_deref().map_or(server.cwd.as_path(), AsRef::as_ref));
    let pty = program.tty.map(open_terminal).transpose()?;
    if let Some((_, slave)) = &pty {
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
        own_session(&mut command, ControlledBy::Input, server.group.clone());
    } else {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        own_session(&mut command, ControlledBy::Nothing, server.group.clone());
    }
    let ended = ended.clone();
    let tell = Box::new(move |exit| {
        ended.store(true, Ordering::SeqCst);
        // Nobody is told if there were no threads to tell.
        code.send(exit).unwrap_or_default();
    });
    let mut child = server.reaper.spawn(&mut command, tell)?;
    // The command has the terminal's other end, which must be the program's alone.
    drop(command);
    let streams = match pty {
        Some((master, _)) => Streams {
            input: Some(master.try_clone()?),
            outputs: vec![(Kind::Stdout, master)],
            terminal: true,
        },
        None => Streams {
            input: child.stdin.take().map(|pipe| OwnedFd::from(pipe).into()),
            outputs: [
                child.stdout.take().map(|pipe| (Kind::Stdout, OwnedFd::from(pipe).into())),
                child.stderr.take().map(|pipe| (Kind::Stderr, OwnedFd::from(pipe).into())),
            ]
            .into_iter()
            .flatten()
            .collect(),
            terminal: false,
        },
    };
    Ok((child.id(), streams))
}

/// A new terminal: our end and the program's.
fn open_terminal(size: Terminal) -> io::Result<(File, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    resize(&master, size)?;
    Ok((master.into(), slave))
}

fn resize(terminal: impl std::os::fd::AsFd, size: Terminal) -> io::Result<()> {
    let Terminal { rows, cols } = size;
    let size = Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Sends output until it ends. If nobody takes it any more it is read nonetheless, so that the
/// program does not stand still.
///
/// When the program has ended others may still have its output open. All that was written before is
/// sent, however long that takes, and what the others write for a while.
fn pump(connection: &Connection, kind: Kind, mut output: File, ended: &AtomicBool) {
    let mut buffer = vec![0; CHUNK];
    let mut taken = true;
    // Once the program has ended: until when, and how much of what was there then is left.
    let mut last: Option<(Instant, u64)> = None;
    loop {
        if last.is_none() && ended.load(Ordering::SeqCst) {
            last = Some((Instant::now() + GRACE, ioctl_fionread(&output).unwrap_or(0)));
        }
        if last.is_some_and(|(end, left)| left == 0 && Instant::now() >= end) {
            return;
        }
        match poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&LOOK)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            // Reading says what is wrong.
            Ok(_) | Err(_) => {}
        }
        match output.read(&mut buffer) {
            // A terminal that nobody has open any more is an I/O error.
            Ok(0) => return,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                taken = taken && connection.send(kind, bytes).is_ok();
                last = last.map(|(end, left)| (end, left.saturating_sub(n as u64)));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Tells the exit code when the program has ended and its output was sent.
fn finish(connection: &Connection, code: &Receiver<i32>, pumps: &Receiver<()>) {
    let Ok(code) = code.recv() else { return };
    // Nobody sends: it ends with an error when all pumps have ended.
    pumps.recv().unwrap_or_default();
    drop(connection.reply(&Reply::Exited { code }));
    // The input thread waits for frames that are of no use now.
    rustix::net::shutdown(&*connection.reader, Shutdown::Read).unwrap_or_default();
    rustix::net::shutdown(&*connection.reader, Shutdown::Write).unwrap_or_default();
}

struct ProgramInput {
    file: Option<File>,
    terminal: bool,
    ended: Arc<AtomicBool>,
}

impl ProgramInput {
    /// Does what the host says until it says no more.
    fn follow(&mut self, connection: &Connection) {
        while let Ok(Some(frame)) = read_frame(&mut &*connection.reader) {
            match frame.kind {
                Kind::Data if frame.payload.is_empty() => self.end(),
                Kind::Data => self.write(&frame.payload),
                Kind::Control => self.obey(&frame),
                Kind::Stdout | Kind::Stderr => {}
            }
        }
        self.end();
    }

    /// What is not understood, or cannot be done, is left: the program goes on.
    fn obey(&self, frame: &Frame) {
        if let Ok(Input::Resize(size)) = control(frame)
            && let Some(terminal) = self.file.as_ref().filter(|_| self.terminal)
        {
            resize(terminal, size).unwrap_or_default();
        }
    }

    fn end(&mut self) {
        if self.terminal {
            self.write(&[END_OF_TRANSMISSION]);
        } else {
            self.file = None;
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        let chunk = if self.terminal { TERMINAL_INPUT } else { PIPE_INPUT };
        for part in bytes.chunks(chunk) {
            if self.write_part(part).is_err() {
                self.file = self.file.take().filter(|_| self.terminal);
                return;
            }
        }
    }

    /// Writes when there is room: a program that reads nothing may end.
    fn write_part(&self, part: &[u8]) -> io::Result<()> {
        let Some(mut file) = self.file.as_ref() else { return Ok(()) };
        loop {
            let mut fds = [PollFd::new(&file, PollFlags::OUT)];
            match poll(&mut fds, Some(&LOOK)) {
                Ok(0) if self.ended.load(Ordering::SeqCst) => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return file.write_all(part),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
