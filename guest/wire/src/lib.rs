//! What the agent in a Linux guest and the host say to each other over vsock.
//!
//! ```text
//! agent ── HOST_PORT ──> host    one connection, kept: Welcome, then questions about children
//! host ── AGENT_PORT ──> agent   one connection per request: ping, exec, copy, status
//! ```
//!
//! Both are streams of frames ([`frame`]): a kind, a length, a payload. Control messages are JSON
//! ([`message`]), everything else is bytes. The limits hold on both sides: neither believes what the
//! other says about lengths.

#![warn(clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that fails should say where"))]

pub mod frame;
pub mod message;

pub use frame::{Decoder, Frame, FrameError, Kind, MAX_PAYLOAD, read_frame, write_frame};
pub use message::{
    Answer, Call, ChildInfo, Input, Question, Reply, Request, Status, Terminal, WorkloadState,
    control, read_control, write_control,
};

/// Context id of the host.
pub const HOST_CID: u32 = 2;
/// Port on the host where the agent connects, once, and keeps the connection.
pub const HOST_PORT: u32 = 1024;
/// Port in the guest where the agent listens; each connection carries one request.
pub const AGENT_PORT: u32 = 1024;
