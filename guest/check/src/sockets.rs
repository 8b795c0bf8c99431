//! The guest's end of connections whose speed is measured.
//!
//! ```text
//!  host ── mode (1 byte), count (8 bytes, little-endian) ──> guest
//!   e  the guest sends each of count bytes back as it comes
//!   r  it receives count bytes, and sends one
//!   s  it sends count bytes
//! ```

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::system::finit_module;
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::say;

/// Bytes in one call.
const PIECE: usize = 64 * 1024;

/// Serves one connection after the other, for ever.
pub fn serve(port: u32) -> Result<()> {
    if rustix::process::getpid().is_init() {
        load_modules()?;
    }
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port).context("listening")?;
    say::here(&[("serving", port.to_string())])?;
    for connection in listener.incoming() {
        // Whoever asked sees that it is gone.
        if let Err(error) = connection.map_err(anyhow::Error::from).and_then(answer) {
            eprintln!("ukp-check: {error:#}");
        }
    }
    Ok(())
}

/// As the agent does, where there is none.
fn load_modules() -> Result<()> {
    let list = std::fs::read_to_string("/.uk/modules").context("reading the list of modules")?;
    for path in list.lines().filter(|path| !path.is_empty()) {
        let file = File::open(path).with_context(|| format!("opening {path}"))?;
        match finit_module(file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => bail!("loading {path}: {errno}"),
        }
    }
    Ok(())
}

fn answer(mut connection: VsockStream) -> Result<()> {
    let mut header = [0; 9];
    connection.read_exact(&mut header).context("reading what is asked for")?;
    let [mode, count @ ..] = header;
    let mut left = u64::from_le_bytes(count);
    let mut piece = vec![0; PIECE];
    let next = |left: u64| usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
    match mode {
        b'e' => {
            while left > 0 {
                connection.read_exact(&mut piece[..1])?;
                connection.write_all(&piece[..1])?;
                left -= 1;
            }
        }
        b'r' => {
            while left > 0 {
                let len = connection.read(&mut piece[..next(left)])?;
                if len == 0 {
                    bail!("the connection ended {left} bytes early");
                }
                left -= len as u64;
            }
            connection.write_all(&[1])?;
        }
        b's' => {
            while left > 0 {
                let len = next(left);
                connection.write_all(&piece[..len])?;
                left -= len as u64;
            }
        }
        _ => bail!("mode {mode} is not known"),
    }
    Ok(())
}
