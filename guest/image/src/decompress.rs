//! Bytes as they were before they were compressed, whatever with: the first ones tell.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// How a stream was found to be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// Not at all.
    Plain,
    /// RFC 1952, of one member or many.
    Gzip,
    /// RFC 8878, of one frame or many.
    Zstd,
}

/// Reads a file from its beginning without moving its position, and tells how far it is.
pub struct FromFile<'a> {
    file: Arc<File>,
    offset: u64,
    told: &'a dyn Fn(u64),
    /// Set when more was asked for than there is.
    ended: Rc<Cell<bool>>,
}

impl<'a> FromFile<'a> {
    /// All of `file`.
    pub fn new(file: Arc<File>, told: &'a dyn Fn(u64), ended: Rc<Cell<bool>>) -> Self {
        Self { file, offset: 0, told, ended }
    }
}

impl Read for FromFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        (self.told)(count as u64);
        if count == 0 && !buffer.is_empty() {
            self.ended.set(true);
        }
        Ok(count)
    }
}

/// What `source` is, and its bytes.
///
/// # Errors
///
/// What reading its beginning says; and that it is compressed in a way that is not known.
pub fn open<'a>(source: impl Read + 'a) -> io::Result<(Coding, Box<dyn Read + 'a>)> {
    let mut source = BufReader::with_capacity(64 << 10, source);
    let foreign = |name| Err(io::Error::other(format!("it is compressed with {name}")));
    match source.fill_buf()? {
        [0x1f, 0x8b, ..] => Ok((Coding::Gzip, Box::new(MultiGzDecoder::new(source)))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let frames = Frames { source, decoder: FrameDecoder::new(), inside: false };
            Ok((Coding::Zstd, Box::new(frames)))
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => foreign("xz"),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, ..] => foreign("bzip2"),
        _ => Ok((Coding::Plain, Box::new(source))),
    }
}

/// Frames of zstd one after the other, with their checksums looked at.
struct Frames<R> {
    source: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> Frames<R> {
    /// Begins a frame; tells whether there is one.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let mut skipped = (&mut self.source).take(length.into());
                    if io::copy(&mut skipped, &mut io::sink())? < length.into() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if self.inside {
                while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                    self.decoder
                        .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                        .map_err(io::Error::other)?;
                }
                let count = self.decoder.read(buffer)?;
                if count > 0 {
                    return Ok(count);
                }
                let said = self.decoder.get_checksum_from_data();
                if said.is_some() && said != self.decoder.get_calculated_checksum() {
                    return Err(io::Error::other("its checksum is wrong"));
                }
            }
            self.inside = self.next_frame()?;
            if !self.inside {
                return Ok(0);
            }
        }
    }
}
