//! Makes an initramfs for a Linux guest from a directory, a tar archive or an OCI layout.
//!
//! ```text
//!   directory ─┐
//!   tar ───────┼─> Tree: names, modes, where the bytes lie ─┬─> cpio ─> kept by the hash of all
//!   OCI layers ┘   the agent, modules, /.uk/config.json ────┘           that went into it
//! ```
//!
//! Nothing of a source is unpacked: a name in it is never a name on the host. The same source makes
//! the same image. Owners, modes and times (in seconds) are kept; extended attributes are not, the
//! format has no place for them.
//!
//! | module | what |
//! | --- | --- |
//! | `tree`, `path` | the file system in memory, and what it takes for a name |
//! | `directory`, `archive`, `decompress`, `oci` | sources |
//! | `content` | where bytes lie until they are written |
//! | `cpio` | the image's format |
//! | `kernel`, `own` | what is added |
//! | `unpack` | the kernel inside a bzImage |
//! | `cache` | images and kernels that are kept |
//!
//! An image is large, because it is not compressed: a kernel below an emulator would take seconds to
//! decompress it.
#![warn(clippy::print_stdout)]

mod archive;
mod cache;
mod content;
mod cpio;
mod decompress;
mod directory;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod kernel;
mod oci;
mod own;
mod path;
mod tree;
mod unpack;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use archive::Style;
use cache::{Facts, NewFile};
use content::{Spool, Stamp};
use kernel::Module;
use tree::{Kind, ROOT, Tree};

pub use cache::folder as cache_dir;
pub use error::{EntryError, ImageError};
pub use kernel::kernel_dir;
pub use own::{Config, config_segment};
pub use unpack::unpacked;

/// Begins every key: to be changed with what an image contains, or how.
const FORM: &[u8] = b"ukp image 1\n";

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of the host.
    Directory(PathBuf),
    /// A tar archive, perhaps compressed.
    Tar(PathBuf),
    /// An OCI image layout.
    Oci(PathBuf),
}

impl Source {
    /// Looks what `path` is.
    ///
    /// # Errors
    ///
    /// If it is not there, or neither file nor directory.
    pub fn find(path: &Path) -> Result<Self, ImageError> {
        let found = fs::metadata(path).map_err(ImageError::io("look at", path))?;
        let path_owned = path.to_owned();
        if found.is_file() {
            return Ok(Self::Tar(path_owned));
        }
        if !found.is_dir() {
            let found = "neither a file nor a directory";
            return Err(ImageError::Kind { path: path_owned, found });
        }
        let layout = path.join("oci-layout").is_file() && path.join("index.json").is_file();
        Ok(if layout { Self::Oci(path_owned) } else { Self::Directory(path_owned) })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Tar(path) | Self::Oci(path) => path,
        }
    }
}

/// What an image is made for.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Where to write it; among the images that are kept, if `None`.
    pub output: Option<&'a Path>,
    /// Where images are kept; beside the kernel of guests, if `None`.
    pub cache_dir: Option<&'a Path>,
    /// Kernel and modules; those of [`kernel_dir`], if `None`.
    pub kernel_dir: Option<&'a Path>,
    /// What to run. Instead of an OCI image's own command, and behind its entry point.
    pub command: Option<&'a [String]>,
    /// As much as its files may have together.
    pub limit_bytes: u64,
    /// Is told again and again how far the work is.
    pub progress: &'a dyn Fn(Progress),
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            output: None,
            cache_dir: None,
            kernel_dir: None,
            command: None,
            limit_bytes: 16 << 30,
            progress: &|_| {},
        }
    }
}

/// How far the work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The source will be read, so many bytes of it.
    Source(u64),
    /// So many bytes of it were read.
    Read(u64),
    /// The image is written; so many bytes more of it.
    Written(u64),
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// Where it lies.
    pub path: PathBuf,
    /// The kernel that its modules are for.
    pub kernel: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Its checksum.
    pub blake3: String,
    /// Names in it.
    pub entries: u64,
    /// Paths of its modules in the guest, in the order in which they are loaded.
    pub modules: Vec<String>,
    /// What it runs, if it says so.
    pub config: Option<Config>,
    /// As whom its makers want it to run, if not as root. The agent does not know this.
    pub user: Option<String>,
    /// Whether it was there already.
    pub cached: bool,
}

/// Makes an image of `source`, or finds the one that was made before.
///
/// # Errors
///
/// What is wrong with the source, the kernel folder, or the place for the image; then nothing is
/// left of it.
pub fn build(source: &Source, options: &Options<'_>) -> Result<Built, ImageError> {
    let dir = options.kernel_dir.map_or_else(kernel_dir, |dir| Ok(dir.to_owned()))?;
    let kernel = kernel::vmlinuz(&dir)?;
    let modules = kernel::modules(&dir)?;
    let opened = Opened::open(source, options)?;
    let config = opened.config(options.command);
    let (path, keep) = if let Some(path) = options.output {
        (path.to_owned(), false)
    } else {
        let key = key(&opened, &modules, config.as_ref(), options)?;
        (cache::image(options.cache_dir, &key)?, true)
    };
    let kept = if keep { cache::look(&path)? } else { None };
    let cached = kept.is_some();
    let facts = match kept {
        Some(facts) => facts,
        None => make(opened, source.path(), &path, modules, config, options)?,
    };
    if keep && !cached {
        cache::note(&path, &facts)?;
    }
    let Facts { bytes, blake3, entries, modules, config, user } = facts;
    Ok(Built { path, kernel, bytes, blake3, entries, modules, config, user, cached })
}

/// A source of which enough was read to know it again.
enum Opened<'a> {
    Directory(Tree),
    Tar(&'a Path, Arc<File>, Stamp),
    Oci(oci::Image),
}

impl<'a> Opened<'a> {
    fn open(source: &'a Source, options: &Options<'_>) -> Result<Self, ImageError> {
        Ok(match source {
            Source::Directory(path) => Self::Directory(directory::tree(path)?),
            Source::Tar(path) => {
                let file = File::open(path).map_err(ImageError::io("open", path))?;
                let found = file.metadata().map_err(ImageError::io("look at", path))?;
                (options.progress)(Progress::Source(found.len()));
                Self::Tar(path, Arc::new(file), Stamp::of(&found))
            }
            Source::Oci(path) => {
                let image = oci::Image::open(path)?;
                (options.progress)(Progress::Source(image.len_bytes()));
                Self::Oci(image)
            }
        })
    }

    fn config(&self, command: Option<&[String]>) -> Option<Config> {
        match self {
            Self::Oci(image) => Some(image.config(command)),
            _ => command.map(|command| Config::command(command.to_vec())),
        }
    }

    /// Adds to `hasher` what the tree depends on.
    fn hash(&self, hasher: &mut blake3::Hasher, options: &Options<'_>) -> Result<(), ImageError> {
        match self {
            Self::Directory(tree) => {
                hasher.update(b"directory\n");
                cpio::write(tree, options.limit_bytes, &mut |bytes| {
                    hasher.update(bytes);
                    Ok(())
                })?;
            }
            Self::Tar(path, file, _) => {
                hasher.update(b"tar\n");
                hasher.update_reader(&**file).map_err(ImageError::io("read", path))?;
            }
            Self::Oci(image) => {
                hasher.update(b"oci\n").update(image.digest.as_bytes());
            }
        }
        Ok(())
    }

    fn tree(self, spool: &mut Spool, told: &dyn Fn(u64)) -> Result<Tree, ImageError> {
        match self {
            Self::Directory(tree) => Ok(tree),
            Self::Tar(path, file, _) => {
                let mut tree = Tree::new();
                archive::unpack(path, &file, Style::Whole, &mut tree, spool, told)?;
                Ok(tree)
            }
            Self::Oci(image) => image.tree(spool, told),
        }
    }
}

/// A hash of everything that goes into an image.
fn key(
    source: &Opened<'_>,
    modules: &[Module],
    config: Option<&Config>,
    options: &Options<'_>,
) -> Result<blake3::Hash, ImageError> {
    let mut hasher = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    part(FORM);
    part(own::AGENT);
    for Module { file, bytes } in modules {
        part(file.as_bytes());
        part(bytes);
    }
    part(&config.map(config_segment).transpose()?.unwrap_or_default());
    source.hash(&mut hasher, options)?;
    Ok(hasher.finalize())
}

/// What `docker save` and the like write has the wrong form to be run, and would be taken without
/// a word.
fn refuse_saved(tree: &Tree, path: &Path) -> Result<(), ImageError> {
    let has = |name: &str| {
        let slot = tree.children(ROOT).and_then(|children| children.get(name.as_bytes()));
        let node = slot.and_then(|slot| tree.node(slot.node));
        matches!(node.map(|node| &node.kind), Some(Kind::File(_)))
    };
    if has("oci-layout") || has("manifest.json") && has("repositories") {
        return Err(ImageError::Saved { path: path.to_owned() });
    }
    Ok(())
}

fn make(
    source: Opened<'_>,
    origin: &Path,
    path: &Path,
    modules: Vec<Module>,
    config: Option<Config>,
    options: &Options<'_>,
) -> Result<Facts, ImageError> {
    let user = match &source {
        Opened::Oci(image) => image.user().map(str::to_owned),
        _ => None,
    };
    let names: Vec<_> = modules.iter().map(|module| format!("/.uk/m/{}", module.file)).collect();
    let watched = match &source {
        Opened::Tar(_, file, stamp) => Some((Arc::clone(file), *stamp)),
        _ => None,
    };
    let mut spool = Spool::new(cache::folder_of(path), options.limit_bytes);
    let mut tree = source.tree(&mut spool, &|count| (options.progress)(Progress::Read(count)))?;
    refuse_saved(&tree, origin)?;
    own::add(&mut tree, origin, modules, config.as_ref())?;
    let mut hasher = blake3::Hasher::new();
    let mut new = NewFile::create(path)?;
    let written = cpio::write(&tree, options.limit_bytes, &mut |bytes| {
        hasher.update(bytes);
        (options.progress)(Progress::Written(bytes.len() as u64));
        new.write(bytes)
    })?;
    if let Some((file, stamp)) = watched {
        let now = file.metadata().map_err(ImageError::io("look at", origin))?;
        if Stamp::of(&now) != stamp {
            return Err(ImageError::Changed { path: origin.to_owned() });
        }
    }
    new.keep()?;
    Ok(Facts {
        bytes: written.len_bytes,
        blake3: hasher.finalize().to_hex().to_string(),
        entries: written.entries,
        modules: names,
        config,
        user,
    })
}
