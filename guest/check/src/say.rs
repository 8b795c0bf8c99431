//! How the test is told, and where the interface is.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

/// What is read by a machine that is a child.
pub const ZERO: &str = "00000000-0000-0000-0000-000000000000";

/// A file of `/uk/libukp`.
pub fn libukp(name: &str) -> PathBuf {
    Path::new("/uk/libukp").join(name)
}

/// A value, or the name of the error.
pub fn shown(result: io::Result<String>) -> String {
    match result {
        Ok(text) if text.trim().is_empty() => "empty".to_owned(),
        Ok(text) => text.trim().to_owned(),
        Err(error) => match error.raw_os_error() {
            Some(2) => "ENOENT".to_owned(),
            Some(5) => "EIO".to_owned(),
            Some(11) => "EAGAIN".to_owned(),
            Some(16) => "EBUSY".to_owned(),
            Some(104) => "ECONNRESET".to_owned(),
            Some(116) => "ESTALE".to_owned(),
            _ => format!("{error:?}").replace('\n', " "),
        },
    }
}

/// Forks by a file of its own and reads what it shows then.
pub fn fork() -> io::Result<String> {
    let mut file = OpenOptions::new().read(true).write(true).open(libukp("fork"))?;
    file.write_all(b"1")?;
    let mut uuid = String::new();
    file.read_to_string(&mut uuid)?;
    Ok(uuid.trim().to_owned())
}

/// Reads an open file from its beginning.
pub fn again(mut file: &fs::File) -> io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn lines(found: &[(&str, String)]) -> String {
    let lines: Vec<String> =
        found.iter().map(|(name, value)| format!("@{name} {value}\n")).collect();
    lines.concat()
}

/// Says it on the output.
pub fn here(found: &[(&str, String)]) -> Result<()> {
    io::stdout().write_all(lines(found).as_bytes())?;
    Ok(())
}

/// Says it on the console, and ends the machine.
pub fn in_child(found: &[(&str, String)]) -> Result<()> {
    let mut console = OpenOptions::new().write(true).open("/dev/console")?;
    console.write_all(lines(found).as_bytes())?;
    let asked = Command::new("/.uk/ukp").args(["exit", "0"]).status()?;
    ensure!(asked.success(), "ukp exit: {asked}");
    // The machine goes with everything in it.
    loop {
        std::thread::park();
    }
}
