//! The host, as far as it tells about children.

mod client;

pub use client::{Client, Connect, Welcome};

use guest_wire::ChildInfo;
use uuid::Uuid;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The host says so.
    #[error("the host knows no such child of this instance")]
    Unknown,
    /// The question was asked by the machine that this one was forked from.
    #[error("the question was asked before this machine was forked")]
    OfParent,
    /// Too many questions are open.
    #[error("too many questions to the host are open")]
    TooMany,
}

/// Takes an answer, once, on any thread.
pub type Then<A> = Box<dyn FnOnce(Result<A, HostError>) + Send>;

/// Asks the host. No method waits for it: an answer comes when the host gives it, and not before
/// there is a connection.
pub trait Host: Send + Sync {
    /// How the child `uuid` is.
    fn child(&self, uuid: Uuid, then: Then<ChildInfo>);

    /// The exit code of the child `uuid`, when it has stopped.
    fn wait(&self, uuid: Uuid, then: Then<i32>);

    /// This instance is a template from now on.
    fn template(&self);

    /// This is another machine now: open questions are given up, and the connection is made anew.
    fn became_child(&self);
}
