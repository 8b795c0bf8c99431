//! A Linux image for tests: busybox, all its applets, and files that a test brings along.
//!
//! It is packed as an archive without times, so that the same image is made once on each machine.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use guest_image::{Built, Options, Source};
use tar::{Builder, EntryType, Header};

use crate::machine::busybox as busybox_program;

/// A file of an image.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// Its path, without a slash before it; directories are made.
    pub path: &'a str,
    /// Its contents.
    pub bytes: &'a [u8],
    /// Its mode.
    pub mode: u32,
}

/// What is missing for [`busybox`], and what to do.
#[must_use]
pub fn missing() -> Option<String> {
    let Some(_) = busybox_program() else {
        return Some("a static busybox is not there; ./just installs it".to_owned());
    };
    guest_image::kernel_dir().err().map(|error| error.to_string())
}

/// A root with Python and `SQLite` from Debian's packages, which `./just` fetches.
///
/// # Errors
///
/// That there is none.
pub fn python_root() -> Result<PathBuf> {
    let root = guest_image::cache_dir()?.join("python/root");
    ensure!(root.is_dir(), "{} is not there; ./just fetches it", root.display());
    Ok(root)
}

/// The image of that.
///
/// # Errors
///
/// That it is not there, and what goes wrong in writing.
pub fn python() -> Result<Built> {
    let source = Source::Directory(python_root()?);
    guest_image::build(&source, &Options::default()).context("an image with Python")
}

/// The image with busybox and `files`, that runs `command` if it is not empty.
///
/// # Errors
///
/// What [`missing`] tells, and what goes wrong in writing.
pub fn busybox(files: &[File<'_>], command: &[&str]) -> Result<Built> {
    let program = busybox_program().context("a static busybox is not there")?;
    let bytes = std::fs::read(&program).context("reading busybox")?;
    let listed = Command::new(&program).arg("--list").output().context("asking busybox")?;
    ensure!(listed.status.success(), "busybox --list: {}", listed.status);
    let applets = String::from_utf8(listed.stdout).context("its applets")?;
    let archive = pack(&bytes, applets.lines(), files)?;
    let source = tempfile::NamedTempFile::new().context("making a file")?;
    std::fs::write(source.path(), archive).context("writing the archive")?;
    let command: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
    let command = Some(command.as_slice()).filter(|command| !command.is_empty());
    let options = Options { command, ..Options::default() };
    guest_image::build(&Source::Tar(source.path().to_owned()), &options).context("an image")
}

fn pack<'a>(
    busybox: &[u8],
    applets: impl Iterator<Item = &'a str>,
    files: &[File<'_>],
) -> Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    let path = "bin/busybox";
    for file in [File { path, bytes: busybox, mode: 0o755 }].iter().chain(files) {
        let mut header = header(EntryType::Regular, file.mode);
        header.set_size(file.bytes.len() as u64);
        archive.append_data(&mut header, file.path, file.bytes).context("a file")?;
    }
    for applet in applets.filter(|applet| *applet != "busybox") {
        if applet.contains('/') {
            bail!("busybox has an applet {applet:?}");
        }
        let mut header = header(EntryType::Symlink, 0o777);
        archive
            .append_link(&mut header, format!("bin/{applet}"), "busybox")
            .with_context(|| format!("the applet {applet}"))?;
    }
    archive.into_inner().context("the archive")
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_program_its_names_and_files() -> Result<()> {
        let files = [File { path: "etc/deep/file", bytes: b"text", mode: 0o600 }];
        let packed = pack(b"program", "sh\nbusybox\nls".lines(), &files)?;
        assert_eq!(packed, pack(b"program", "sh\nbusybox\nls".lines(), &files)?);
        let mut found = Vec::new();
        for entry in tar::Archive::new(&*packed).entries()? {
            let entry = entry?;
            found.push((entry.path()?.display().to_string(), entry.header().mode()?, entry.size()));
        }
        let named = |name: &str, mode, size| (name.to_owned(), mode, size);
        assert_eq!(
            found,
            [
                named("bin/busybox", 0o755, 7),
                named("etc/deep/file", 0o600, 4),
                named("bin/sh", 0o777, 0),
                named("bin/ls", 0o777, 0),
            ]
        );
        assert!(pack(b"", ["../sh"].into_iter(), &[]).is_err());
        Ok(())
    }
}
