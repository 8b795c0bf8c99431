//! Answers the agents in Linux guests, which ask what became of their children.
//!
//! ```text
//!   agent ── vsock, HOST_PORT ──> VMM ── port_1024 in the owner's folder ──> one reader
//!                                                                              │ questions
//!            answers <──────────────────────── one writer, woken by every event ┘
//! ```
//!
//! The VMM says first whose connection it is; everything behind that line comes from the guest.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest_wire::{Answer, ChildInfo, HOST_PORT, Question, Status, read_control, write_control};
use uuid::Uuid;

use super::state::{KILLED, Known, Shared, State};
use crate::sys::SysError;

/// How long a child that nobody has heard of may take to call: it was made a moment ago.
const BIRTH: Duration = Duration::from_secs(5);
/// Questions of one connection that wait for an answer: an agent has no more. One who asks for more, or
/// takes no answers, is no agent.
const MOST_QUESTIONS: usize = 4096;
/// Connections of one instance: an agent has one, and the one that it gave up may still be there.
const MOST_CONNECTIONS: usize = 8;
/// How long the VMM may take to say whose connection it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// Until the next try, where there is no descriptor left for a connection.
const AGAIN: Duration = Duration::from_millis(50);
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
        let (shared, guests) = (shared.clone(), Arc::new(Guests::default()));
        thread("agents", move || {
            loop {
                match accepting.accept() {
                    Ok((connection, _)) => {
                        let (shared, guests) = (shared.clone(), guests.clone());
                        // Without a thread left the agent sees its connection closed, and tries again.
                        drop(thread("agent", move || serve(&shared, &guests, connection)));
                    }
                    // It listens no more.
                    Err(error) if error.kind() == ErrorKind::InvalidInput => return,
                    // No descriptor left, for example: later there may be one.
                    Err(_) => std::thread::sleep(AGAIN),
                }
            }
        })?;
        Ok(Self(listener))
    }
}

/// Connections by instance.
#[derive(Debug, Default)]
struct Guests(Mutex<HashMap<Uuid, usize>>);

impl Guests {
    fn counts(&self) -> MutexGuard<'_, HashMap<Uuid, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more until the result is dropped, unless there are too many.
    fn enter(&self, instance: Uuid) -> Option<Guest<'_>> {
        let mut counts = self.counts();
        let count = counts.entry(instance).or_default();
        (*count < MOST_CONNECTIONS).then(|| {
            *count += 1;
            Guest { guests: self, instance }
        })
    }
}

/// A connection that counts.
#[derive(Debug)]
struct Guest<'a> {
    guests: &'a Guests,
    instance: Uuid,
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let mut counts = self.guests.counts();
        let left = counts.get_mut(&self.instance).map(|count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            counts.remove(&self.instance);
        }
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

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(shared: &Arc<Shared>, guests: &Guests, connection: UnixStream) {
    let Ok(mut out) = connection.try_clone() else { return };
    if connection.set_read_timeout(Some(INTRODUCTION)).is_err() {
        return;
    }
    let mut from = BufReader::new(connection);
    let Some(asking) = whose(&mut from) else { return };
    if from.get_ref().set_read_timeout(None).is_err() {
        return;
    }
    let Some(_guest) = guests.enter(asking) else { return };
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
    let open = Mutex::default();
    std::thread::scope(|scope| {
        let answers = std::thread::Builder::new().name("answers".to_owned());
        let answering = || answer_all(shared, asking, &open, &mut out);
        if answers.spawn_scoped(scope, answering).is_err() {
            return;
        }
        read_questions(shared, &open, &mut from);
        lock(&open).closed = true;
        shared.wake();
        drop(from.get_ref().shutdown(Shutdown::Both));
    });
}

/// Returns when the connection ends. A message that is none ends it, too: the two no longer agree where
/// one begins.
fn read_questions(shared: &Shared, open: &Mutex<Open>, from: &mut impl Read) {
    while let Ok(Some(question)) = read_control::<Question>(from) {
        let mut open = lock(open);
        if open.closed || open.questions.len() >= MOST_QUESTIONS {
            return;
        }
        open.questions.push_back((question, Instant::now()));
        drop(open);
        shared.wake();
    }
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

    /// An owner's state with instances of this process, and agents that call it.
    struct Calls {
        shared: Arc<Shared>,
        folder: tempfile::TempDir,
        agents: Agents,
    }

    impl Calls {
        fn new() -> Self {
            let shared = Shared::new(
                Box::new(|_, _| {}),
                super::super::state::Memory::Everything,
                Path::new("."),
            );
            let shared = shared.expect("an owner's state");
            let folder = tempfile::tempdir().expect("a folder");
            let agents = Agents::start(&shared, folder.path()).expect("it listens");
            Self { shared, folder, agents }
        }

        fn instance(&self, parent: Option<Uuid>) -> Uuid {
            let (ours, _) = crate::sys::socket_pair().expect("sockets");
            let number = self.shared.adopt(ours, Some(std::process::id())).expect("it is open");
            let uuid = Uuid::new_v4();
            let pid = std::process::id().cast_signed();
            let (vcpus, memory_mib, linux) = (1, 1, true);
            let hello = crate::proto::Event::Hello { uuid, parent, pid, vcpus, memory_mib, linux };
            assert!(self.shared.event(number, hello));
            uuid
        }

        /// A connection as the VMM of `instance` makes it.
        fn call(&self, instance: Uuid) -> UnixStream {
            let path = self.folder.path().join(format!("port_{HOST_PORT}"));
            let mut stream = UnixStream::connect(path).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_secs(10))).expect("it is open");
            std::io::Write::write_all(&mut stream, format!("{instance}\n").as_bytes())
                .expect("it is open");
            stream
        }
    }

    /// Nothing at the end of the connection.
    fn hear(mut from: &UnixStream) -> Option<Answer> {
        read_control(&mut from).ok().flatten()
    }

    #[test]
    fn an_instance_has_so_many_connections_and_no_more() {
        let calls = Calls::new();
        let (one, other) = (calls.instance(None), calls.instance(None));
        let mut kept: Vec<UnixStream> = (0..MOST_CONNECTIONS).map(|_| calls.call(one)).collect();
        for stream in &kept {
            assert_eq!(hear(stream), Some(Answer::Welcome { uuid: one }));
        }
        assert_eq!(hear(&calls.call(one)), None);
        assert_eq!(hear(&calls.call(other)), Some(Answer::Welcome { uuid: other }));
        // When one of them has ended there is a place again.
        drop(kept.pop());
        let end = Instant::now() + Duration::from_secs(10);
        while hear(&calls.call(one)).is_none() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn who_asks_without_end_is_no_agent() {
        let calls = Calls::new();
        let parent = calls.instance(None);
        let child = calls.instance(Some(parent));
        let flood = calls.call(parent);
        let agent = calls.call(parent);
        let welcome = Some(Answer::Welcome { uuid: parent });
        assert_eq!((hear(&flood), hear(&agent)), (welcome, welcome));
        // The child lives, so none of these can be answered.
        let asked = (0..).take_while(|id| {
            write_control(&mut &flood, &Question::Wait { id: *id, uuid: child }).is_ok()
        });
        assert!(asked.take(20 * MOST_QUESTIONS).count() < 20 * MOST_QUESTIONS);
        // Nor does it disturb anybody else.
        write_control(&mut &agent, &Question::Child { id: 9, uuid: child }).expect("it is open");
        assert!(matches!(hear(&agent), Some(Answer::Child { id: 9, .. })));
    }

    /// What a process without a descriptor left hears of accept(2) is not the end.
    #[test]
    fn it_listens_until_it_is_dropped() {
        let calls = Calls::new();
        let instance = calls.instance(None);
        assert!(hear(&calls.call(instance)).is_some());
        let path = calls.folder.path().join(format!("port_{HOST_PORT}"));
        drop(calls.agents);
        let end = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(&path).is_ok() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(10));
        }
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
