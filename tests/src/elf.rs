//! Guests of a few bytes: a header, one segment, machine code.

use std::path::PathBuf;

use anyhow::Result;
use uuid::Uuid;

/// Where the only segment lies unless said otherwise.
pub const BASE: u64 = 0x20_0000;
const HEADERS: u64 = 0x78;

/// An ELF to be built.
#[derive(Clone, Debug)]
pub struct Elf {
    /// `e_type`: 2 for a static executable.
    pub kind: u16,
    /// `p_type` of its program header: 1 for a loaded segment.
    pub segment: u32,
    /// Address of the segment.
    pub address: u64,
    /// Length of the segment in memory.
    pub memory: u64,
    /// What it runs.
    pub code: Vec<u8>,
}

impl Elf {
    /// A static executable that runs `code`.
    #[must_use]
    pub fn running(code: &[u8]) -> Self {
        Self { kind: 2, segment: 1, address: BASE, memory: 0x1000, code: code.to_vec() }
    }

    /// The bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let len = HEADERS + self.code.len() as u64;
        file.extend(self.kind.to_le_bytes());
        file.extend(62_u16.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        for wide in [self.address + HEADERS, 64, 0] {
            file.extend(wide.to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 1, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(self.segment.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for wide in [0, self.address, self.address, len, self.memory.max(len), 0x1000] {
            file.extend(wide.to_le_bytes());
        }
        file.extend(&self.code);
        file
    }

    /// Writes it to a file that goes when the result does.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn file(&self) -> Result<TempFile> {
        TempFile::new(&self.bytes())
    }
}

/// A file that is removed when this is dropped.
#[derive(Debug)]
pub struct TempFile(PathBuf);

impl TempFile {
    /// A file with these contents.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn new(contents: &[u8]) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("ukp-test-{}", Uuid::new_v4().simple()));
        std::fs::write(&path, contents)?;
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.0.clone()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("{} was not removed: {error}", self.0.display());
        }
    }
}
