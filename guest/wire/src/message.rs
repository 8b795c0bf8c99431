//! Control messages.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::frame::{Frame, FrameError, Kind, read_frame, write_frame};

/// State of an instance, as `vm/<uuid>/status` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It was made; its agent has not called yet.
    Starting,
    /// It runs.
    Running,
    /// Its connections are being drained before it stops.
    Draining,
    /// It is being shut down.
    Stopping,
    /// It has stopped.
    Stopped,
    /// It has become a template.
    Template,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A question of the agent on the long-lived connection. Answers repeat the id and come in any
/// order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Question {
    /// How is this child of mine?
    Child {
        /// Repeated in the answer.
        id: u64,
        /// The child.
        uuid: Uuid,
    },
    /// Tell me when this child of mine has stopped.
    Wait {
        /// Repeated in the answer.
        id: u64,
        /// The child.
        uuid: Uuid,
    },
    /// I am a template from now on.
    Template {
        /// Repeated in the answer.
        id: u64,
    },
}

/// What the host knows of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildInfo {
    /// Its state, at the moment of the answer.
    pub status: Status,
    /// When it was made, in seconds since the epoch.
    pub creation_time: u64,
    /// The snapshot that it came from.
    pub snapshot: Uuid,
    /// Its exit code, once it has stopped.
    #[serde(default)]
    pub exit: Option<i32>,
}

/// What the host says on the long-lived connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Answer {
    /// First of all: who the instance is that connected.
    Welcome {
        /// Its UUID.
        uuid: Uuid,
    },
    /// To [`Question::Child`].
    Child {
        /// Of the question.
        id: u64,
        /// What is known.
        #[serde(flatten)]
        info: ChildInfo,
    },
    /// To [`Question::Wait`], when the child has stopped.
    Stopped {
        /// Of the question.
        id: u64,
        /// Its exit code.
        code: i32,
    },
    /// To either: the asking instance has no such child.
    Unknown {
        /// Of the question.
        id: u64,
    },
    /// To [`Question::Template`].
    Noted {
        /// Of the question.
        id: u64,
    },
}

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// A request, and whose it is: first on a connection of its own. Connections outlive a fork of the guest
/// by a moment, and what was asked of the parent is not for the child to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Who is to do it; nil: whoever hears it.
    #[serde(default)]
    pub to: Uuid,
    /// What.
    #[serde(flatten)]
    pub request: Request,
}

/// What the host asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    /// Who are you? Answered with [`Reply::Pong`].
    Ping,
    /// Run a program. Data frames are its input, an empty one closes that; [`Input`] may come too.
    /// Answered with [`Reply::Started`], output frames and [`Reply::Exited`].
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// Added to the workload's environment.
        #[serde(default)]
        env: BTreeMap<String, String>,
        /// Where it runs; the workload's directory if absent.
        #[serde(default)]
        cwd: Option<String>,
        /// Give it a terminal of this size.
        #[serde(default)]
        tty: Option<Terminal>,
    },
    /// Write a file: data frames follow, an empty one ends it. Answered with [`Reply::Done`].
    Write {
        /// Where; absolute.
        path: String,
        /// Permissions; only the lowest 12 bits count.
        mode: u32,
    },
    /// Read a file. Answered with [`Reply::File`], data frames and an empty one.
    Read {
        /// Which; absolute.
        path: String,
    },
    /// How is the workload? Answered with [`Reply::Status`].
    Status,
    /// Fork, as a program in the guest does. Answered with [`Reply::Forked`], in the parent: the
    /// child does not have this connection.
    Fork,
    /// Send a signal to the process group of a program that was started by [`Request::Exec`]. On a
    /// connection of its own: on the program's it would wait behind input that nobody reads. Answered
    /// with [`Reply::Done`], also if the program has ended.
    Signal {
        /// The program.
        pid: u32,
        /// Number of the signal.
        number: i32,
    },
    /// End the workload: its process group gets SIGTERM. Answered with [`Reply::Done`]; the machine
    /// ends when the workload does.
    Terminate,
}

/// What the host says while a program runs, besides its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Input {
    /// The terminal has a new size.
    Resize(Terminal),
}

/// State of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum WorkloadState {
    /// Not started yet.
    Starting,
    /// It runs.
    Running {
        /// Its process id in the guest.
        pid: u32,
    },
    /// It has ended.
    Exited {
        /// With this exit code.
        code: i32,
    },
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Ping`].
    Pong {
        /// UUID of the instance; nil until it has learned it.
        uuid: Uuid,
        /// Its generation; 0 in an instance that is nobody's child.
        generation: u64,
    },
    /// A child was made.
    Forked {
        /// Its UUID.
        uuid: Uuid,
    },
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The program has ended and its output was sent.
    Exited {
        /// Its exit code, 128+n for signal n.
        code: i32,
    },
    /// The request failed.
    Failed {
        /// Error number, as Linux has it.
        errno: i32,
        /// What failed.
        message: String,
    },
    /// The file is written, or the signal sent.
    Done,
    /// The file that follows.
    File {
        /// Its permissions.
        mode: u32,
        /// Its length in bytes when it was opened. What follows may differ: it is being written to.
        size: u64,
    },
    /// To [`Request::Status`].
    Status {
        /// The workload.
        workload: WorkloadState,
        /// Since the root instance of this one was booted, in milliseconds.
        uptime_ms: u64,
    },
}

/// Writes a control message.
///
/// # Errors
///
/// The message is longer than a frame, or the stream fails.
pub fn write_control(to: &mut impl Write, message: &impl Serialize) -> Result<(), FrameError> {
    let payload = serde_json::to_vec(message).map_err(FrameError::Message)?;
    write_frame(to, Kind::Control, &payload)
}

/// The control message in a frame.
///
/// # Errors
///
/// The frame is of another kind, or its message is not understood.
pub fn control<M: DeserializeOwned>(frame: &Frame) -> Result<M, FrameError> {
    if frame.kind != Kind::Control {
        return Err(FrameError::NotControl { found: frame.kind });
    }
    serde_json::from_slice(&frame.payload).map_err(FrameError::Message)
}

/// Reads a control message; `None` if the stream ends before it begins.
///
/// # Errors
///
/// As [`read_frame`] and [`control`].
pub fn read_control<M: DeserializeOwned>(from: &mut impl Read) -> Result<Option<M>, FrameError> {
    read_frame(from)?.map(|frame| control(&frame)).transpose()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn again<M: Serialize + DeserializeOwned>(message: &M) -> M {
        let mut bytes = Vec::new();
        write_control(&mut bytes, message).unwrap();
        read_control(&mut bytes.as_slice()).unwrap().unwrap()
    }

    #[test]
    fn messages_survive_the_way() {
        let uuid = Uuid::new_v4();
        let info =
            ChildInfo { status: Status::Draining, creation_time: 7, snapshot: uuid, exit: None };
        let answers = [
            Answer::Welcome { uuid },
            Answer::Child { id: u64::MAX, info },
            Answer::Child { id: 2, info: ChildInfo { exit: Some(-1), ..info } },
            Answer::Stopped { id: 3, code: 137 },
            Answer::Unknown { id: 4 },
            Answer::Noted { id: 5 },
        ];
        for answer in answers {
            assert_eq!(again(&answer), answer);
        }
        let exec = Request::Exec {
            argv: vec!["sh".into(), "-c".into(), "true\0\u{1f980}".into()],
            env: BTreeMap::from([("A".into(), "b=c".into())]),
            cwd: None,
            tty: Some(Terminal { rows: 24, cols: 80 }),
        };
        assert_eq!(again(&exec), exec);
        let call = Call { to: uuid, request: exec };
        assert_eq!(again(&call), call);
        assert_eq!(again(&Call { request: Request::Fork, ..call.clone() }).request, Request::Fork);
        let input = Input::Resize(Terminal { rows: 1, cols: 2 });
        assert_eq!(again(&input), input);
        let workload = WorkloadState::Exited { code: 3 };
        let status = Reply::Status { workload, uptime_ms: 9 };
        assert_eq!(again(&status), status);
    }

    #[test]
    fn optional_parts_may_be_absent() {
        let request: Request = serde_json::from_str(r#"{"type":"exec","argv":["true"]}"#).unwrap();
        let Request::Exec { env, cwd, tty, .. } = request else { panic!("not exec") };
        assert!(env.is_empty() && cwd.is_none() && tty.is_none());
        let call: Call = serde_json::from_str(r#"{"type":"ping"}"#).unwrap();
        assert_eq!(call, Call { to: Uuid::nil(), request: Request::Ping });
    }

    #[test]
    fn a_message_of_the_wrong_kind_is_told() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Kind::Data, b"{}").unwrap();
        let error = read_control::<Request>(&mut bytes.as_slice()).unwrap_err();
        assert!(matches!(error, FrameError::NotControl { found: Kind::Data }), "{error}");
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_a_message(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let frame = Frame { kind: Kind::Control, payload };
            drop((control::<Request>(&frame), control::<Answer>(&frame), control::<Input>(&frame)));
        }
    }
}
