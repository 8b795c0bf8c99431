//! What every image has besides its source: the agent, modules, what to run, places to mount on.
//!
//! ```text
//!   /.uk/init          the agent; the kernel is told rdinit=/.uk/init
//!   /.uk/ukp           the same, as a command
//!   /.uk/modules       paths of modules, in the order in which they are loaded
//!   /.uk/m/*.ko        the modules
//!   /.uk/config.json   what to run
//! ```

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::cpio;
use crate::error::{EntryError, ImageError};
use crate::kernel::Module;
use crate::tree::{Kind, Meta, Tree};

/// The agent, built with this crate.
pub static AGENT: &[u8] = include_bytes!(env!("UKP_AGENT"));

/// Where the configuration lies.
const CONFIG: &str = ".uk/config.json";

/// What a guest runs, and how its agent does that. What is left out is as the agent has it
/// (`guest/agent/README.md`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// The directory that it starts in.
    pub cwd: String,
    /// Name of the machine; `{uuid}` in it is the instance's UUID.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Forks that may wait for another.
    #[serde(default)]
    pub fork_queue: Option<u32>,
    /// How long a child that has stopped is kept, in seconds.
    #[serde(default)]
    pub retention_s: Option<u32>,
    /// Whether all of it is frozen across forks.
    #[serde(default)]
    pub freeze: bool,
}

impl Config {
    /// A command with nothing around it.
    #[must_use]
    pub fn command(argv: Vec<String>) -> Self {
        Self { argv, cwd: "/".to_owned(), ..Self::default() }
    }

    fn json(&self) -> Vec<u8> {
        let Self { argv, env, cwd, hostname, fork_queue, retention_s, freeze } = self;
        // Unlike `to_vec`, this has no way to fail.
        let mut json = serde_json::json!({ "argv": argv, "env": env, "cwd": cwd });
        let mut more = |name: &str, value: serde_json::Value| json[name] = value;
        if let Some(name) = hostname {
            more("hostname", name.as_str().into());
        }
        if let Some(forks) = fork_queue {
            more("fork_queue", (*forks).into());
        }
        if let Some(seconds) = retention_s {
            more("retention_s", (*seconds).into());
        }
        if *freeze {
            more("freeze", true.into());
        }
        json.to_string().into_bytes()
    }
}

/// An archive with `/.uk/config.json` alone. Behind an image in memory it stands for what the image
/// has there, so that one image runs many commands; its length is a multiple of 512.
///
/// # Errors
///
/// None that can be met: a configuration is smaller than what the format takes.
pub fn config_segment(config: &Config) -> Result<Vec<u8>, ImageError> {
    cpio::single(CONFIG, config.json())
}

/// Puts everything into `tree` that a guest needs besides `origin`.
pub fn add(
    tree: &mut Tree,
    origin: &Path,
    modules: Vec<Module>,
    config: Option<&Config>,
) -> Result<(), ImageError> {
    tree.take_over();
    let mut put = |path: &str, mode, kind| {
        let added = tree.add(path.as_bytes(), Meta::root(mode), kind);
        added.map(drop).map_err(ImageError::entry(origin, path.as_bytes()))
    };
    put(".uk", 0o755, directory())?;
    put(".uk/m", 0o755, directory())?;
    put(".uk/init", 0o755, file(AGENT))?;
    put(".uk/ukp", 0o777, Kind::Symlink(b"init".as_slice().into()))?;
    let mut list = String::new();
    for Module { file: name, bytes } in modules {
        list.extend(["/.uk/m/", &name, "\n"]);
        put(&format!(".uk/m/{name}"), 0o644, file(bytes))?;
    }
    put(".uk/modules", 0o644, file(list.into_bytes()))?;
    if let Some(config) = config {
        put(CONFIG, 0o644, file(config.json()))?;
    }
    places(tree).map_err(|(path, error)| ImageError::entry(origin, path.as_bytes())(error))
}

fn directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

fn file(bytes: impl Into<Cow<'static, [u8]>>) -> Kind {
    Kind::File(Content::Bytes(bytes.into()))
}

/// Directories that the agent mounts on, or that programs take for granted.
fn places(tree: &mut Tree) -> Result<(), (&'static str, EntryError)> {
    let wanted = [
        ("proc", 0o555, true),
        ("sys", 0o555, true),
        ("dev", 0o755, true),
        ("uk", 0o755, true),
        ("uk/libukp", 0o555, true),
        ("run", 0o755, false),
        ("tmp", 0o1777, false),
        ("etc", 0o755, false),
    ];
    for (path, mode, mounted) in wanted {
        let failed = |error| (path, error);
        let found = tree.find(path.as_bytes()).map_err(failed)?;
        match found.and_then(|id| tree.node(id)).map(|node| &node.kind) {
            None => {
                tree.add(path.as_bytes(), Meta::root(mode), directory()).map_err(failed)?;
            }
            Some(Kind::Directory(_)) => {}
            // `/run` is a link in some images. What is mounted on has to be there itself.
            Some(Kind::Symlink(_)) if !mounted => {}
            Some(_) => return Err(failed(EntryError::Through { through: format!("/{path}") })),
        }
    }
    console(tree).map_err(|error| ("dev/console", error))
}

/// The kernel opens `/dev/console` for init before anything is mounted. An exported container has
/// an empty file there, which would take the place of the kernel's own node.
fn console(tree: &mut Tree) -> Result<(), EntryError> {
    let found = tree.find(b"dev/console")?.and_then(|id| tree.node(id)).map(|node| &node.kind);
    if !matches!(found, Some(Kind::Device { block: false, .. })) {
        let console = Kind::Device { block: false, major: 5, minor: 1 };
        tree.add(b"dev/console", Meta::root(0o600), console)?;
    }
    Ok(())
}
