//! A program's own connection to the host across a fork, and context ids.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Sender, channel};

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::guest::{LONG, all_told, one, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![("linux::a_program_s_connection_is_the_parent_s_alone", connection)]
}

const PORT: u32 = 5000;

/// Repeats what is said, and tells who it was.
fn repeat(connection: &UnixStream, heard: &Sender<(String, String)>) -> Option<()> {
    let mut lines = BufReader::new(connection).lines().map_while(Result::ok);
    let who = lines.next()?;
    for line in lines {
        heard.send((who.clone(), line.clone())).ok()?;
        let mut to = connection;
        writeln!(to, "{line}").ok()?;
    }
    Some(())
}

fn connection() -> Result<()> {
    let guest = one()?;
    let path = guest.owner.folder().join(format!("port_{PORT}"));
    let listener = UnixListener::bind(&path).context("listening")?;
    let (heard, all) = channel();
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let heard = heard.clone();
            std::thread::spawn(move || repeat(&connection, &heard));
        }
    });
    let said = guest.sh(guest.root, &format!("ukp-check vsock {PORT}"))?;
    all_told(&said, &[("before", "one"), ("same", "two")])?;
    let child: Uuid = told(&said, "child")?.parse()?;
    let (code, console) = guest.end_of(child)?;
    ensure!(code == 0, "the child ended with {code}: {console}");
    all_told(&console, &[("same", "ECONNRESET"), ("anew", "three")])?;
    ensure!(told(&console, "later")? != "written", "{console}");
    let (parents, childs) = (told(&said, "cid")?, told(&console, "cid")?);
    println!("context ids: {parents} of the parent, {childs} of the child");
    all_told(&said, &[("cid-after", parents)])?;
    all_told(&console, &[("parents", parents)])?;
    ensure!(parents == cid(guest.root) && childs == cid(child), "{parents} {childs}");
    let (root, child) = (guest.root.to_string(), child.to_string());
    let expected = [(&*root, "one"), (&*root, "two"), (&*child, "three")];
    for _ in expected {
        let (who, word) = all.recv_timeout(LONG).context("the host has heard less")?;
        ensure!(expected.contains(&(&*who, &*word)), "the host heard {word} of {who}");
    }
    std::fs::remove_file(path)?;
    Ok(())
}

/// As the device chooses it: 3 and more, by the UUID alone.
fn cid(uuid: Uuid) -> String {
    let (high, low) = uuid.as_u64_pair();
    (3 + (high ^ low) % u64::from(u32::MAX - 3)).to_string()
}
