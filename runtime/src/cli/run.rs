//! `run`: a machine in the foreground.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ebpf_loader::Level;
use guest_image::Config;
use runtime::boot::linux::{self, Linux};
use runtime::boot::{self, BootError};
use runtime::device::virtio;
use runtime::kvm::{DirtyMode, Host};
use runtime::memory::{BackingKind, Image, RamLayout, guest_ram};
use runtime::owner::{Owner, OwnerError};
use runtime::proto::{CRASHED, InstanceConfig};
use runtime::sys;
use rustix::process::{Resource, Rlimit, Signal, getpid, getrlimit, kill_process, setrlimit};
use uuid::Uuid;

use super::args::{GuestArgs, RunArgs};
use super::console::Format;
use super::error::{CliError, exit_code};
use super::image;
use super::keyboard::Keyboard;
use super::log::Logs;
use super::parse;
use super::screen::Screen;
use super::serve::Server;
use super::signals::Signals;
use super::stats::shortfall;
use super::wire::short;

/// How long an instance may be waited for.
const FOREVER: Duration = Duration::from_secs(u64::MAX / 4);
/// How often children that are born late are looked for.
const LOOK: Duration = Duration::from_millis(5);

pub fn run(args: &RunArgs) -> Result<u8, CliError> {
    let config = config(args)?;
    let host = Host::open()?;
    check_guest(&config)?;
    let signals = Signals::block()?;
    raise_descriptor_limit();
    let format = if args.json { Format::Json } else { Format::Text };
    let screen = Arc::new(Screen::start(format)?);
    if config.dirty == DirtyMode::Ring && !host.has_dirty_ring() {
        screen.note("this KVM has no dirty ring; using the bitmap");
    }
    drop(host);
    let logs = Arc::new(Logs::default());
    let (listener, keeping) = (screen.clone(), logs.clone());
    let owner = Owner::forwarding(Box::new(move |uuid, event| {
        keeping.event(uuid, event);
        listener.event(uuid, event);
    }))?;
    let owner = Arc::new(owner);
    let level = args.probes.into();
    let probes_off = match level {
        Level::Off => Some("the machine was started with --probes off".to_owned()),
        level => owner.probe(level).err().map(|error| sys::chain(&error)),
    };
    if let (Some(off), true) = (&probes_off, level != Level::Off) {
        screen.note(&format!("probes are off: {off}"));
    }
    let server = Server::start(&owner, logs, probes_off)?;
    let bundled = config.bare.as_os_str().is_empty() && !config.is_linux();
    let watched = |root| {
        let what = if bundled { " with the bundled guest, which waits for programs" } else { "" };
        screen.note(&format!("{root} runs{what}"));
        if let Some(less) = owner.probes(|probes| shortfall(&probes.shortfalls())).flatten() {
            screen.note(&less);
        }
        let keyboard = args.interactive.then(|| keyboard(&owner, root)).transpose()?;
        if let Some(note) = keyboard.as_ref().and_then(Keyboard::note) {
            screen.note(note);
        }
        Ok((root, watch(&owner, root, &signals, args.kill_children)))
    };
    let starts = || start(&owner, config);
    let result = match signals.during(|| owner.shutdown(), starts) {
        (_, Some(signal)) => Ok((Uuid::nil(), Some(signal))),
        (started, None) => started.and_then(watched),
    };
    if matches!(result, Ok((_, Some(_)))) {
        // Whoever reads our output may never go on, and who hears of the end is not to wait for it.
        screen.hurry();
    }
    let end = || {
        owner.shutdown();
        owner.settle();
        let result = result.and_then(|(root, signal)| match signal {
            Some(signal) => Ok(exit_code(128 + signal)),
            None => outcome(&owner, root),
        });
        server.finish();
        remove_folder(&owner);
        screen.finish();
        match screen.lost() {
            Some(why) if matches!(result, Ok(0)) => {
                Err(CliError::internal(format!("cannot write the output: {why}")))
            }
            _ => result,
        }
    };
    signals.during(|| screen.hurry(), end).0
}

/// What is typed goes to the first instance; Ctrl-] ends all, like Ctrl-C where that is not typed.
fn keyboard(owner: &Arc<Owner>, root: Uuid) -> Result<Keyboard, CliError> {
    let owner = owner.clone();
    // It arrives: it is this process that waits for it.
    let leave = || kill_process(getpid(), Signal::INT).unwrap_or(());
    Keyboard::start(move |bytes| owner.type_in(root, bytes).ok(), leave)
}

/// What Linux is booted from.
#[derive(Default)]
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    tail: Vec<u8>,
    cmdline: String,
}

/// Longest command, as the image has it: it travels in a message.
const COMMAND_MOST: usize = 16 * 1024;

/// Kernel parameters of an image: where its console is, that it says what is wrong and no more, that
/// a panic is its end, that there is no PCI (it complains otherwise), and who is its first process.
const IMAGE_CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off rdinit=/.uk/init";

fn guest(args: &RunArgs) -> Result<Guest, CliError> {
    let Some(source) = &args.image else {
        return Ok(Guest {
            kernel: args.kernel.clone().unwrap_or_default(),
            initrd: args.initrd.clone().unwrap_or_default(),
            tail: Vec::new(),
            cmdline: args.cmdline.clone().unwrap_or_else(|| "console=ttyS0".to_owned()),
        });
    };
    let kernel = match &args.kernel {
        Some(kernel) => kernel.clone(),
        None => guest_image::unpacked(&guest_image::kernel_dir()?.join("vmlinuz"))?,
    };
    let (initrd, config) = image::ready(source)?;
    let tail = match adapted(args, config) {
        Some(config) => guest_image::config_segment(&config)?,
        None => Vec::new(),
    };
    if tail.len() > COMMAND_MOST {
        let text = format!("the command is longer than {COMMAND_MOST} bytes; put it into a file");
        return Err(CliError::usage(text));
    }
    let more = args.cmdline.iter().map(|more| format!(" {more}"));
    let cmdline = std::iter::once(IMAGE_CMDLINE.to_owned()).chain(more).collect();
    Ok(Guest { kernel, initrd, tail, cmdline })
}

/// What the image says that it runs, with what was typed instead; nothing if nothing was.
fn adapted(args: &RunArgs, config: Option<Config>) -> Option<Config> {
    let RunArgs { command, guest, .. } = args;
    if command.is_empty() && *guest == GuestArgs::default() {
        return None;
    }
    let mut config = config.unwrap_or_else(|| Config::command(Vec::new()));
    if !command.is_empty() {
        config.argv.clone_from(command);
    }
    config.env.extend(guest.env.iter().cloned());
    if let Some(workdir) = &guest.workdir {
        config.cwd.clone_from(workdir);
    }
    config.hostname = guest.hostname.clone().or(config.hostname);
    config.fork_queue = guest.fork_queue.or(config.fork_queue);
    config.retention_s = guest.retention.or(config.retention_s);
    config.freeze |= guest.freeze;
    Some(config)
}

fn config(args: &RunArgs) -> Result<InstanceConfig, CliError> {
    let available = sys::affinity();
    for mask in [args.vcpu_cpus, args.standby_cpus].into_iter().flatten() {
        if mask & !available != 0 {
            let (asked, there) = (parse::shown(mask & !available), parse::shown(available));
            let text = format!("processor {asked} cannot be used here; there are: {there}");
            return Err(CliError::usage(text));
        }
    }
    let guest = guest(args)?;
    Ok(InstanceConfig {
        memory_mib: args.memory,
        vcpus: args.vcpus,
        backing: args.backing.into(),
        dirty: args.dirty.into(),
        standbys: args.standbys,
        sync: !args.no_sync,
        rehearse: !args.no_rehearse,
        realtime: !args.no_realtime,
        vcpu_cpus: args.vcpu_cpus.unwrap_or(0),
        standby_cpus: args.standby_cpus.unwrap_or(0),
        bare: args.bare.clone().unwrap_or_default().into(),
        kernel: guest.kernel,
        initrd: guest.initrd,
        initrd_tail: guest.tail,
        cmdline: guest.cmdline,
        ..InstanceConfig::default()
    })
}

/// Loads the guest into memory that is thrown away, so that a wrong file is told before anything is
/// started.
fn check_guest(config: &InstanceConfig) -> Result<(), CliError> {
    let linux = config.is_linux();
    if !linux && config.bare.as_os_str().is_empty() {
        return Ok(());
    }
    let layout = RamLayout::new(config.memory_mib);
    let internal = |error: &dyn std::error::Error| CliError::internal(sys::chain(error));
    let mapping = Image::new(BackingKind::Small, layout.bytes())
        .and_then(|image| image.map_shared())
        .map_err(|error| internal(&error))?;
    let ram = guest_ram(&mapping, &layout).map_err(|error| internal(&error))?;
    let loaded = if linux {
        let InstanceConfig { kernel, initrd, initrd_tail, cmdline, .. } = config;
        let devices = virtio::Bus::devices_of(config);
        linux::load(
            &Linux { kernel, initrd, initrd_tail, cmdline, devices },
            &ram,
            &layout,
            config.vcpus,
        )
        .map(drop)
    } else {
        boot::load(&read(&config.bare)?, &ram, &layout).map(drop)
    };
    match loaded {
        Ok(()) => Ok(()),
        Err(error @ (BootError::Read { .. } | BootError::Kernel { .. })) => {
            Err(CliError::usage(sys::chain(&error)))
        }
        Err(error @ (BootError::NotBare { .. } | BootError::Segment { .. })) => {
            let path = config.bare.display();
            Err(CliError::usage(format!("cannot run {path}: {}", sys::chain(&error))))
        }
        Err(error) => Err(internal(&error)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    let cannot = |why: &dyn std::fmt::Display| {
        CliError::usage(format!("cannot read {}: {why}", path.display()))
    };
    let kind = std::fs::metadata(path).map_err(|error| cannot(&error))?.file_type();
    if !kind.is_file() && !kind.is_dir() {
        // The instance reads it once more.
        return Err(cannot(&"it is no regular file; write what it gives to one"));
    }
    std::fs::read(path).map_err(|error| cannot(&error))
}

/// An owner has two descriptors for each instance.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // The hard limit is always allowed; `doctor` tells if it is low.
    setrlimit(Resource::Nofile, raised).unwrap_or(());
}

fn start(owner: &Owner, config: InstanceConfig) -> Result<Uuid, CliError> {
    owner.start(config).map_err(|error| match error {
        OwnerError::Ended { why, .. } => {
            let why = why.unwrap_or_else(|| "its process ended".into());
            CliError::internal(format!("the machine could not be started: {why}"))
        }
        error => CliError::internal(sys::chain(&error)),
    })
}

/// Waits until no process of the tree is left, or for a signal.
fn watch(owner: &Arc<Owner>, root: Uuid, signals: &Signals, kill_children: bool) -> Option<i32> {
    let lifeline = owner.lifeline(root)?;
    if kill_children {
        let owner = owner.clone();
        // Ends with the process.
        std::thread::spawn(move || kill_descendants(&owner, root));
    }
    signals.wait_or_hang_up(&*lifeline)
}

fn kill_descendants(owner: &Owner, root: Uuid) {
    if owner.wait_exit(root, FOREVER).is_err() {
        return;
    }
    loop {
        for uuid in owner.alive() {
            // It has ended meanwhile, otherwise.
            owner.kill(uuid).unwrap_or(());
        }
        std::thread::sleep(LOOK);
    }
}

/// All processes are gone. What they said last is heard to its end, however slowly it is read; a signal
/// has the screen in a hurry.
fn outcome(owner: &Owner, root: Uuid) -> Result<u8, CliError> {
    let internal = |error: OwnerError| CliError::internal(sys::chain(&error));
    let (code, why) = owner.wait_exit(root, FOREVER).map_err(internal)?;
    owner
        .wait_until("end of all", FOREVER, |alive| alive.is_empty().then_some(()))
        .map_err(internal)?;
    let byte = exit_code(code);
    match why {
        Some(why) if code == CRASHED => {
            Err(CliError::instance(byte, format!("the guest of {} crashed: {why}", short(root))))
        }
        Some(why) => {
            Err(CliError::instance(byte, format!("{} ended with code {code}: {why}", short(root))))
        }
        None => Ok(byte),
    }
}

/// Threads that answer hold the owner, so it is not dropped when `run` returns.
fn remove_folder(owner: &Owner) {
    let folder: PathBuf = owner.folder().into();
    drop(std::fs::remove_dir_all(folder));
}
