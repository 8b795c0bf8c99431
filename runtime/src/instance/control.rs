//! The control thread: talks to the owner, and keeps standbys ready.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use uuid::Uuid;

use super::{Instance, Stopped, last_words};
use crate::fork::{ForkError, Keeper, Link, MOST_STANDBYS, Shared, Step};
use crate::kvm::calls;
use crate::memory::PAGE;
use crate::proto::{Envelope, Event, Failure, MAX_MESSAGE, Reply, Request, Stats};
use crate::sys::{self, SysError, chain, now_ns};

/// How long a request for standbys or a fork may take.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long an instance that ends waits for its last children to come to life.
const FAREWELL: Duration = Duration::from_millis(500);
/// Stack of the control thread.
const STACK: usize = 256 * 1024;

/// What ties a standby to its parent.
#[derive(Debug)]
pub struct Cradle {
    /// What its threads share.
    pub standby: Arc<Shared>,
    /// End of file: the parent is gone, or this is an instance of its own now.
    pub line: OwnedFd,
}

impl Instance {
    /// Starts the control thread. A standby gives its cradle, a root its connection to the owner.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if there are too many threads.
    pub fn start_control(
        self: &Arc<Self>,
        cradle: Option<Cradle>,
        owner: Option<OwnedFd>,
    ) -> Result<(), SysError> {
        let instance = self.clone();
        std::thread::Builder::new()
            .name("control".into())
            .stack_size(STACK)
            .spawn(move || run(&instance, cradle, owner))
            .map(drop)
            .map_err(|source| SysError { call: "starting the control thread", source })
    }
}

/// Memory that the first requests and answers of a child need.
const FIRST_WORDS: usize = 64 * 1024;

/// Gives this thread's part of the heap pages, so that a young child takes no page faults for them.
fn warm_heap() {
    let mut memory = vec![0_u8; FIRST_WORDS];
    memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

fn run(instance: &Arc<Instance>, cradle: Option<Cradle>, owner: Option<OwnedFd>) {
    warm_heap();
    let old_link = cradle.map(|cradle| wait_for_life(instance, cradle));
    // Before the owner hears of it: then its sockets are there.
    instance.start_devices();
    let owner = match owner {
        Some(owner) => Ok(owner),
        None => connect(&instance.config().owner),
    };
    if let Ok(owner) = &owner {
        last_words::owner(owner);
    }
    // Its connection ends with the process: then the owner knows that nothing of it is left.
    let mut control = owner.ok().and_then(|owner| Control::new(instance, owner, old_link));
    let code = control.as_mut().map_or(1, Control::serve);
    if let Some(devices) = instance.devices() {
        devices.close();
    }
    std::process::exit(code);
}

/// Waits until this standby is an instance, or ends the process with its parent.
fn wait_for_life(instance: &Instance, cradle: Cradle) -> Arc<Link> {
    let Cradle { standby, line } = cradle;
    let link = instance.link();
    let mut buffer = [0_u8; 16];
    loop {
        let mut fds = [PollFd::new(&line, PollFlags::IN), PollFd::new(link.bell(), PollFlags::IN)];
        // EINTR: look at both.
        poll(&mut fds, None).unwrap_or(0);
        let told = !fds[0].revents().is_empty();
        if !fds[1].revents().is_empty() {
            // Of a standby it is its own leader that rings.
            link.clear_bell();
            standby.help();
        }
        if !told {
            continue;
        }
        match sys::receive(&line, &mut buffer, RecvFlags::empty()) {
            // The parent has nothing to say here.
            Ok((len, _)) if len > 0 => {}
            _ if instance.is_alive() => return standby.link().clone(),
            // In the middle of a fork: the leader comes alive, or ends the process.
            _ if standby.is_going() => std::thread::sleep(Duration::from_millis(1)),
            _ => std::process::exit(0),
        }
    }
}

fn connect(path: &std::path::Path) -> Result<OwnedFd, SysError> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(SysError::new("socket"))?;
    let address = SocketAddrUnix::new(path).map_err(SysError::new("connect"))?;
    rustix::net::connect(&socket, &address).map_err(SysError::new("connect"))?;
    Ok(socket)
}

/// The control thread of an instance that is alive.
struct Control<'a> {
    instance: &'a Arc<Instance>,
    owner: OwnedFd,
    keeper: Keeper,
    /// The parent's link, unmapped when no other thread uses it any more.
    old_link: Option<Arc<Link>>,
    paused: Option<Stopped<'a>>,
    gone: bool,
    /// Forks are under way.
    under_way: bool,
}

impl<'a> Control<'a> {
    /// `None`: there is no zygote, or no memory.
    fn new(
        instance: &'a Arc<Instance>,
        owner: OwnedFd,
        old_link: Option<Arc<Link>>,
    ) -> Option<Self> {
        let (zygote, config) = (instance.take_zygote()?, instance.config());
        let keeper = Keeper::new(zygote, instance.link(), config.standbys, config.sync).ok()?;
        Some(Self {
            instance,
            owner,
            keeper,
            old_link,
            paused: None,
            gone: false,
            under_way: false,
        })
    }

    fn serve(&mut self) -> i32 {
        let instance = self.instance;
        self.send(&Event::Hello {
            uuid: instance.uuid(),
            parent: instance.parent,
            pid: std::process::id().cast_signed(),
            vcpus: instance.config().vcpus,
            memory_mib: instance.config().memory_mib,
            linux: instance.config().is_linux(),
        });
        while !self.gone {
            let wait = self.look();
            if self.wait(wait) {
                // Not into memory for the longest message: clearing that would be the work of a
                // young child's first millisecond (41 page faults).
                match sys::receive_whole(&self.owner, MAX_MESSAGE, RecvFlags::DONTWAIT) {
                    Ok(message) if !message.is_empty() => self.message(&message),
                    Err(error) if error.errno() == libc::EAGAIN => {}
                    // The owner is gone: nobody is left to run for.
                    _ => {
                        instance.gate().quit();
                        return 0;
                    }
                }
            }
        }
        // Children on their way are waited for, so that the owner hears of every fork.
        let end = Instant::now() + FAREWELL;
        while self.under_way && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
            self.look();
        }
        instance.exit_code.load(Ordering::SeqCst)
    }

    /// Does what is to be done; tells how long nothing will be.
    fn look(&mut self) -> Option<Duration> {
        let instance = self.instance;
        if instance.ready.swap(false, Ordering::SeqCst)
            && let Err(error) = self.arm()
        {
            self.send(&Event::Note { text: chain(&error) });
        }
        if self.old_link.as_ref().is_some_and(|link| Arc::strong_count(link) == 1) {
            self.old_link = None;
        }
        // Before the engine is looked at: who has it may be waiting for a fork to be decided.
        for event in instance.take_events() {
            if matches!(event, Event::Exited { .. }) {
                self.gone = true;
                self.send(&Event::Calls { rows: ebpf_loader::rows(&calls::counted()) });
            }
            self.send(&event);
        }
        let waiting = instance.engine().is_waited_for();
        if waiting && let Err(error) = self.arm() {
            instance.engine().note_prewarm_failure(&error);
        }
        let tick = self.keeper.tick(instance);
        self.under_way = tick.under_way;
        for fork in tick.forks {
            self.send(&Event::Forked(Box::new(fork)));
        }
        for error in &tick.failures {
            self.send(&Event::Note { text: chain(error) });
        }
        if tick.news || !tick.failures.is_empty() {
            instance.news.fetch_add(1, Ordering::SeqCst);
            if waiting {
                instance.gate().unblock_all();
            }
        }
        if self.old_link.is_some() { Some(Duration::from_millis(1)) } else { tick.wait }
    }

    /// Sleeps until the bell rings, the owner says something or the time is over; tells whether the
    /// owner said something.
    fn wait(&self, time: Option<Duration>) -> bool {
        if self.gone {
            return false;
        }
        let link = self.instance.link();
        let mut fds = [
            PollFd::new(&self.owner, PollFlags::IN),
            PollFd::new(link.bell(), PollFlags::IN),
            PollFd::new(self.keeper.lines(), PollFlags::IN),
        ];
        let time = time.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        // EINTR: look again.
        poll(&mut fds, time.as_ref()).unwrap_or(0);
        let owner = !fds[0].revents().is_empty();
        if !fds[1].revents().is_empty() {
            link.clear_bell();
        }
        if !fds[2].revents().is_empty() {
            self.keeper.clear_lines();
        }
        owner
    }

    fn send(&self, event: &Event) {
        if let Ok(bytes) = serde_json::to_vec(event) {
            // An owner that is gone shows as end of file.
            sys::send(&self.owner, &bytes, &[]).unwrap_or(());
        }
    }

    fn message(&mut self, bytes: &[u8]) {
        match serde_json::from_slice::<Envelope>(bytes) {
            Ok(Envelope { id, request }) => {
                let result = self.request(request);
                self.send(&Event::Reply { id, result });
            }
            Err(error) => self.send(&Event::Note { text: format!("not understood: {error}") }),
        }
    }

    fn request(&mut self, request: Request) -> Result<Reply, Failure> {
        let instance = self.instance;
        match request {
            Request::Start(_) => Err(plain(libc::EALREADY, "the instance has started")),
            Request::Arm => self.arm().map(|()| Reply::Done).map_err(|error| failure(&error)),
            Request::Branch { children } => self.branch(children),
            Request::Standbys { count } => self.standbys(count),
            Request::Sync { on } => {
                self.keeper.set_sync(on);
                Ok(Reply::Done)
            }
            Request::Program { vcpu, steps } => instance
                .give_program(vcpu, &steps)
                .map(|seq| Reply::Started { seq })
                .map_err(|message| plain(libc::EINVAL, &message)),
            Request::Fault { step, errno, delay_us } => {
                let fault = &instance.link().header().fault;
                match step {
                    Some(step) => fault.set(step, errno, delay_us),
                    None => fault.clear(),
                }
                Ok(Reply::Done)
            }
            Request::KillZygote => {
                let kill = |pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                match instance.zygote_pid().map(kill) {
                    Some(Ok(())) => Ok(Reply::Done),
                    _ => Err(plain(libc::ESRCH, "the zygote is gone")),
                }
            }
            Request::Pause => {
                if self.paused.is_none() {
                    self.paused = instance.gate().stop(None, Duration::from_secs(1));
                }
                match self.paused {
                    Some(_) => Ok(Reply::Done),
                    None => Err(plain(libc::ETIMEDOUT, "the vCPUs did not stop within 1 s")),
                }
            }
            Request::Resume => {
                self.paused = None;
                Ok(Reply::Done)
            }
            Request::Type { bytes } => match instance.devices() {
                Some(devices) => Ok(Reply::Typed { count: devices.type_in(&bytes) }),
                None => Err(plain(libc::ENODEV, "its guest has no console to type on")),
            },
            Request::Stats => Ok(Reply::Stats(self.stats())),
            Request::KvmStats => match instance.machine().statistics() {
                Ok(statistics) => Ok(Reply::KvmStats(statistics)),
                Err(error) => Err(plain(error.errno(), &chain(&error))),
            },
            Request::Calls => Ok(Reply::Calls(ebpf_loader::rows(&calls::counted()))),
            Request::Stop { code } => {
                self.paused = None;
                instance.exit(code, None);
                Ok(Reply::Done)
            }
        }
    }

    /// Makes the instance forkable, if it is not.
    fn arm(&mut self) -> Result<(), ForkError> {
        let begin = now_ns();
        if super::root::arm(self.instance, &mut self.keeper)? {
            self.send(&Event::Armed { took_us: (now_ns() - begin) / 1000 });
        }
        Ok(())
    }

    /// Keeps `count` standbys from now on, and returns when they are ready.
    fn standbys(&mut self, count: u32) -> Result<Reply, Failure> {
        if count as usize > MOST_STANDBYS {
            let text =
                format!("{count} standbys were asked for, at most {MOST_STANDBYS} can be kept");
            return Err(plain(libc::EINVAL, &text));
        }
        self.arm().map_err(|error| failure(&error))?;
        self.keeper.set_target(count);
        self.pump(|instance| instance.engine().ready() >= count as usize).map(|()| Reply::Done)
    }

    /// A fork that the host asks for.
    fn branch(&mut self, children: u32) -> Result<Reply, Failure> {
        let doorbell_ns = now_ns();
        let instance = self.instance;
        self.arm().map_err(|error| failure(&error))?;
        let forked = instance.fork_children(None, children, doorbell_ns, |_| self.rest(), || ());
        match forked {
            Ok(identities) => {
                let uuid = |identity: &crate::fork::Identity| Uuid::from_bytes(identity.uuid);
                Ok(Reply::Forked { children: identities.iter().map(uuid).collect() })
            }
            Err(error) => {
                instance.engine().forget_waiting();
                Err(failure(&error))
            }
        }
    }

    /// Looks after things until `done`.
    fn pump(&mut self, done: impl Fn(&Instance) -> bool) -> Result<(), Failure> {
        let end = Instant::now() + PATIENCE;
        let failures = self.instance.engine().prewarm_failures();
        loop {
            let wait = self.look();
            if done(self.instance) {
                return Ok(());
            }
            // On its own line: the guard would live as long as the block otherwise.
            let failed = self.instance.engine().prewarm_failure_after(self.instance, failures);
            if let Some(error) = failed {
                self.instance.engine().forget_waiting();
                return Err(failure(&error));
            }
            if Instant::now() > end || self.gone {
                return Err(Failure {
                    step: Some(Step::Prewarm),
                    errno: libc::ETIMEDOUT,
                    message: "no standby was ready in time".into(),
                });
            }
            self.sleep(wait);
        }
    }

    /// One turn of looking after things while a request waits.
    fn rest(&mut self) {
        let wait = self.look();
        self.sleep(wait);
    }

    /// Sleeps until the bell rings, for 20 ms at most.
    fn sleep(&self, wait: Option<Duration>) {
        let link = self.instance.link();
        let mut fds = [
            PollFd::new(link.bell(), PollFlags::IN),
            PollFd::new(self.keeper.lines(), PollFlags::IN),
        ];
        let most = Duration::from_millis(20);
        let time = wait.map_or(most, |wait| wait.min(most));
        let time = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
        poll(&mut fds, Some(&time)).unwrap_or(0);
        link.clear_bell();
        self.keeper.clear_lines();
    }

    fn stats(&mut self) -> Stats {
        let zygote = self.instance.zygote_pid();
        let engine = self.instance.engine();
        let (forks, failed) = engine.counts();
        Stats {
            backing: self.instance.mapping().kind(),
            forks: forks.into(),
            failed,
            standbys: u32::try_from(engine.ready()).unwrap_or(0),
            preparing: u32::try_from(self.keeper.preparing()).unwrap_or(0),
            rounds: self.keeper.rounds,
            synced_pages: self.keeper.synced_pages,
            pending_pages: u32::try_from(engine.pending()).unwrap_or(0),
            zygote_pid: zygote.map_or(0, |pid| pid.as_raw_nonzero().get()),
            cpu_ns: sys::cpu_ns(),
            zygote_cpu_ns: zygote.map_or(0, sys::cpu_ns_of),
            prewarm_ns: self.keeper.prewarm_ns,
        }
    }
}

fn failure(error: &ForkError) -> Failure {
    Failure { step: Some(error.step), errno: error.cause.errno(), message: chain(error) }
}

fn plain(errno: i32, message: &str) -> Failure {
    Failure { step: None, errno, message: message.into() }
}
