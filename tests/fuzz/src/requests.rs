//! What clients say to an owner, an owner to its instances, and they to it.

use serde::Serialize;
use serde::de::DeserializeOwned;

use runtime::proto::{Envelope, Event};

/// The client's side is part of the program, not of its library.
#[expect(dead_code, reason = "the program uses all of it")]
#[path = "../../../runtime/src/cli/wire.rs"]
mod client;

/// Takes the bytes as each kind of message.
///
/// # Panics
///
/// If a message does not survive the way back.
pub fn run(data: &[u8]) {
    message::<Envelope>(data);
    message::<Event>(data);
    message::<client::Ask>(data);
    message::<client::Answer>(data);
}

fn message<M: DeserializeOwned + Serialize>(bytes: &[u8]) {
    let Ok(message) = serde_json::from_slice::<M>(bytes) else { return };
    let text = serde_json::to_string(&message).expect("text");
    let again: M = serde_json::from_str(&text).expect("a message");
    assert_eq!(serde_json::to_string(&again).expect("text"), text);
}
