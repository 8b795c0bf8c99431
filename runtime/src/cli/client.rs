//! The other side: finds owners, finds instances among them, and asks.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebpf_loader::Row;
use runtime::proto::MAX_MESSAGE;
use runtime::sys::{self, SysError};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use uuid::Uuid;

use super::error::CliError;
use super::parse::Prefix;
use super::wire::{Answer, Ask, Listed, Probed, SOCKET, Traced};

/// How long an owner may take to list its instances, or to tell what was counted.
const LIST_TIME: Duration = Duration::from_secs(5);
/// Instances named in an error.
const CANDIDATES: usize = 6;

/// A connection to an owner.
#[derive(Debug)]
pub struct Line {
    socket: OwnedFd,
    folder: PathBuf,
}

impl Line {
    /// `None` if nobody answers there: an owner that serves nobody, or is just coming or going.
    fn connect(folder: &Path) -> Result<Option<Self>, CliError> {
        match Self::connect_to(folder) {
            Err(Errno::AGAIN) => Err(silent()),
            connected => Ok(connected.ok()),
        }
    }

    fn connect_to(folder: &Path) -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let address = SocketAddrUnix::new(folder.join(SOCKET))?;
        // Of connect(2), too: an owner that is stopped accepts nobody.
        set_socket_timeout(&socket, Timeout::Send, Some(LIST_TIME))?;
        rustix::net::connect(&socket, &address)?;
        Ok(Self { socket, folder: folder.to_owned() })
    }

    /// The owner's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn send(&self, ask: &Ask) -> Result<(), CliError> {
        let bytes = serde_json::to_vec(ask)
            .map_err(|error| CliError::internal(format!("cannot write a request: {error}")))?;
        sys::send(&self.socket, &bytes, &[]).map_err(|_| gone())
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Answer, CliError> {
        let len = match sys::receive(&self.socket, buffer, RecvFlags::empty()) {
            Ok((len @ 1.., _)) => len,
            Err(error) if error.errno() == libc::EAGAIN => {
                return Err(silent());
            }
            _ => return Err(gone()),
        };
        serde_json::from_slice(&buffer[..len])
            .map_err(|error| CliError::internal(format!("an answer is not understood: {error}")))
    }

    /// Asks; a refusal is an error.
    pub fn ask(&self, ask: &Ask) -> Result<Answer, CliError> {
        self.send(ask)?;
        match self.receive(&mut vec![0_u8; MAX_MESSAGE])? {
            Answer::Failed(message) => Err(CliError::internal(message)),
            answer => Ok(answer),
        }
    }

    /// Another connection to the same owner.
    pub fn again(&self) -> Result<Self, CliError> {
        Self::connect(&self.folder)?.ok_or_else(gone)
    }

    /// What ends this connection, from any thread.
    pub fn hang_up(&self) -> Result<impl FnOnce() + Send + 'static, CliError> {
        let socket = self.socket.try_clone();
        let socket = socket.map_err(|source| CliError::from(SysError { call: "dup", source }))?;
        // It may have ended.
        Ok(move || rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).unwrap_or(()))
    }

    /// Has `show` show console output, with its place, until it wants no more or all is said.
    pub fn output(
        &self,
        ask: &Ask,
        mut show: impl FnMut(u64, &[u8]) -> Result<bool, CliError>,
    ) -> Result<(), CliError> {
        self.send(ask)?;
        let mut buffer = vec![0_u8; MAX_MESSAGE];
        loop {
            match self.receive(&mut buffer)? {
                Answer::Output { at, bytes } if show(at, &bytes)? => {}
                Answer::Failed(message) => return Err(CliError::internal(message)),
                _ => return Ok(()),
            }
        }
    }

    /// What was counted of an instance, and of all that have ended.
    pub fn probed(&self, instance: Uuid) -> Result<(Probed, Vec<Row>), CliError> {
        self.send(&Ask::Probes { instance })?;
        let mut buffer = vec![0_u8; MAX_MESSAGE];
        let mut own: Option<Probed> = None;
        let mut ended = Vec::new();
        loop {
            match (self.receive(&mut buffer)?, &mut own) {
                (Answer::Probes(first), None) => own = Some(first),
                (Answer::Probes(mut part), Some(own)) => own.rows.append(&mut part.rows),
                (Answer::Ended(mut part), _) => ended.append(&mut part),
                (Answer::Failed(message), _) => return Err(CliError::internal(message)),
                _ => return Ok((own.unwrap_or_default(), ended)),
            }
        }
    }

    /// The next fork with everything in it; `None` if the answer is another.
    pub fn traced(&self, instance: Uuid, branch: bool) -> Result<Option<Traced>, CliError> {
        self.send(&Ask::Trace { instance, branch })?;
        let mut buffer = vec![0_u8; MAX_MESSAGE];
        let mut traced: Option<Traced> = None;
        loop {
            match (self.receive(&mut buffer)?, &mut traced) {
                (Answer::Traced(first), None) => traced = Some(*first),
                (Answer::Events(mut part), Some(traced)) => traced.events.append(&mut part),
                (Answer::Failed(message), _) => return Err(CliError::internal(message)),
                _ => return Ok(traced),
            }
        }
    }

    fn list(&self) -> Result<Vec<Listed>, CliError> {
        self.limit(Some(LIST_TIME))?;
        self.send(&Ask::List)?;
        let mut buffer = vec![0_u8; MAX_MESSAGE];
        let mut all = Vec::new();
        loop {
            match self.receive(&mut buffer)? {
                Answer::Instances(mut part) => all.append(&mut part),
                Answer::Failed(message) => return Err(CliError::internal(message)),
                _ => break,
            }
        }
        self.limit(None)?;
        Ok(all)
    }

    fn limit(&self, time: Option<Duration>) -> Result<(), CliError> {
        set_socket_timeout(&self.socket, Timeout::Recv, time)
            .map_err(|errno| CliError::from(SysError::new("setsockopt")(errno)))
    }

    /// For questions that are answered at once: an owner that hangs is an error from now on.
    pub fn hurry(&self) -> Result<(), CliError> {
        self.limit(Some(LIST_TIME))
    }
}

fn silent() -> CliError {
    CliError::internal("an owner of instances does not answer")
}

fn gone() -> CliError {
    CliError::internal("the `runtime run` that owned the instance has ended")
}

/// All instances of all owners of this user.
pub fn all() -> Result<Vec<(Line, Vec<Listed>)>, CliError> {
    let mut owners = Vec::new();
    for folder in runtime::owner::folders()? {
        let listed = Line::connect(&folder)
            .and_then(|line| line.map(|line| Ok((line.list()?, line))).transpose());
        match listed {
            Ok(None) => {}
            Ok(Some((listed, line))) => owners.push((line, listed)),
            // One that ends or hangs does not keep the others from being seen.
            Err(error) => super::tell(&format!("note: {error}")),
        }
    }
    Ok(owners)
}

/// The one instance that `prefix` means, and the line to its owner.
pub fn find(prefix: &Prefix) -> Result<(Line, Listed), CliError> {
    let mut known = Vec::new();
    let mut found = Vec::new();
    for (line, listed) in all()? {
        known.extend(listed.iter().filter(|one| one.lives()).map(|one| one.uuid));
        let mut matching = listed.into_iter().filter(|one| prefix.matches(&one.uuid)).peekable();
        if matching.peek().is_some() {
            found.push((line, matching.collect::<Vec<_>>()));
        }
    }
    let matching: Vec<_> = found.iter().flat_map(|(_, one)| one).map(|one| one.uuid).collect();
    if matching.len() > 1 {
        return Err(ambiguous(prefix, &matching));
    }
    found
        .pop()
        .and_then(|(line, mut one)| Some((line, one.pop()?)))
        .ok_or_else(|| unknown(prefix, &known))
}

fn ambiguous(prefix: &Prefix, matching: &[Uuid]) -> CliError {
    let (count, names) = (matching.len(), names(matching));
    CliError::usage(format!("{} is the beginning of {count} instances: {names}", prefix.typed()))
}

fn unknown(prefix: &Prefix, known: &[Uuid]) -> CliError {
    let typed = prefix.typed();
    CliError::usage(if known.is_empty() {
        format!("there is no instance {typed}: none runs; start one with `runtime run --bare`")
    } else {
        format!("there is no instance {typed}; there are: {}", names(known))
    })
}

fn names(uuids: &[Uuid]) -> String {
    let shown = uuids.iter().take(CANDIDATES).map(ToString::to_string).collect::<Vec<_>>();
    let more = uuids.len().saturating_sub(CANDIDATES);
    let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("{}{rest}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_named_but_not_all_of_many() {
        let uuids: Vec<_> = (0..8).map(Uuid::from_u128).collect();
        let prefix: Prefix = "0".parse().expect("a digit");
        let text = ambiguous(&prefix, &uuids).to_string();
        assert!(text.starts_with("0 is the beginning of 8 instances: 00000000-"), "{text}");
        assert!(text.ends_with(" and 2 more"), "{text}");
        assert!(unknown(&prefix, &[]).to_string().contains("none runs"));
    }
}
