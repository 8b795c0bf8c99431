//! The owner's side: answers the other verbs while `run` is in the foreground.
//!
//! One thread accepts, and one per connection answers: a `wait` takes as long as it takes. The
//! socket lies in the owner's folder, which no other user can enter, and goes with it.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebpf_loader::{Counted, Metric, ProbeError, Probes, Row};
use runtime::owner::{Known, Owner, OwnerError};
use runtime::proto::{MAX_MESSAGE, Request};
use runtime::sys::{self, SysError, now_ns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use uuid::Uuid;

use super::log::{Logs, Piece};
use super::tracing;
use super::wire::{Answer, Ask, LISTED_AT_ONCE, Listed, Probed, REASON_CHARS, SOCKET, State};

/// How often a `wait` looks whether anybody still listens.
const LOOK: Duration = Duration::from_millis(500);
/// How long an instance may take to end once it was told to.
const END: Duration = Duration::from_secs(10);
/// How long answers under way may take when `run` ends.
const GOODBYE: Duration = Duration::from_secs(1);
/// Bytes of console output in one answer.
const LOG_PIECE: usize = 16 * 1024;
/// A child that was just being born when its parent was killed has called after this time.
const BIRTH: Duration = Duration::from_millis(20);

/// Answers questions about the instances of one owner.
pub struct Server {
    owner: Arc<Owner>,
    paused: Mutex<HashSet<Uuid>>,
    answering: AtomicUsize,
    logs: Arc<Logs>,
    /// Why there are no probes.
    probes_off: Option<String>,
    tracing: Mutex<()>,
}

impl Server {
    /// Starts to answer.
    ///
    /// # Errors
    ///
    /// If the socket cannot be made.
    pub fn start(
        owner: &Arc<Owner>,
        logs: Arc<Logs>,
        probes_off: Option<String>,
    ) -> Result<Arc<Self>, SysError> {
        let socket = listen(&owner.folder().join(SOCKET))?;
        let server = Arc::new(Self {
            owner: owner.clone(),
            paused: Mutex::default(),
            answering: AtomicUsize::new(0),
            logs,
            probes_off,
            tracing: Mutex::default(),
        });
        let accepting = server.clone();
        start_thread(move || accepting.accept(&socket))?;
        Ok(server)
    }

    /// Waits until everybody who waits has an answer.
    pub fn finish(&self) {
        let end = Instant::now() + GOODBYE;
        while self.answering.load(Ordering::SeqCst) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn accept(self: &Arc<Self>, socket: &OwnedFd) {
        loop {
            match rustix::net::accept_with(socket, SocketFlags::CLOEXEC) {
                Ok(connection) => {
                    let server = self.clone();
                    // Without a thread left the other side sees its connection closed.
                    drop(start_thread(move || server.serve(&connection)));
                }
                // No descriptor left, for example: later there may be one.
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn serve(&self, connection: &OwnedFd) {
        let mut buffer = vec![0_u8; MAX_MESSAGE];
        while let Ok((len @ 1.., _)) = sys::receive(connection, &mut buffer, RecvFlags::empty()) {
            self.answering.fetch_add(1, Ordering::SeqCst);
            let answers = match serde_json::from_slice(&buffer[..len]) {
                Ok(ask) => self.answer(ask, connection),
                Err(error) => vec![Answer::Failed(format!("not understood: {error}"))],
            };
            let sent = answers.iter().all(|answer| send(connection, answer));
            self.answering.fetch_sub(1, Ordering::SeqCst);
            if !sent {
                return;
            }
        }
    }

    fn answer(&self, ask: Ask, connection: &OwnedFd) -> Vec<Answer> {
        let answer = match ask {
            Ask::List => return self.list(),
            Ask::Branch { instance, unaware: false, .. } if self.is_asleep(instance) => {
                return vec![Answer::Failed(format!(
                    "{instance} is paused, and forks itself: `runtime resume` it first"
                ))];
            }
            Ask::Branch { instance, children, unaware } => {
                let made = if unaware {
                    self.owner.branch_unaware(instance, children)
                } else {
                    self.owner.branch(instance, children)
                };
                made.map(Answer::Children)
            }
            Ask::Wait { instance } => self.wait(instance, connection),
            Ask::Stop { instance, code, drain_s } => {
                self.stop(instance, code, Duration::from_secs(drain_s.into()))
            }
            Ask::Kill { instance, recursive } => self.kill(instance, recursive),
            Ask::Pause { instance } => self.request(instance, Request::Pause),
            Ask::Resume { instance } => self.request(instance, Request::Resume),
            Ask::Stats { instance } => self.stats(instance),
            Ask::Probes { instance } => return self.probes(instance),
            Ask::Logs { instance, follow } => return vec![self.logs(instance, follow, connection)],
            Ask::Type { instance, bytes } => {
                self.owner.type_in(instance, &bytes).map(Answer::Typed)
            }
            Ask::Trace { instance, branch } => return self.trace(instance, branch, connection),
        };
        vec![answer.unwrap_or_else(|error| Answer::Failed(sys::chain(&error)))]
    }

    fn paused(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is paused, and its guest would have to do something.
    fn is_asleep(&self, uuid: Uuid) -> bool {
        let linux = self.owner.with(uuid, |known| known.linux).unwrap_or(false);
        linux && self.paused().contains(&uuid)
    }

    fn request(&self, uuid: Uuid, request: Request) -> Result<Answer, OwnerError> {
        let pause = matches!(request, Request::Pause);
        self.owner.ask(uuid, request)?;
        if pause {
            self.paused().insert(uuid);
        } else {
            self.paused().remove(&uuid);
        }
        Ok(Answer::Done)
    }

    fn list(&self) -> Vec<Answer> {
        let mut paused = self.paused();
        let mut listed = self.owner.each(|uuid, known| listed(uuid, known, paused.contains(&uuid)));
        let lives: HashSet<_> =
            listed.iter().filter(|one| one.lives()).map(|one| one.uuid).collect();
        paused.retain(|uuid| lives.contains(uuid));
        drop(paused);
        listed.sort_by_key(|one| std::cmp::Reverse(one.age_ms));
        for one in listed.iter_mut().filter(|one| one.lives()) {
            one.resident_kib = resident_kib(one.pid);
        }
        let parts = listed.chunks(LISTED_AT_ONCE).map(|part| Answer::Instances(part.to_vec()));
        parts.chain([Answer::Done]).collect()
    }

    fn stats(&self, instance: Uuid) -> Result<Answer, OwnerError> {
        let stats = self.owner.stats(instance)?;
        Ok(Answer::Stats { stats, kvm: self.owner.kvm_stats(instance)? })
    }

    fn probes(&self, instance: Uuid) -> Vec<Answer> {
        match self.probed(instance) {
            Ok((own, ended)) => parts(own, ended),
            Err(reason) => vec![Answer::Failed(reason)],
        }
    }

    fn probed(&self, instance: Uuid) -> Result<(Probed, Vec<Row>), String> {
        let failed = |error: OwnerError| sys::chain(&error);
        let pid = self.owner.with(instance, |known| known.pid.cast_unsigned()).map_err(failed)?;
        let mut own = self.owner.counted(instance).map_err(failed)?;
        let mut ended = self.owner.counted_of_ended();
        let read = |probes: &mut Probes| -> Result<Probed, ProbeError> {
            let live = probes.read()?.remove(&pid).unwrap_or_default();
            by_probes(&mut own, &live);
            by_probes(&mut ended, probes.ended());
            let measured = probes.attached().into_iter();
            let refused = probes.refused().iter();
            Ok(Probed {
                measured: measured.map(|one| format!("{} by {}", one.what, one.how)).collect(),
                refused: refused.map(ToString::to_string).collect(),
                lost: probes.lost()?,
                ..Probed::default()
            })
        };
        let probed = match self.owner.probes(read) {
            None => Probed { off: self.probes_off.clone(), ..Probed::default() },
            Some(probed) => probed.map_err(|error| sys::chain(&error))?,
        };
        let (rows, unread) = (ebpf_loader::rows(&own), self.owner.probes_unread());
        Ok((Probed { rows, unread, ..probed }, ebpf_loader::rows(&ended)))
    }

    fn trace(&self, uuid: Uuid, branch: bool, connection: &OwnedFd) -> Vec<Answer> {
        let failed = |reason: String| vec![Answer::Failed(reason)];
        if let Some(off) = &self.probes_off {
            return failed(format!("probes are off: {off}"));
        }
        let Ok(_alone) = self.tracing.try_lock() else {
            return failed("another trace of this tree is under way".to_owned());
        };
        tracing::trace(&self.owner, uuid, branch, || hung_up(connection))
            .unwrap_or_else(|error| failed(sys::chain(&error)))
    }

    /// Sends what was said, and returns what comes behind it.
    fn logs(&self, instance: Uuid, follow: bool, connection: &OwnedFd) -> Answer {
        let mut next = 0;
        let time = if follow { LOOK } else { Duration::ZERO };
        // What is said while this is read comes without end.
        let end = if follow { u64::MAX } else { self.logs.end(instance).unwrap_or(0) };
        loop {
            let Some(Piece { at, bytes, last }) = self.logs.read(instance, next, LOG_PIECE, time)
            else {
                return Answer::Failed(format!("nothing is kept of what {instance} said"));
            };
            next = at + bytes.len() as u64;
            let heard = bytes.is_empty() || send(connection, &Answer::Output { at, bytes });
            if !heard || hung_up(connection) || last || next >= end {
                return Answer::Done;
            }
        }
    }

    fn wait(&self, uuid: Uuid, connection: &OwnedFd) -> Result<Answer, OwnerError> {
        loop {
            match self.owner.wait_exit(uuid, LOOK) {
                Err(OwnerError::Timeout { .. }) if !hung_up(connection) => {}
                result => return result.map(|(code, why)| Answer::Exited { code, why }),
            }
        }
    }

    /// A guest with an agent may finish what it is at first.
    fn stop(&self, uuid: Uuid, code: u8, drain: Duration) -> Result<Answer, OwnerError> {
        if !drain.is_zero() && !self.is_asleep(uuid) {
            match self.owner.drain(uuid, drain) {
                // It has no agent, or its agent says nothing: it is ended without.
                Ok(_) | Err(OwnerError::Agent(_)) => {}
                Err(error) => return Err(error),
            }
        }
        match self.owner.ask(uuid, Request::Stop { code: code.into() }) {
            // It may be gone before its answer is.
            Ok(_) | Err(OwnerError::Ended { .. }) => {}
            Err(error) => return Err(error),
        }
        let (code, why) = self.owner.wait_exit(uuid, END)?;
        Ok(Answer::Exited { code, why })
    }

    fn kill(&self, uuid: Uuid, recursive: bool) -> Result<Answer, OwnerError> {
        let mut killed = HashSet::new();
        loop {
            let family = if recursive { self.family(uuid) } else { vec![uuid] };
            let alive: HashSet<_> = self.owner.alive().into_iter().collect();
            let targets: Vec<_> = family.into_iter().filter(|one| alive.contains(one)).collect();
            if targets.is_empty() {
                break;
            }
            for target in &targets {
                self.owner.kill(*target)?;
            }
            for target in &targets {
                self.owner.wait_exit(*target, END)?;
            }
            killed.extend(targets);
            if recursive {
                std::thread::sleep(BIRTH);
                self.owner.settle();
            }
        }
        Ok(Answer::Killed(killed.len()))
    }

    /// An instance and its descendants.
    fn family(&self, root: Uuid) -> Vec<Uuid> {
        let mut children: HashMap<Uuid, Vec<Uuid>> = HashMap::new();
        for (uuid, parent) in self.owner.each(|uuid, known| (uuid, known.parent)) {
            children.entry(parent.unwrap_or_default()).or_default().push(uuid);
        }
        let mut family = vec![root];
        let mut next = 0;
        while let Some(uuid) = family.get(next) {
            family.extend(children.remove(uuid).unwrap_or_default());
            next += 1;
        }
        family
    }
}

fn listed(uuid: Uuid, known: &Known, paused: bool) -> Listed {
    let state = match (known.gone, paused) {
        (true, _) => State::Stopped,
        (false, true) => State::Paused,
        (false, false) => State::Running,
    };
    let (code, why) = known.exit.clone().unwrap_or((137, None));
    Listed {
        uuid,
        parent: known.parent,
        pid: known.pid,
        state,
        code: known.gone.then_some(code),
        why: why.map(|why| shown(&why)),
        age_ms: now_ns().saturating_sub(known.called_ns) / 1_000_000,
        memory_mib: known.memory_mib,
        vcpus: known.vcpus,
        resident_kib: 0,
    }
}

/// A guest may have written it: without what a terminal would obey, and no longer than there is room for.
fn shown(why: &str) -> String {
    let plain = why.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    plain.take(REASON_CHARS).collect()
}

/// 0 if the process is gone.
fn resident_kib(pid: i32) -> u64 {
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    pages * 4
}

/// Tells whether it was sent.
fn send(connection: &OwnedFd, answer: &Answer) -> bool {
    serde_json::to_vec(answer).is_ok_and(|bytes| sys::send(connection, &bytes, &[]).is_ok())
}

fn hung_up(connection: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn listen(path: &Path) -> Result<OwnedFd, SysError> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(SysError::new("socket"))?;
    let address = SocketAddrUnix::new(path).map_err(SysError::new("bind"))?;
    rustix::net::bind(&socket, &address).map_err(SysError::new("bind"))?;
    rustix::net::listen(&socket, 64).map_err(SysError::new("listen"))?;
    Ok(socket)
}

fn start_thread(run: impl FnOnce() + Send + 'static) -> Result<(), SysError> {
    std::thread::Builder::new()
        .name("serve".into())
        .spawn(run)
        .map(drop)
        .map_err(|source| SysError { call: "starting a thread", source })
}
/// Buckets in one answer, so that it stays below `runtime::proto::MAX_MESSAGE`.
const BUCKETS_AT_ONCE: usize = 1500;

/// Adds what probes counted, but for calls to KVM: instances count all of theirs, the probes those
/// during a trace.
fn by_probes(own: &mut Counted, probed: &Counted) {
    let others = probed.iter().filter(|((_, metric), _)| *metric != Metric::Ioctl);
    ebpf_loader::merge(own, &others.map(|(key, it)| (*key, it.clone())).collect());
}

/// What was counted, in parts.
fn parts(own: Probed, ended: Vec<Row>) -> Vec<Answer> {
    let Probed { rows, .. } = own;
    let mut own_parts = split(rows).into_iter();
    let first = Probed { rows: own_parts.next().unwrap_or_default(), ..own };
    let rest = own_parts.map(|rows| Answer::Probes(Probed { rows, ..Probed::default() }));
    let ended = split(ended).into_iter().map(Answer::Ended);
    std::iter::once(Answer::Probes(first)).chain(rest).chain(ended).chain([Answer::Done]).collect()
}

fn split(rows: Vec<Row>) -> Vec<Vec<Row>> {
    let mut parts: Vec<Vec<Row>> = Vec::new();
    let mut room = 0;
    for row in rows {
        let buckets = row.histogram.cells().count();
        if buckets > room {
            parts.push(Vec::new());
            room = BUCKETS_AT_ONCE;
        }
        room = room.saturating_sub(buckets);
        parts.last_mut().into_iter().for_each(|part| part.push(row.clone()));
    }
    parts
}

#[cfg(test)]
mod tests {
    use ebpf_loader::{Histogram, Role};

    use super::*;

    /// Reasons are what guests wrote.
    #[test]
    fn a_list_of_the_longest_entries_fits_a_message() {
        let worst = |c: char| Listed {
            uuid: Uuid::max(),
            parent: Some(Uuid::max()),
            pid: i32::MAX,
            state: State::Stopped,
            code: Some(i32::MIN),
            why: Some(shown(&c.to_string().repeat(1000))),
            age_ms: u64::MAX,
            memory_mib: u32::MAX,
            vcpus: u32::MAX,
            resident_kib: u64::MAX,
        };
        for c in ['\u{1}', '"', '\u{10ffff}', '\u{7f}', '\u{85}'] {
            let part = Answer::Instances(vec![worst(c); LISTED_AT_ONCE]);
            let bytes = serde_json::to_vec(&part).expect("it has no maps").len();
            assert!(bytes < MAX_MESSAGE, "{c:?}: {bytes} bytes");
        }
    }

    #[test]
    fn a_long_list_comes_in_parts_that_fit_a_message() {
        let full = Histogram::from(
            (0..500).map(|bucket| (bucket, u64::MAX, u64::MAX)).collect::<Vec<_>>(),
        );
        let row = |metric| Row { role: Role::Parent, metric, histogram: full.clone() };
        let rows: Vec<_> = Metric::ALL.iter().map(|metric| row(*metric)).collect();
        let own = Probed { rows: rows.clone(), measured: vec!["it".into()], ..<_>::default() };
        let answers = parts(own, rows.clone());
        assert!(matches!(answers.last(), Some(Answer::Done)));
        let (mut got, mut ended) = (Vec::new(), Vec::new());
        for answer in &answers {
            let bytes = serde_json::to_vec(answer).expect("it has no maps").len();
            assert!(bytes < runtime::proto::MAX_MESSAGE, "{bytes} bytes");
            match answer {
                Answer::Probes(part) => got.extend(part.rows.clone()),
                Answer::Ended(part) => ended.extend(part.clone()),
                _ => {}
            }
        }
        assert_eq!((got, ended), (rows.clone(), rows));
        assert!(matches!(&answers[0], Answer::Probes(first) if first.measured == ["it"]));
    }
}
