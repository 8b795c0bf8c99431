//! The mounted file system, and what stands in for machine and host.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_abi::port::answer;
use guest_agent::doorbell::{Doorbell, Identity, Words};
use guest_agent::forker::Forker;
use guest_agent::fs::{self as libukp, Service};
use guest_agent::host::{Host, HostError, Then};
use guest_agent::renew::{Renew, RenewError};
use guest_agent::sync::lock;
use guest_wire::{ChildInfo, Status};
use uuid::Uuid;

/// No step of a test takes longer.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Why nothing can be mounted here.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root can mount FUSE without a helper".into());
    }
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    device.err().map(|error| format!("/dev/fuse: {error}"))
}

/// What the next forks give, in their order.
pub enum Fork {
    /// A child with this name.
    Child(Uuid),
    /// This machine becomes the child.
    Become(Uuid, u64),
    /// It fails.
    Fail(u32),
}

/// A doorbell: a fork takes what the test sends, and waits for it.
pub struct Bell {
    forks: Mutex<Receiver<Fork>>,
    /// Forks that were asked for.
    pub rung: AtomicU32,
}

impl Doorbell for Bell {
    fn announce(&self, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn fork(&self) -> io::Result<Words> {
        self.rung.fetch_add(1, Ordering::SeqCst);
        let mut words = [0; answer::WORDS];
        let mut put = |at: usize, uuid: Uuid| {
            let chunks = uuid.as_bytes().chunks_exact(4);
            for (word, bytes) in words.iter_mut().skip(at).zip(chunks) {
                *word = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
            }
        };
        let next = lock(&self.forks).recv();
        match next.map_err(|_| io::Error::other("the test has ended"))? {
            Fork::Child(uuid) => put(answer::CHILD_UUID, uuid),
            Fork::Become(uuid, generation) => {
                put(answer::OWN_UUID, uuid);
                words[answer::ROLE] = 1;
                words[answer::GENERATION] = u32::try_from(generation).unwrap_or(0);
            }
            Fork::Fail(errno) => {
                words[answer::STATUS] = errno;
                words[answer::FAILED_STEP] = 3;
            }
        }
        Ok(words)
    }

    fn ready(&self) -> io::Result<()> {
        Ok(())
    }

    fn exit(&self, _: u8) -> io::Result<()> {
        Ok(())
    }

    fn clock_ns(&self) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A host whose children live until the test says otherwise.
#[derive(Default)]
pub struct Children {
    inner: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    infos: BTreeMap<Uuid, ChildInfo>,
    waits: Vec<(Uuid, Then<i32>)>,
    silent: bool,
    silenced: Vec<Then<ChildInfo>>,
    templates: u32,
    late: Option<Box<dyn FnOnce() + Send>>,
}

impl Children {
    /// How often this instance has become a template.
    pub fn templates(&self) -> u32 {
        lock(&self.inner).templates
    }

    /// The host knows this child.
    pub fn add(&self, uuid: Uuid) {
        let info = ChildInfo {
            status: Status::Running,
            creation_time: 1_700_000_000,
            snapshot: snapshot(),
            exit: None,
        };
        lock(&self.inner).infos.insert(uuid, info);
    }

    /// Its status is another one from now on.
    pub fn set(&self, uuid: Uuid, status: Status) {
        if let Some(info) = lock(&self.inner).infos.get_mut(&uuid) {
            info.status = status;
        }
    }

    /// It stops.
    pub fn stop(&self, uuid: Uuid, code: i32) {
        let mut known = lock(&self.inner);
        if let Some(info) = known.infos.get_mut(&uuid) {
            (info.status, info.exit) = (Status::Stopped, Some(code));
        }
        let waits = known.waits.extract_if(.., |(of, _)| *of == uuid).collect::<Vec<_>>();
        drop(known);
        for (_, then) in waits {
            then(Ok(code));
        }
    }

    /// It does not know this child.
    pub fn forget(&self, uuid: Uuid) {
        lock(&self.inner).infos.remove(&uuid);
    }

    /// This happens when the machine is another one but its fork has not returned.
    pub fn at_birth(&self, late: impl FnOnce() + Send + 'static) {
        lock(&self.inner).late = Some(Box::new(late));
    }

    /// It answers nothing any more.
    pub fn silence(&self) {
        lock(&self.inner).silent = true;
    }
}

/// What all children come from.
pub fn snapshot() -> Uuid {
    Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef)
}

impl Host for Children {
    fn template(&self) {
        lock(&self.inner).templates += 1;
    }

    fn child(&self, uuid: Uuid, then: Then<ChildInfo>) {
        let mut known = lock(&self.inner);
        if known.silent {
            known.silenced.push(then);
            return;
        }
        let info = known.infos.get(&uuid).copied();
        drop(known);
        then(info.ok_or(HostError::Unknown));
    }

    fn wait(&self, uuid: Uuid, then: Then<i32>) {
        let mut known = lock(&self.inner);
        match known.infos.get(&uuid).map(|info| info.exit) {
            Some(Some(code)) => {
                drop(known);
                then(Ok(code));
            }
            Some(None) => known.waits.push((uuid, then)),
            None => {
                drop(known);
                then(Err(HostError::Unknown));
            }
        }
    }

    fn became_child(&self) {
        let late = lock(&self.inner).late.take();
        if let Some(late) = late {
            late();
        }
        let waits = std::mem::take(&mut lock(&self.inner).waits);
        for (_, then) in waits {
            then(Err(HostError::OfParent));
        }
    }
}

/// Counts, and leaves this machine as it is.
#[derive(Default)]
pub struct Renewals {
    /// Identities taken on.
    pub generations: Mutex<Vec<u64>>,
    /// The next ones cannot be taken on.
    pub fail: AtomicBool,
}

impl Renew for Renewals {
    fn renew(&self, identity: &Identity) -> Result<(), RenewError> {
        if self.fail.load(Ordering::SeqCst) {
            return Err(RenewError { step: "fail", source: io::ErrorKind::Other.into() });
        }
        lock(&self.generations).push(identity.generation);
        Ok(())
    }
}

/// The mounted file system and its threads.
pub struct Rig {
    pub at: PathBuf,
    pub bell: Arc<Bell>,
    pub host: Arc<Children>,
    pub renewals: Arc<Renewals>,
    pub service: Arc<Service>,
    /// Whether the machine was to be stopped.
    pub stopped: Arc<AtomicBool>,
    forks: Option<Sender<Fork>>,
    threads: Vec<JoinHandle<()>>,
    session: Option<fuser::BackgroundSession>,
}

static RIGS: AtomicU32 = AtomicU32::new(0);

impl Rig {
    /// With room for 16 forks that wait, and a retention time of a minute.
    pub fn new() -> Result<Self> {
        Self::with(16, Duration::from_mins(1))
    }

    pub fn with(queue: usize, retention: Duration) -> Result<Self> {
        let number = RIGS.fetch_add(1, Ordering::SeqCst);
        let name = format!("guest-agent-mounted-{}-{number}", std::process::id());
        let at = std::env::temp_dir().join(name);
        fs::create_dir(&at)?;
        let (sender, receiver) = channel();
        let bell = Arc::new(Bell { forks: Mutex::new(receiver), rung: AtomicU32::new(0) });
        let (host, renewals) = (Arc::new(Children::default()), Arc::new(Renewals::default()));
        let service = Service::new(queue, retention);
        service.set_host(host.clone());
        let session = libukp::mount(service.clone(), &at).context("cannot mount")?;
        let stopped = Arc::new(AtomicBool::new(false));
        let told = stopped.clone();
        let forker = Forker {
            service: service.clone(),
            doorbell: bell.clone(),
            renew: renewals.clone(),
            freezer: None,
            fatal: Box::new(move || told.store(true, Ordering::SeqCst)),
        };
        let forker = forker.start(&at)?;
        let keeper = service.clone();
        let keeper = std::thread::spawn(move || keeper.keep_house());
        Ok(Self {
            at,
            bell,
            host,
            renewals,
            service,
            stopped,
            forks: Some(sender),
            threads: vec![forker, keeper],
            session: Some(session),
        })
    }

    /// The file `name`.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.at.join(name)
    }

    /// A file of the child `uuid`.
    pub fn of(&self, uuid: Uuid, file: &str) -> PathBuf {
        self.at.join("vm").join(uuid.to_string()).join(file)
    }

    /// Writes to the file `name` when the machine is another one but its fork has not returned; tells
    /// the error number.
    pub fn write_at_birth(&self, name: &str) -> Receiver<i32> {
        let (sender, results) = channel();
        let path = self.path(name);
        self.host.at_birth(move || {
            let writer = std::thread::spawn(move || sender.send(errno(fs::write(path, "1"))));
            // Long enough for the request to be made.
            std::thread::sleep(Duration::from_millis(200));
            drop(writer);
        });
        results
    }

    /// The next fork will give this.
    pub fn next(&self, fork: Fork) {
        if let (Fork::Child(uuid), Some(_)) = (&fork, &self.forks) {
            self.host.add(*uuid);
        }
        if let Some(forks) = &self.forks {
            forks.send(fork).unwrap();
        }
    }

    /// Forks a child.
    pub fn fork(&self) -> Result<Uuid> {
        let uuid = Uuid::new_v4();
        self.next(Fork::Child(uuid));
        fs::write(self.path("fork"), "1")?;
        Ok(uuid)
    }

    /// Names in `vm/`.
    pub fn children(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(self.path("vm"))?;
        entries.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default())).collect()
    }

    /// Runs a shell script in the mounted folder, and returns its output.
    pub fn shell(&self, script: &str) -> Result<String> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-ec", script]).current_dir("/").env("UKP", &self.at);
        let output = shell.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "{script:?} ended with {}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.forks = None;
        self.service.close();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
        if let Some(session) = self.session.take() {
            drop(session.umount_and_join());
        }
        drop(fs::remove_dir(&self.at));
    }
}

/// Waits until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !condition() {
        ensure!(start.elapsed() < LIMIT, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The error number of a result that should be an error.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

/// Writes `1` to an open file.
pub fn write_to(mut file: &File) -> io::Result<()> {
    file.write(b"1").map(|_| ())
}

/// Reads what an open file has to give in one call.
pub fn read_from(mut file: &File) -> io::Result<String> {
    let mut buffer = [0; 128];
    let length = file.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
