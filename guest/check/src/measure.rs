//! What the bench compares forks with, seen from inside.

use std::io::{BufRead, stdin};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::say;

/// Times fork, exec and wait of the smallest program.
pub fn trues(times: u32) -> Result<()> {
    let mut all = Vec::new();
    for _ in 0..times {
        let mut command = Command::new("/bin/true");
        // What is set to what it is anyway: without it the library would call vfork(2).
        command.uid(rustix::process::getuid().as_raw()).stdin(Stdio::null());
        let begin = Instant::now();
        let status = command.status()?;
        let us = begin.elapsed().as_secs_f64() * 1e6;
        ensure!(status.success(), "/bin/true ended with {status}");
        all.push(format!("{us:.1}"));
    }
    say::here(&[("true_us", all.join(" "))])
}

/// The first process of a machine: says so, and then again what it reads. It never ends, for a kernel
/// panics without it.
pub fn init() -> Result<()> {
    say::here(&[("init", String::new())])?;
    for line in stdin().lock().lines() {
        say::here(&[("echo", line?)])?;
    }
    loop {
        std::thread::park();
    }
}
