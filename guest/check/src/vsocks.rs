//! A program's own connection to the host, across a fork.

use std::io::{self, BufRead, BufReader, Write};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::Result;
use vsock::{VMADDR_CID_HOST, VsockStream, get_local_cid};

use crate::say::{self, ZERO, fork, shown};

/// How long an answer may take, and a new connection in the child.
const LIMIT: Duration = Duration::from_secs(30);

/// Forks with one thread in read(2) on a connection to somebody on the host who repeats what is said.
pub fn across_a_fork(port: u32) -> Result<()> {
    let mut stream = connect(port)?;
    stream.set_read_timeout(None)?;
    let (sender, heard) = channel();
    let lines = BufReader::new(stream.try_clone()?).lines();
    // Until there is an error, or somebody has heard enough.
    std::thread::spawn(move || lines.map(shown).try_for_each(|line| sender.send(line)));
    let hear = || heard.recv_timeout(LIMIT).unwrap_or_else(|_| "nothing".to_owned());
    writeln!(stream, "one")?;
    let before = hear();
    let parents = get_local_cid()?.to_string();
    let read = fork()?;
    if read != ZERO {
        writeln!(stream, "two")?;
        return say::here(&[
            ("before", before),
            ("same", hear()),
            ("cid", parents),
            ("cid-after", get_local_cid()?.to_string()),
            ("child", read),
        ]);
    }
    // Nothing was said that could be answered.
    let same = hear();
    let later = shown(writeln!(stream, "two").map(|()| "written".to_owned()));
    let begin = Instant::now();
    let anew = loop {
        match connect(port).and_then(|mut stream| exchange(&mut stream, "three")) {
            Err(_) if begin.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(50)),
            result => break result,
        }
    };
    say::in_child(&[
        ("same", same),
        ("later", later),
        ("anew", shown(anew)),
        ("parents", parents),
        ("cid", get_local_cid()?.to_string()),
    ])
}

fn connect(port: u32) -> io::Result<VsockStream> {
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn exchange(stream: &mut VsockStream, word: &str) -> io::Result<String> {
    stream.write_all(format!("{word}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}
