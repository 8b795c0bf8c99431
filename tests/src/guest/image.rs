//! What an instance boots, made before it is.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use guest_image::{Config, Options, Source};
use tempfile::NamedTempFile;

/// How an archive begins that is an image already.
const MAGIC: &[u8] = b"07070";

/// An image that is ready.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The file.
    pub path: PathBuf,
    /// Environment and folder of its command, if the source had any.
    pub config: Option<Config>,
}

/// Makes the image of `source`, or finds the one that was made before; busybox if there is none.
///
/// # Errors
///
/// What is wrong with the source.
pub fn ready(source: Option<&Path>) -> Result<Ready> {
    let built = match source {
        None => nested_host::image::busybox(&[], &[])?,
        Some(path) if is_image(path) => {
            return Ok(Ready { path: path.to_owned(), config: None });
        }
        Some(path) => guest_image::build(&Source::find(path)?, &Options::default())?,
    };
    Ok(Ready { path: built.path, config: built.config })
}

fn is_image(path: &Path) -> bool {
    let mut begin = [0; MAGIC.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut begin));
    read.is_ok() && begin == *MAGIC
}

/// A copy of `image` that runs `argv` as `config` says, where its source is not.
///
/// # Errors
///
/// What could not be read or written.
pub fn with_command(image: &Path, config: &Config, argv: Vec<String>) -> Result<NamedTempFile> {
    let segment = guest_image::config_segment(&Config { argv, ..config.clone() })?;
    let mut copy = NamedTempFile::new().context("making a file")?;
    let mut image = File::open(image).context("opening the image")?;
    let bytes = std::io::copy(&mut image, &mut copy).context("copying the image")?;
    // Each archive begins at a multiple of four bytes.
    let padding = usize::try_from(bytes.next_multiple_of(4) - bytes)?;
    copy.write_all(&vec![0; padding]).and_then(|()| copy.write_all(&segment))?;
    copy.flush().context("copying the image")?;
    Ok(copy)
}
