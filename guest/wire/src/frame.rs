//! Frames: one byte of kind, four of length (little-endian), the payload.

use std::io::{self, Read, Write};

/// Longest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Bytes before the payload.
pub const HEADER: usize = 5;

/// What the payload of a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A message, as JSON.
    Control = 0,
    /// Standard input, or contents of a file; empty at the end.
    Data = 1,
    /// Standard output.
    Stdout = 2,
    /// Standard error.
    Stderr = 3,
}

impl Kind {
    fn of(byte: u8) -> Result<Self, FrameError> {
        match byte {
            0 => Ok(Self::Control),
            1 => Ok(Self::Data),
            2 => Ok(Self::Stdout),
            3 => Ok(Self::Stderr),
            kind => Err(FrameError::Kind { kind }),
        }
    }
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// Why bytes are no frames, or could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A kind that does not exist.
    #[error("frame of unknown kind {kind}; 0 to 3 are known")]
    Kind {
        /// The byte found.
        kind: u8,
    },
    /// A payload over the limit.
    #[error("frame with {len_bytes} bytes of payload; at most {MAX_PAYLOAD} are taken")]
    TooLong {
        /// The length found.
        len_bytes: usize,
    },
    /// What the decoder was fed before was no frame.
    #[error("stream was wrong before this; nothing in it is a frame any more")]
    WrongBefore,
    /// The stream ended within a frame.
    #[error("stream ended within a frame, after {got_bytes} of its bytes")]
    Truncated {
        /// Bytes of the frame that came.
        got_bytes: usize,
    },
    /// A frame of another kind was due.
    #[error("got a frame of kind {found:?} where a message was due")]
    NotControl {
        /// Its kind.
        found: Kind,
    },
    /// A control message that is not understood.
    #[error("control message is not understood")]
    Message(#[source] serde_json::Error),
    /// The stream failed.
    #[error("stream failed")]
    Io(#[from] io::Error),
}

/// What the first bytes of a frame say: its kind and the length of its payload.
fn header(bytes: [u8; HEADER]) -> Result<(Kind, usize), FrameError> {
    let [kind, a, b, c, d] = bytes;
    let kind = Kind::of(kind)?;
    let len_bytes = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if len_bytes > MAX_PAYLOAD {
        return Err(FrameError::TooLong { len_bytes });
    }
    Ok((kind, len_bytes))
}

/// Takes bytes as they come and gives frames. Holds one frame at most, and after an error nothing:
/// a stream that was wrong once has no place where it is right again.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER],
    header_len: usize,
    payload: Vec<u8>,
    failed: bool,
}

impl Decoder {
    /// Takes bytes from the front of `bytes` until a frame is complete or there are none left.
    ///
    /// # Errors
    ///
    /// The kind is unknown, or the payload too long; whatever is fed after that is
    /// [`FrameError::WrongBefore`].
    pub fn feed(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if self.failed {
            return Err(FrameError::WrongBefore);
        }
        let result = self.advance(bytes);
        if result.is_err() {
            *self = Self { failed: true, ..Self::default() };
        }
        result
    }

    /// Bytes of a frame that is not complete yet.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.header_len + self.payload.len()
    }

    fn advance(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        while self.header_len < HEADER {
            let Some((first, rest)) = bytes.split_first() else { return Ok(None) };
            if let Some(place) = self.header.get_mut(self.header_len) {
                *place = *first;
            }
            self.header_len += 1;
            *bytes = rest;
        }
        let (kind, len_bytes) = header(self.header)?;
        let wanted = len_bytes.saturating_sub(self.payload.len());
        let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
        self.payload.extend_from_slice(now);
        *bytes = rest;
        if self.payload.len() < len_bytes {
            return Ok(None);
        }
        self.header_len = 0;
        Ok(Some(Frame { kind, payload: std::mem::take(&mut self.payload) }))
    }
}

/// Reads one frame; `None` if the stream ends before it begins.
///
/// # Errors
///
/// The stream fails, ends within the frame, or what it has is no frame.
pub fn read_frame(from: &mut impl Read) -> Result<Option<Frame>, FrameError> {
    let mut start = [0; HEADER];
    match fill(from, &mut start)? {
        0 => return Ok(None),
        HEADER => {}
        got_bytes => return Err(FrameError::Truncated { got_bytes }),
    }
    let (kind, len_bytes) = header(start)?;
    let mut payload = vec![0; len_bytes];
    let got_bytes = fill(from, &mut payload)?;
    if got_bytes < len_bytes {
        return Err(FrameError::Truncated { got_bytes: HEADER + got_bytes });
    }
    Ok(Some(Frame { kind, payload }))
}

/// Reads until `buffer` is full or the stream ends; returns how much there was.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes one frame, in one call if the stream takes it whole.
///
/// # Errors
///
/// The payload is too long, or the stream fails.
pub fn write_frame(to: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<(), FrameError> {
    let len_bytes = payload.len();
    let length = u32::try_from(len_bytes).ok().filter(|_| len_bytes <= MAX_PAYLOAD);
    let Some(length) = length else { return Err(FrameError::TooLong { len_bytes }) };
    let mut frame = Vec::with_capacity(HEADER + len_bytes);
    frame.push(kind as u8);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    Ok(to.flush()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        prop_oneof![Just(Kind::Control), Just(Kind::Data), Just(Kind::Stdout), Just(Kind::Stderr)]
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let payload = proptest::collection::vec(any::<u8>(), 0..300);
        let frame = (kinds(), payload).prop_map(|(kind, payload)| Frame { kind, payload });
        proptest::collection::vec(frame, 0..8)
    }

    fn bytes_of(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            write_frame(&mut bytes, frame.kind, &frame.payload).unwrap();
        }
        bytes
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_frames(frames in frames(), sizes in proptest::collection::vec(1_usize..40, 1..60)) {
            let bytes = bytes_of(&frames);
            let mut decoder = Decoder::default();
            let (mut found, mut rest) = (Vec::new(), bytes.as_slice());
            for size in sizes.iter().cycle() {
                if rest.is_empty() { break; }
                let (mut part, after) = rest.split_at((*size).min(rest.len()));
                rest = after;
                while let Some(frame) = decoder.feed(&mut part).unwrap() {
                    found.push(frame);
                }
            }
            prop_assert_eq!(decoder.pending_bytes(), 0);
            prop_assert_eq!(found, frames);
        }

        #[test]
        fn reader_and_decoder_agree(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            let (mut fed, mut read) = (bytes.as_slice(), bytes.as_slice());
            loop {
                match (decoder.feed(&mut fed), read_frame(&mut read)) {
                    (Ok(Some(a)), Ok(Some(b))) => prop_assert_eq!(a, b),
                    (Ok(None), Ok(None)) => { prop_assert_eq!(decoder.pending_bytes(), 0); break; }
                    (Ok(None), Err(FrameError::Truncated { got_bytes })) => {
                        prop_assert_eq!(decoder.pending_bytes(), got_bytes);
                        break;
                    }
                    (Err(a), Err(b)) => { prop_assert_eq!(a.to_string(), b.to_string()); break; }
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }

        #[test]
        fn garbage_never_holds_more_than_a_frame(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::default();
            let mut rest = bytes.as_slice();
            while let Ok(Some(_)) = decoder.feed(&mut rest) {}
            prop_assert!(decoder.pending_bytes() <= HEADER + MAX_PAYLOAD);
            prop_assert!(decoder.payload.capacity() <= 2 * MAX_PAYLOAD);
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_memory_is_taken() {
        let bytes = [2, 0xff, 0xff, 0xff, 0xff, 1, 2, 3];
        let error = Decoder::default().feed(&mut bytes.as_slice()).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { len_bytes: 0xffff_ffff }), "{error}");
        let error = read_frame(&mut bytes.as_slice()).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    }

    #[test]
    fn nothing_comes_after_an_error() {
        let mut decoder = Decoder::default();
        assert!(decoder.feed(&mut [9, 0, 0, 0, 0].as_slice()).is_err());
        let error = decoder.feed(&mut [1, 0, 0, 0, 0].as_slice()).unwrap_err();
        assert!(matches!(error, FrameError::WrongBefore), "{error}");
    }

    #[test]
    fn the_longest_payload_passes_and_one_more_byte_does_not() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Kind::Data, &vec![7; MAX_PAYLOAD]).unwrap();
        let frame = read_frame(&mut bytes.as_slice()).unwrap().unwrap();
        assert_eq!(frame.payload.len(), MAX_PAYLOAD);
        let error = write_frame(&mut bytes, Kind::Data, &vec![7; MAX_PAYLOAD + 1]).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    }
}
