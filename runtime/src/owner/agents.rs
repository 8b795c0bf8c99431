//! Answers the agents in Linux guests, which ask what became of their children.
//!
//! ```text
//!   agent ── vsock, HOST_PORT ──> VMM ── port_1024 in the owner's folder ──> one reader
//!                                                                              │ questions
//!            answers <──────────────────────── one writer, woken by every event ┘
//! ```
//!
//! The VMM says first whose connection it is; everything behind that line comes from the guest.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest_wire::{Answer, ChildInfo, HOST_PORT, Question, Status, read_control, write_control};
use uuid::Uuid;

use super::state::{Known, Shared, State};
use crate::sys::SysError;

/// How long a child that nobody has heard of may take to call: it was made a moment ago.
const BIRTH: Duration = Duration::from_secs(5);
/// Questions of one agent that wait for an answer; more are answered as if the child were unknown.
const MOST_QUESTIONS: usize = 4096;
/// How often the end of a connection is looked for.
const LOOK: Duration = Duration::from_millis(500);

/// The listening socket; nobody is answered any more when it is dropped.
#[derive(Debug)]
pub(super) struct Agents(UnixListener);

impl Agents {
    /// Listens in `folder`, where the VMMs of its instances find it.
    pub(super) fn start(shared: &Arc<Shared>, folder: &Path) -> Result<Self, SysError> {
        let call = |call| move |source| SysError { call, source };
        let listener =
            UnixListener::bind(folder.join(format!("port_{HOST_PORT}"))).map_err(call("bind"))?;
        let accepting = listener.try_clone().map_err(call("dup"))?;
        let shared = shared.clone();
        thread("agents", move || {
            while let Ok((connection, _)) = accepting.accept() {
                let shared = shared.clone();
                // Without a thread left the agent sees its connection closed, and tries again.
                drop(thread("agent", move || serve(&shared, connection)));
            }
        })?;
        Ok(Self(listener))
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        // accept(2) returns: it listens no more.
        rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both).unwrap_or(());
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), SysError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(work);
    started.map(drop).map_err(|source| SysError { call: "starting a thread", source })
}

/// What an agent has asked and not heard yet.
#[derive(Debug, Default)]
struct Open {
    questions: VecDeque<(Question, Instant)>,
    closed: bool,
}

type Questions = Arc<Mutex<Open>>;

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(shared: &Arc<Shared>, connection: UnixStream) {
    let Ok(mut out) = connection.try_clone() else { return };
    let mut from = BufReader::new(connection);
    let Some(asking) = whose(&mut from) else { return };
    // Its agent may call before its VMM has.
    let called = shared.wait("call of a child", BIRTH, |state| {
        let known = state.maybe_instance(asking)?;
        if known.status == Status::Starting {
            known.status = Status::Running;
        }
        Some(())
    });
    if called.is_err() {
        return;
    }
    if write_control(&mut out, &Answer::Welcome { uuid: asking }).is_err() {
        return;
    }
    let open = Questions::default();
    let (answering, questions) = (shared.clone(), open.clone());
    if thread("answers", move || answer_all(&answering, asking, &questions, &mut out)).is_err() {
        return;
    }
    // A message that is none ends it: the two no longer agree where one begins.
    while let Ok(Some(question)) = read_control::<Question>(&mut from) {
        let mut open = lock(&open);
        if open.closed {
            break;
        }
        let late = open.questions.len() >= MOST_QUESTIONS;
        let asked = Instant::now();
        // In the past: it is answered at once.
        let asked = if late { asked.checked_sub(BIRTH).unwrap_or(asked) } else { asked };
        open.questions.push_back((question, asked));
        drop(open);
        shared.wake();
    }
    lock(&open).closed = true;
    shared.wake();
    drop(from.get_ref().shutdown(Shutdown::Both));
}

/// The line that the VMM says first: the UUID of its instance.
fn whose(from: &mut impl BufRead) -> Option<Uuid> {
    let mut line = Vec::new();
    from.take(64).read_until(b'\n', &mut line).ok()?;
    Uuid::try_parse_ascii(line.strip_suffix(b"\n")?).ok()
}

fn answer_all(shared: &Shared, asking: Uuid, open: &Mutex<Open>, out: &mut UnixStream) {
    loop {
        // Out of time: look whether the connection is closed, and at children that never called.
        let ready = shared.wait("question of an agent", LOOK, |state| {
            let mut open = lock(open);
            let ready: Vec<Answer> = take_ready(&mut open.questions, asking, state);
            (open.closed || !ready.is_empty()).then_some((open.closed, ready))
        });
        let Ok((closed, ready)) = ready else { continue };
        if closed || ready.iter().any(|answer| write_control(out, answer).is_err()) {
            lock(open).closed = true;
            drop(out.shutdown(Shutdown::Both));
            return;
        }
    }
}

/// Takes the questions that can be answered by now.
fn take_ready(
    questions: &mut VecDeque<(Question, Instant)>,
    asking: Uuid,
    state: &mut State,
) -> Vec<Answer> {
    let mut ready = Vec::new();
    questions.retain(|(question, asked)| {
        let (id, uuid) = match *question {
            Question::Child { id, uuid } | Question::Wait { id, uuid } => (id, uuid),
            Question::Template { id } => {
                if let Some(known) = state.maybe_instance(asking) {
                    known.status = Status::Template;
                }
                ready.push(Answer::Noted { id });
                return false;
            }
        };
        let answer = match state.maybe_instance(uuid) {
            Some(known) if known.parent == Some(asking) => answer(question, uuid, known),
            Some(_) => Some(Answer::Unknown { id }),
            None => (asked.elapsed() >= BIRTH).then_some(Answer::Unknown { id }),
        };
        let open = answer.is_none();
        ready.extend(answer);
        open
    });
    ready
}

fn answer(question: &Question, uuid: Uuid, known: &Known) -> Option<Answer> {
    let ended = known.gone.then(|| known.exit.as_ref().map_or(KILLED, |(code, _)| *code));
    match *question {
        Question::Wait { id, .. } => ended.map(|code| Answer::Stopped { id, code }),
        Question::Child { id, .. } => {
            let status = match (ended, &known.exit) {
                (Some(_), _) => Status::Stopped,
                (None, Some(_)) => Status::Stopping,
                (None, None) => known.status,
            };
            let snapshot = snapshot(known.parent.unwrap_or_default(), uuid);
            let creation_time = known.created;
            let info = ChildInfo { status, creation_time, snapshot, exit: ended };
            Some(Answer::Child { id, info })
        }
        Question::Template { .. } => None,
    }
}

/// Exit code of a process that was killed.
const KILLED: i32 = 137;

/// The name of the state that a child came from. It is the child's alone and is not kept: forks
/// make no snapshot that anybody else could start from.
fn snapshot(parent: Uuid, child: Uuid) -> Uuid {
    let mixed = parent.as_u128() ^ child.as_u128().rotate_left(64);
    uuid::Builder::from_random_bytes(mixed.to_be_bytes()).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_says_whose_connection_it_is() {
        let uuid = Uuid::new_v4();
        let line = format!("{uuid}\nrest");
        let mut from = line.as_bytes();
        assert_eq!(whose(&mut from), Some(uuid));
        assert_eq!(from, b"rest");
        for wrong in ["", "\n", "no\n", &uuid.to_string(), &"x".repeat(100)] {
            assert_eq!(whose(&mut wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    #[test]
    fn each_state_is_told_as_it_is() {
        let child = Uuid::new_v4();
        let told =
            |known: &Known| match answer(&Question::Child { id: 7, uuid: child }, child, known) {
                Some(Answer::Child { id: 7, info }) => (info.status, info.exit),
                other => panic!("{other:?}"),
            };
        let mut known = Known::made(Some(Uuid::new_v4()), 0, 0);
        for status in [Status::Starting, Status::Running, Status::Template, Status::Draining] {
            known.status = status;
            assert_eq!(told(&known), (status, None));
        }
        known.exit = Some((3, None));
        assert_eq!(told(&known), (Status::Stopping, None));
        assert!(answer(&Question::Wait { id: 7, uuid: child }, child, &known).is_none());
        known.gone = true;
        assert_eq!(told(&known), (Status::Stopped, Some(3)));
        known.exit = None;
        assert_eq!(told(&known), (Status::Stopped, Some(KILLED)));
    }

    #[test]
    fn snapshots_have_names_of_their_own() {
        let (parent, one, two) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let name = snapshot(parent, one);
        assert_eq!(name, snapshot(parent, one));
        assert_ne!(name, snapshot(parent, two));
        assert_eq!(name.get_version_num(), 4);
    }
}
