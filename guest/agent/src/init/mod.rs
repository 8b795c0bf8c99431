//! PID 1.
//!
//! ```text
//!  mounts ─> console ─> modules, hvc0 ─> config ─> /uk/libukp ─> server, host ─> READY ─> workload
//!                                                                                      │ ends
//!                                                                           EXIT <─────┘
//! ```
//!
//! READY comes before the workload, so that this can fork from its first instruction on.

mod config;
mod ending;
mod modules;
mod mounts;
mod workload;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use guest_wire::{AGENT_PORT, HOST_CID, HOST_PORT, WorkloadState};
use uuid::Uuid;
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::console::{chain, say};
use crate::control;
use crate::doorbell::Doorbell;
use crate::forker::Forker;
use crate::freezer::Freezer;
use crate::fs::Service;
use crate::host::Client;
use crate::reaper::Reaper;
use crate::renew::{self, Renew};
use crate::serve::Server;
use config::Config;
pub use ending::Ending;

/// Where the agent and its files lie.
const HOME: &str = "/.uk";
/// Where the file system is mounted.
pub const LIBUKP: &str = "/uk/libukp";
/// What programs may want to read about this machine.
const RUN: &str = "/run/ukp";
/// Where control groups are mounted.
const CONTROL_GROUPS: &str = "/sys/fs/cgroup";
/// Exit code of a machine in which something essential failed.
const FAILED: u8 = 120;
/// Exit code of a child that could not be made unique.
const NOT_UNIQUE: u8 = 121;

/// Something essential that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
struct InitError {
    what: String,
    #[source]
    source: io::Error,
}

/// Says what could not be done.
fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> InitError {
    move |source| InitError { what: what.into(), source }
}

/// Runs the machine, which `doorbell` gives the doorbell of. Never returns.
pub fn run(doorbell: fn() -> io::Result<Arc<dyn Doorbell>>) -> ! {
    mounts::mount_all();
    if let Err(error) = mounts::open_console(mounts::CONSOLE) {
        // There may be nobody to read it.
        say(format_args!("no console: {error}"));
    }
    modules::load_all(&Path::new(HOME).join("modules"));
    // A machine may have none: then it stays as it is.
    mounts::open_console(mounts::FAST_CONSOLE).unwrap_or_default();
    let ending = Ending::default();
    match start(doorbell, &ending) {
        Ok(reaper) => reaper.reap(),
        Err(error) => {
            say(chain(&error));
            ending.end(FAILED)
        }
    }
}

/// Starts everything, the workload last.
fn start(
    doorbell: fn() -> io::Result<Arc<dyn Doorbell>>,
    ending: &Ending,
) -> Result<Arc<Reaper>, InitError> {
    let doorbell = doorbell().map_err(cannot("use the doorbell"))?;
    ending.use_doorbell(doorbell.clone());
    let config = Config::read(&Path::new(HOME).join("config.json"))?;
    let freezer = config.freeze.then(|| Freezer::new(Path::new(CONTROL_GROUPS))).transpose();
    let freezer = freezer.map_err(cannot("make a control group that can be frozen"))?;
    let service = Service::new(config.fork_queue, config.retention());
    serve_libukp(&config, &service, &doorbell, freezer.clone(), ending)?;
    let host = connect(&config, &service)?;
    service.set_host(Arc::new(host));

    let reaper = Reaper::of_init();
    let workload = Arc::new(Mutex::new(WorkloadState::Starting));
    let server = Arc::new(Server {
        service: service.clone(),
        reaper: reaper.clone(),
        env: config.environment(),
        cwd: config.cwd.clone(),
        group: freezer.as_ref().map(Freezer::processes),
        workload: workload.clone(),
        libukp: LIBUKP.into(),
        requests: AtomicUsize::new(0),
    });
    listen(server)?;
    control::listen(Path::new(control::SOCKET), service, workload.clone(), ending.clone())
        .map_err(cannot(format!("listen on {}", control::SOCKET)))?;
    ring_ready(&doorbell)?;
    let group = freezer.as_ref().map(Freezer::processes);
    workload::start(&config, &reaper, &workload, ending, group)?;
    Ok(reaper)
}

/// Mounts the file system and starts the threads behind it.
fn serve_libukp(
    config: &Config,
    service: &Arc<Service>,
    doorbell: &Arc<dyn Doorbell>,
    freezer: Option<Freezer>,
    ending: &Ending,
) -> Result<(), InitError> {
    let (run, mounted) = (Path::new(RUN), Path::new(LIBUKP));
    for folder in [run, mounted] {
        fs::create_dir_all(folder).map_err(cannot(format!("make {}", folder.display())))?;
    }
    if let Some(hostname) = config.hostname.as_ref().filter(|name| !name.contains("{uuid}"))
        && let Err(error) = renew::set_hostname(hostname, "")
    {
        say(format_args!("cannot set the host name {hostname:?}: {error}"));
    }
    let id = Path::new("/etc/machine-id");
    let machine = renew::Machine::new(doorbell.clone(), config.hostname.clone(), run, id);
    let machine: Arc<dyn Renew> =
        Arc::new(machine.map_err(cannot("make ready what a child renews"))?);
    let session = crate::fs::mount(service.clone(), mounted)
        .map_err(cannot(format!("mount {}", mounted.display())))?;
    // It is mounted as long as the machine runs.
    std::mem::forget(session);
    let ending = ending.clone();
    let fatal = Box::new(move || ending.end_at_once(NOT_UNIQUE));
    let doorbell = doorbell.clone();
    Forker { service: service.clone(), doorbell, renew: machine, freezer, fatal }
        .start(mounted)
        .map_err(cannot("start the thread that forks"))?;
    let keeper = service.clone();
    let thread = std::thread::Builder::new().name("ukp-house".into());
    thread.spawn(move || keeper.keep_house()).map_err(cannot("start the housekeeper"))?;
    Ok(())
}

/// Keeps a connection to the host. Without vsock there is none, and the agent does without.
fn connect(config: &Config, service: &Arc<Service>) -> Result<Client, InitError> {
    let stream = || {
        let stream = VsockStream::connect_with_cid_port(HOST_CID, HOST_PORT)?;
        stream.as_fd().try_clone_to_owned()
    };
    let (service, template) = (service.clone(), config.hostname.clone());
    let template = template.filter(|name| name.contains("{uuid}"));
    let welcome = move |uuid: Uuid| {
        let agrees = service.welcomed(uuid);
        if let Some(template) = template.as_ref().filter(|_| agrees)
            && let Err(error) = renew::set_hostname(template, &uuid.to_string())
        {
            say(format_args!("cannot set the host name {template:?}: {error}"));
        }
        agrees
    };
    Client::start(Box::new(stream), Box::new(welcome)).map_err(cannot("start the host's client"))
}

/// Listens for the host's requests.
fn listen(server: Arc<Server>) -> Result<(), InitError> {
    let listener = match VsockListener::bind_with_cid_port(VMADDR_CID_ANY, AGENT_PORT) {
        Ok(listener) => listener,
        Err(error) => {
            say(format_args!("no vsock, so no exec, cp and ping: {error}"));
            return Ok(());
        }
    };
    let accept = move || {
        loop {
            let owned = listener.accept().and_then(|(stream, peer)| {
                // Where there is a loopback, every program of the guest can connect.
                let host = peer.cid() == HOST_CID;
                host.then(|| stream.as_fd().try_clone_to_owned()).transpose()
            });
            match owned {
                Ok(Some(stream)) => server.accept(stream),
                Ok(None) => {}
                Err(error) => {
                    say(format_args!("a connection of the host was lost: {error}"));
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("ukp-listen".into());
    thread.spawn(accept).map(drop).map_err(cannot("start the thread that listens"))
}

/// Sets the clock, which a boot without a clock of its own leaves behind, and says that this machine is
/// ready. On a thread of its own: this one starts the workload, which would inherit the ports.
fn ring_ready(doorbell: &Arc<dyn Doorbell>) -> Result<(), InitError> {
    let doorbell = doorbell.clone();
    let ring = move || {
        // A root is nobody's child: it is itself, whatever its clock says.
        if let Err(error) = renew::clock::set(&*doorbell) {
            say(format_args!("the wall clock stays as it is: {error}"));
        }
        doorbell.ready()
    };
    let rung = std::thread::spawn(ring).join();
    let rung = rung.unwrap_or_else(|_| Err(io::Error::other("its thread has panicked")));
    rung.map_err(cannot("say that this machine is ready"))
}
