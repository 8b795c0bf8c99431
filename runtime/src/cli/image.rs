//! `image`: an initramfs for Linux guests.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_image::{Built, Config, Options, Progress, Source};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::ImageArgs;
use super::error::CliError;
use super::{print, print_json, tell};

/// How an archive begins that is an image already.
const MAGIC: &[u8] = b"07070";
/// The name of the last entry of an archive, and how near to the file's end it lies: archives are
/// padded to blocks, of 10 KiB where a tape is imitated.
const TRAILER: &[u8] = b"TRAILER!!!";
const ARCHIVE_END: u64 = 16 * 1024;

/// The image of `source`, made if need be, and what it runs if it says so.
pub fn ready(source: &Path) -> Result<(PathBuf, Option<Config>), CliError> {
    let mut begin = [0; MAGIC.len()];
    let made = File::open(source).and_then(|mut file| file.read_exact(&mut begin)).is_ok();
    if made && begin == *MAGIC {
        if !is_whole(source) {
            let text =
                format!("{} is cut off: its end is missing; make it again", source.display());
            return Err(CliError::usage(text));
        }
        return Ok((source.to_owned(), None));
    }
    let built = make(&Source::find(source)?, Options::default())?;
    Ok((built.path, built.config))
}

/// Whether an archive has an end. The kernel would take what there is, and miss a file later.
fn is_whole(image: &Path) -> bool {
    let end = File::open(image).and_then(|mut file| {
        let length = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(length.saturating_sub(ARCHIVE_END)))?;
        let mut end = Vec::new();
        file.take(ARCHIVE_END).read_to_end(&mut end)?;
        Ok(end)
    });
    end.is_ok_and(|end| end.windows(TRAILER.len()).any(|window| window == TRAILER))
}

pub fn run(args: &ImageArgs) -> Result<u8, CliError> {
    let source = Source::find(&args.source)?;
    let options = Options {
        output: args.output.as_deref(),
        kernel_dir: args.kernel_dir.as_deref(),
        command: Some(args.command.as_slice()).filter(|command| !command.is_empty()),
        ..Options::default()
    };
    let built = make(&source, options)?;
    if args.json {
        print_json(&described(&built))?;
    } else {
        use std::os::unix::ffi::OsStrExt;
        print(&[built.path.as_os_str().as_bytes(), b"\n"].concat())?;
    }
    Ok(0)
}

/// Makes an image, and shows on a terminal how far it is.
fn make(source: &Source, options: Options<'_>) -> Result<Built, CliError> {
    // On a terminal alone: it hides itself elsewhere.
    let bar = ProgressBar::no_length();
    let progress = |done| show(&bar, done);
    let options = Options { progress: &progress, ..options };
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}, {bytes}") {
        bar.set_style(style);
    }
    bar.set_message("looking at the source");
    bar.enable_steady_tick(Duration::from_millis(100));
    let built = guest_image::build(source, &options);
    bar.finish_and_clear();
    let built = built?;
    if let Some(user) = &built.user {
        tell(&format!(
            "note: the image asks for the user {}; guests run it as root",
            user.escape_debug()
        ));
    }
    Ok(built)
}

/// One counter for both ways; it is begun again when the source was read.
fn show(bar: &ProgressBar, progress: Progress) {
    match progress {
        Progress::Source(bytes) => {
            bar.set_length(bytes);
            bar.set_message(format!("reading {}", HumanBytes(bytes)));
        }
        Progress::Read(bytes) => bar.inc(bytes),
        Progress::Written(bytes) => {
            if bar.length().is_some() {
                bar.unset_length();
                bar.set_position(0);
            }
            if bar.position() == 0 {
                bar.set_message("writing the image");
            }
            bar.inc(bytes);
        }
    }
}

fn described(built: &Built) -> serde_json::Value {
    let config = built.config.as_ref();
    json!({
        "path": built.path.to_string_lossy(),
        "bytes": built.bytes,
        "entries": built.entries,
        "kernel": built.kernel.to_string_lossy(),
        "modules": built.modules,
        "argv": config.map(|config| &config.argv),
        "env": config.map(|config| &config.env),
        "cwd": config.map(|config| &config.cwd),
        "cached": built.cached,
        "blake3": built.blake3,
    })
}
