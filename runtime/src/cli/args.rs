//! What can be typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use ebpf_loader::Level;
use runtime::kvm::DirtyMode;
use runtime::memory::BackingKind;

use super::error::EXIT_CODES;
use super::parse::{self, Prefix};

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "runtime", version, about = "fork() for a running KVM virtual machine", after_help = EXIT_CODES)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a machine in the foreground, and serve the other verbs for it and its descendants
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Make an initramfs for Linux guests from a directory, a tar archive or an OCI layout
    #[command(after_help = EXIT_CODES)]
    Image(ImageArgs),
    /// List instances as a tree of parents and children
    Ps(PsArgs),
    /// Fork a running instance; prints the UUIDs of the children
    Branch(BranchArgs),
    /// Run a program in a Linux instance, and end with its exit code
    Exec(ExecArgs),
    /// Print what an instance has said on its console
    Logs(LogsArgs),
    /// Show the console of an instance, and type on it; Ctrl-] leaves it
    Console(ConsoleArgs),
    /// Copy a file to or from a Linux instance; a path in it is written INSTANCE:PATH
    Cp(CpArgs),
    /// Wait until an instance has ended; prints its exit code and ends with it
    #[command(after_help = EXIT_CODES)]
    Wait(InstanceArgs),
    /// End an instance with an exit code; its descendants run on
    Stop(StopArgs),
    /// End an instance at once, its process included; its descendants run on
    Kill(KillArgs),
    /// Stop the vCPUs of an instance
    Pause(InstanceArgs),
    /// Let the vCPUs of a paused instance go on
    Resume(InstanceArgs),
    /// Show counters of an instance, and what the probes in the kernel counted of it
    Stats(StatsArgs),
    /// Show one fork of an instance, stage by stage, with every page fault in it
    Trace(TraceArgs),
    /// Tell whether this host can fork machines, and what would make it faster
    #[command(after_help = EXIT_CODES)]
    Doctor(DoctorArgs),
    /// Print a completion script, for example for ~/.bashrc: source <(runtime completions bash)
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Arguments of `run`.
///
/// The instance runs until its guest exits; then `run` waits for the descendants that still run,
/// and ends with the exit code of the first instance. Ctrl-C and SIGTERM end all of them. Console
/// output comes on stdout, with the first 8 digits of the instance's UUID before each line as soon
/// as there is more than one instance; everything else comes on stderr.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch that is typed")]
pub struct RunArgs {
    /// Run a bare-metal guest: a static ELF (see guest/bare/ABI.md), or the bundled one, which
    /// waits for programs
    // Empty: the bundled one. Not a path to clap, which takes no empty ones.
    #[arg(long, value_name = "FILE.elf", required_unless_present_any = ["kernel", "image"], num_args = 0..=1,
          default_missing_value = "", conflicts_with = "kernel")]
    pub bare: Option<OsString>,
    /// Boot Linux with this image: a directory, a tar archive or an OCI layout, of which an image is
    /// made and kept, or one that `runtime image` made
    #[arg(long, value_name = "SOURCE", conflicts_with = "bare")]
    pub image: Option<PathBuf>,
    /// Boot this kernel, a bzImage or vmlinux for x86-64, with its console on ttyS0 [default with
    /// --image: the one that `./just` fetches]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// An initramfs for it, in place of an image: a guest without an agent
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with_all = ["bare", "image"])]
    pub initrd: Option<PathBuf>,
    /// Its command line; with --image it follows what an image needs
    #[arg(long, value_name = "TEXT", conflicts_with = "bare")]
    pub cmdline: Option<String>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse::memory)]
    pub memory: u32,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub vcpus: u32,
    /// Pages below guest memory; falls back to 4k, with a note, where this host has no others
    #[arg(long, value_enum, default_value_t = BackingArg::Small)]
    pub backing: BackingArg,
    /// How dirty pages are tracked; the ring falls back to the bitmap where there is none
    #[arg(long, value_enum, default_value_t = DirtyArg::Ring)]
    pub dirty: DirtyArg,
    /// Children kept ready; 0: the next fork makes them, and takes milliseconds longer
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=128))]
    pub standbys: u32,
    /// Do not keep standbys up to date while the guest runs: each fork copies every page written
    /// since the last one
    #[arg(long)]
    pub no_sync: bool,
    /// Do not let standbys run ahead once to warm them up
    #[arg(long)]
    pub no_rehearse: bool,
    /// Do not use real-time priority during a fork
    #[arg(long)]
    pub no_realtime: bool,
    /// Processors for vCPU threads, such as 0,2-3 [default: all]
    #[arg(long, value_name = "LIST", value_parser = parse::processors)]
    pub vcpu_cpus: Option<u64>,
    /// Processors for children during a fork [default: all]
    #[arg(long, value_name = "LIST", value_parser = parse::processors)]
    pub standby_cpus: Option<u64>,
    /// What probes in the kernel measure, where they are allowed
    #[arg(long, value_enum, default_value_t = ProbesArg::On)]
    pub probes: ProbesArg,
    /// End all descendants when the first instance has ended
    #[arg(long)]
    pub kill_children: bool,
    /// Type what comes on stdin on the console of the first instance (/dev/hvc0). A terminal is the
    /// guest's then, Ctrl-C too; Ctrl-] ends all instances
    #[arg(short, long, conflicts_with = "bare")]
    pub interactive: bool,
    /// Print one JSON object for each event on stdout: started, console, forked, note, exited
    #[arg(long)]
    pub json: bool,
    /// How the image is run.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// What the image runs, in place of its own command
    #[arg(last = true, requires = "image", conflicts_with = "bare", value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Arguments of `run` that go to the agent in an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct GuestArgs {
    /// A variable of the environment of what the image runs
    #[arg(short, long, requires = "image", conflicts_with = "bare", value_name = "NAME=VALUE", value_parser = parse::variable)]
    pub env: Vec<(String, String)>,
    /// Where in the guest it runs [default: as the image says, or /]
    #[arg(short, long, requires = "image", conflicts_with = "bare", value_name = "PATH")]
    pub workdir: Option<String>,
    /// Name of the guest; {uuid} in it is the instance's UUID, another one in each child
    #[arg(long, requires = "image", conflicts_with = "bare", value_name = "NAME")]
    pub hostname: Option<String>,
    /// Forks that may wait for another one in the guest; more are refused with EBUSY [default: 16]
    #[arg(long, requires = "image", conflicts_with = "bare", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub fork_queue: Option<u32>,
    /// For how long a child that has stopped is kept in /uk/libukp/vm [default: 60]
    #[arg(long, requires = "image", conflicts_with = "bare", value_name = "SECONDS")]
    pub retention: Option<u32>,
    /// Freeze what the image runs across forks, so that none of it runs in a child that is not
    /// another machine yet
    #[arg(long, requires = "image", conflicts_with = "bare")]
    pub freeze: bool,
}

/// Arguments of `image`.
///
/// The image has the runtime's agent as /.uk/init, with what it needs, besides the source; boot it
/// with rdinit=/.uk/init. It is kept, and found again as long as nothing that went into it changes.
/// Prints its path.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// A directory, a tar archive (as `docker export` writes it; plain, gzip or zstd) or the
    /// directory of an OCI layout
    pub source: PathBuf,
    /// Where to write the image [default: the cache folder]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// A folder with vmlinuz and its modules [default: what ./just has fetched]
    #[arg(long, value_name = "DIR")]
    pub kernel_dir: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    /// What the guest runs; instead of an OCI image's own command, behind its entry point
    #[arg(last = true)]
    pub command: Vec<String>,
}

/// Arguments of `ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Show instances that have ended too
    #[arg(short, long)]
    pub all: bool,
    /// Print UUIDs only
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print a JSON array of instances
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `branch`.
#[derive(Debug, Args)]
pub struct BranchArgs {
    /// The parent: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Number of children; all of them are made, or none
    #[arg(short = 'n', long = "children", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=128))]
    pub children: u32,
    /// Fork a Linux guest without an agent, too: its child has the same random numbers, names and
    /// connections
    #[arg(long)]
    pub unaware: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Hand stdin on to the program
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the program a terminal, and hand on what is typed
    #[arg(short, long)]
    pub tty: bool,
    /// A variable of the program's environment
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse::variable)]
    pub env: Vec<(String, String)>,
    /// Where in the guest it runs [default: where the workload does]
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Arguments of `logs`.
///
/// The last 128 KiB of each instance are kept, also of those that have ended lately, as long as the
/// `run` lives that owns it.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the instance has ended
    #[arg(short, long)]
    pub follow: bool,
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Print JSON objects
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `console`.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
}

/// Arguments of `cp`.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// From where: a path, or INSTANCE:PATH
    pub from: String,
    /// To where: a path, or INSTANCE:PATH; with a / at its end: into that folder
    pub to: String,
}

/// Arguments of verbs that take an instance alone.
#[derive(Debug, Args)]
pub struct InstanceArgs {
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Go on until the instance ends or Ctrl-C
    #[arg(long)]
    pub live: bool,
    /// Time between two looks, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, requires = "live",
          value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    pub interval: u64,
    /// Print a JSON object; with --live one per line
    #[arg(long)]
    pub json: bool,
    /// Print what a Prometheus scrape wants
    #[arg(long, conflicts_with_all = ["json", "live"])]
    pub prometheus: bool,
}

/// Arguments of `trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Make a fork from the host, instead of waiting for the guest's next one
    #[arg(short, long)]
    pub branch: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Exit code of an instance that did not end by itself; the default is that of SIGTERM
    #[arg(long, value_name = "N", default_value_t = 143)]
    pub code: u8,
    /// How long the workload of a Linux instance may take to end by itself once it got SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub drain: u32,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `kill`.
#[derive(Debug, Args)]
pub struct KillArgs {
    /// The instance: its UUID, or as much of its beginning as is unambiguous
    pub instance: Prefix,
    /// Its descendants too
    #[arg(short, long)]
    pub recursive: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// [`BackingKind`] as typed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BackingArg {
    /// Pages of 4 KiB
    #[value(name = "4k")]
    Small,
    /// Transparent huge pages
    Thp,
    /// Pages of 2 MiB from the hugetlb pool
    Hugetlb,
}

impl From<BackingArg> for BackingKind {
    fn from(arg: BackingArg) -> Self {
        match arg {
            BackingArg::Small => Self::Small,
            BackingArg::Thp => Self::Thp,
            BackingArg::Hugetlb => Self::Hugetlb,
        }
    }
}

/// [`Level`] as typed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProbesArg {
    /// Nothing
    Off,
    /// Page faults and waits for a processor
    On,
    /// Exits of guests and their faults too; forks take some percent longer
    All,
}

impl From<ProbesArg> for Level {
    fn from(arg: ProbesArg) -> Self {
        match arg {
            ProbesArg::Off => Self::Off,
            ProbesArg::On => Self::On,
            ProbesArg::All => Self::All,
        }
    }
}

/// [`DirtyMode`] as typed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DirtyArg {
    /// Cost by pages written
    Ring,
    /// Cost by memory size
    Bitmap,
}

impl From<DirtyArg> for DirtyMode {
    fn from(arg: DirtyArg) -> Self {
        match arg {
            DirtyArg::Ring => Self::Ring,
            DirtyArg::Bitmap => Self::Bitmap,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn bare_may_stand_without_a_file() {
        let parse = |words: &[&str]| Arguments::try_parse_from(["runtime"].iter().chain(words));
        let bare = |words: &[&str]| match parse(words).map(|arguments| arguments.verb) {
            Ok(Verb::Run(args)) => args.bare,
            _ => None,
        };
        assert_eq!(bare(&["run", "--bare"]), Some("".into()));
        assert_eq!(bare(&["run", "--bare", "--vcpus", "2"]), Some("".into()));
        assert_eq!(bare(&["run", "--bare", "x.elf"]), Some("x.elf".into()));
        assert!(parse(&["run"]).is_err());
        assert!(parse(&["run", "--kernel", "vmlinuz", "--initrd", "initrd"]).is_ok());
        assert!(parse(&["run", "--kernel", "vmlinuz", "--bare"]).is_err());
        assert!(parse(&["run", "--bare", "--initrd", "initrd"]).is_err());
        assert!(parse(&["run", "--bare", "--memory", "512"]).is_err());
    }
}
