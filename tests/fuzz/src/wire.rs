//! Frames and messages, in both directions.

use std::fmt::Debug;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use guest_wire::{
    Answer, Decoder, Frame, FrameError, Input, Kind, MAX_PAYLOAD, Question, Reply, Request,
    control, read_control, read_frame, write_control,
};
use runtime::agent::{Agent, Command, Said};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// As much as a socket takes at once.
const MOST: usize = 64 * 1024;

/// Reads the bytes as frames in two ways, as messages, and as what an agent answers.
///
/// # Panics
///
/// If the two ways differ, or a message does not survive the way back.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let step = usize::from(*first % 64) + 1;
    both_ways(rest, step);
    message::<Request>(rest);
    message::<Reply>(rest);
    message::<Question>(rest);
    message::<Answer>(rest);
    message::<Input>(rest);
    agent(*first, rest.get(..MOST).unwrap_or(rest));
}

fn both_ways(bytes: &[u8], step: usize) {
    let mut decoder = Decoder::default();
    let mut read = bytes;
    for mut part in bytes.chunks(step) {
        loop {
            match decoder.feed(&mut part) {
                Ok(Some(frame)) => {
                    let same = read_frame(&mut read).expect("a frame").expect("a frame");
                    assert_eq!(frame, same);
                }
                Ok(None) => break,
                Err(error) => {
                    let same = read_frame(&mut read).expect_err("no frame");
                    assert_eq!(error.to_string(), same.to_string());
                    return;
                }
            }
        }
        assert!(decoder.pending_bytes() <= MAX_PAYLOAD + 5);
    }
    match read_frame(&mut read) {
        Ok(None) => assert_eq!(decoder.pending_bytes(), 0),
        Err(FrameError::Truncated { got_bytes }) => assert_eq!(decoder.pending_bytes(), got_bytes),
        other => panic!("the decoder waits for more, the reader has {other:?}"),
    }
}

fn message<M: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) {
    let frame = Frame { kind: Kind::Control, payload: bytes.to_vec() };
    let Ok(message) = control::<M>(&frame) else { return };
    let mut again = Vec::new();
    match write_control(&mut again, &message) {
        Ok(()) => {}
        // Escapes take more than what they stand for.
        Err(FrameError::TooLong { .. }) => return,
        Err(error) => panic!("{error}"),
    }
    let read: M = read_control(&mut again.as_slice()).expect("a message").expect("a message");
    assert_eq!(read, message);
}

/// What a guest says, to whoever asked its agent.
fn agent(verb: u8, said: &[u8]) {
    let Ok((ours, mut guest)) = UnixStream::pair() else { return };
    guest.set_nonblocking(true).expect("a socket");
    drop(guest.write(said));
    guest.shutdown(Shutdown::Write).expect("a socket");
    let agent = Agent::over(ours);
    match verb >> 6 {
        0 => drop(agent.ping()),
        1 => drop(agent.fork()),
        2 => drop(agent.read("/file", |_| Ok(std::io::sink()))),
        _ => {
            if let Ok(mut running) = agent.exec(&Command::default()) {
                while let Ok(Said::Out(_) | Said::Err(_)) = running.hear() {}
            }
        }
    }
}
