//! The long-lived connection to the host.
//!
//! ```text
//!  connect ──> Welcome ──> ask again what is open ──> answers ... ──> reset: connect again
//! ```
//!
//! Questions are kept until they are answered, and asked again on the next connection. In a child
//! they are given up, for they were the parent's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use guest_wire::{Answer, ChildInfo, FrameError, Question, read_control, write_control};
use rustix::net::Shutdown;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use uuid::Uuid;

use super::{Host, HostError, Then};
use crate::console::{chain, say};
use crate::sync::{lock, wait};

/// Most ends that are waited for; twice as many questions in all.
const QUESTIONS: usize = 4096;
/// How long the host may leave its end of the connection full.
const SEND_LIMIT: Duration = Duration::from_millis(200);
/// Between two tries to connect: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// Connects a stream to the host.
pub type Connect = Box<dyn Fn() -> io::Result<OwnedFd> + Send + Sync>;
/// Told who this instance is, as the host has it; `false` gives the connection up.
pub type Welcome = Box<dyn Fn(Uuid) -> bool + Send + Sync>;

enum Open {
    Child(Then<ChildInfo>),
    Wait(Then<i32>),
    Template,
}

#[derive(Default)]
struct Line {
    stream: Option<File>,
    questions: BTreeMap<u64, (Uuid, Open)>,
    next: u64,
    /// Someone gave the connection up.
    hurry: bool,
    closed: bool,
}

/// The connection, and the thread that reads it.
#[derive(Clone)]
pub struct Client {
    line: Arc<(Mutex<Line>, Condvar)>,
}

impl Client {
    /// Connects in the background, and again whenever the connection ends.
    ///
    /// # Errors
    ///
    /// There is no thread for it.
    pub fn start(connect: Connect, welcome: Welcome) -> io::Result<Self> {
        let client = Self { line: Arc::default() };
        let thread = client.clone();
        let name = std::thread::Builder::new().name("ukp-host".into());
        name.spawn(move || thread.run(&connect, &welcome))?;
        Ok(client)
    }

    /// Ends the connection and its thread. Questions that are open are never answered.
    pub fn close(&self) {
        let mut line = lock(&self.line.0);
        line.closed = true;
        line.questions.clear();
        hang_up(&mut line);
        self.line.1.notify_all();
    }

    fn run(&self, connect: &Connect, welcome: &Welcome) {
        let mut pause = RETRY.0;
        loop {
            // Not connected yet is no news: the host listens when it wants to.
            if let Ok(stream) = connect() {
                let mut welcomed = false;
                let result = self.converse(stream, welcome, &mut welcomed);
                // In a child the parent's connection ends one way or another.
                if let Err(error) = result
                    && !lock(&self.line.0).hurry
                {
                    say(format_args!("connection to the host is made anew: {}", chain(&error)));
                }
                if welcomed {
                    pause = RETRY.0;
                }
            }
            let mut line = lock(&self.line.0);
            line.stream = None;
            if !line.hurry && !line.closed {
                line = wait(&self.line.1, line, Some(pause));
            }
            if line.closed {
                return;
            }
            pause = if std::mem::take(&mut line.hurry) { RETRY.0 } else { RETRY.1.min(pause * 2) };
        }
    }

    /// One connection, to its end.
    fn converse(
        &self,
        stream: OwnedFd,
        welcome: &Welcome,
        welcomed: &mut bool,
    ) -> Result<(), FrameError> {
        set_socket_timeout(stream.as_fd(), Timeout::Send, Some(SEND_LIMIT))
            .map_err(io::Error::from)?;
        let mut reader = File::from(stream);
        if !self.adopt(&reader)? {
            return Ok(());
        }
        match read_control(&mut reader)? {
            Some(Answer::Welcome { uuid }) if welcome(uuid) => *welcomed = true,
            Some(Answer::Welcome { uuid }) => {
                say(format_args!("the host takes this instance for {uuid}"));
                return Ok(());
            }
            _ => return Ok(()),
        }
        self.ask_again()?;
        while let Some(answer) = read_control(&mut reader)? {
            self.answered(&answer);
        }
        Ok(())
    }

    /// Makes this the stream, unless it was given up meanwhile.
    fn adopt(&self, stream: &File) -> io::Result<bool> {
        let mut line = lock(&self.line.0);
        line.stream = Some(stream.try_clone()?);
        Ok(!line.closed)
    }

    fn ask_again(&self) -> Result<(), FrameError> {
        let line = lock(&self.line.0);
        let Some(mut stream) = line.stream.as_ref() else { return Ok(()) };
        for (id, (uuid, open)) in &line.questions {
            write_control(&mut stream, &question(*id, *uuid, open))?;
        }
        Ok(())
    }

    fn ask(&self, uuid: Uuid, open: Open) {
        let mut line = lock(&self.line.0);
        // How a child is can be asked for while the ends of all others are waited for.
        let most = if matches!(open, Open::Wait(_)) { QUESTIONS } else { QUESTIONS * 2 };
        if line.questions.len() >= most {
            drop(line);
            return open.give_up(HostError::TooMany);
        }
        let id = line.next;
        line.next += 1;
        let message = question(id, uuid, &open);
        line.questions.insert(id, (uuid, open));
        let Some(mut stream) = line.stream.as_ref() else { return };
        if write_control(&mut stream, &message).is_err() {
            hang_up(&mut line);
        }
    }

    fn answered(&self, answer: &Answer) {
        let id = match answer {
            Answer::Child { id, .. }
            | Answer::Stopped { id, .. }
            | Answer::Unknown { id }
            | Answer::Noted { id } => *id,
            Answer::Welcome { .. } => return,
        };
        let mut line = lock(&self.line.0);
        let open = line.questions.remove(&id);
        drop(line);
        match (open, answer) {
            (Some((_, Open::Child(then))), Answer::Child { info, .. }) => then(Ok(*info)),
            (Some((_, Open::Wait(then))), Answer::Stopped { code, .. }) => then(Ok(*code)),
            (Some((_, Open::Template)), Answer::Noted { .. }) | (None, _) => {}
            (Some((_, open)), Answer::Unknown { .. }) => open.give_up(HostError::Unknown),
            (Some((_, open)), answer) => {
                say(format_args!("the host answered another question than was asked: {answer:?}"));
                open.give_up(HostError::Unknown);
            }
        }
    }
}

impl Host for Client {
    fn child(&self, uuid: Uuid, then: Then<ChildInfo>) {
        self.ask(uuid, Open::Child(then));
    }

    fn wait(&self, uuid: Uuid, then: Then<i32>) {
        self.ask(uuid, Open::Wait(then));
    }

    fn template(&self) {
        self.ask(Uuid::nil(), Open::Template);
    }

    fn became_child(&self) {
        let mut line = lock(&self.line.0);
        let questions = std::mem::take(&mut line.questions);
        line.hurry = true;
        hang_up(&mut line);
        self.line.1.notify_all();
        drop(line);
        for (_, open) in questions.into_values() {
            open.give_up(HostError::OfParent);
        }
    }
}

impl Open {
    fn give_up(self, error: HostError) {
        match self {
            Self::Child(then) => then(Err(error)),
            Self::Wait(then) => then(Err(error)),
            Self::Template => {}
        }
    }
}

fn question(id: u64, uuid: Uuid, open: &Open) -> Question {
    match open {
        Open::Child(_) => Question::Child { id, uuid },
        Open::Wait(_) => Question::Wait { id, uuid },
        Open::Template => Question::Template { id },
    }
}

/// Ends the connection; its reader sees that.
fn hang_up(line: &mut Line) {
    if let Some(stream) = line.stream.take() {
        // One that has ended already cannot be shut down, and need not be.
        rustix::net::shutdown(&stream, Shutdown::Both).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests;
