//! An OCI image layout on disk.
//!
//! ```text
//!   index.json ──> (index ──>) manifest ──> config: what to run
//!                                      └──> layers, lowest first
//! ```
//!
//! Each arrow is a digest, which is checked before anything of the blob is believed. What is taken
//! is the image for Linux on x86-64, of which there must be one. (OCI image format specification
//! 1.1: image-layout, descriptor, manifest, config.)

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::archive::{self, Style};
use crate::content::{Content, Spool, Stamp};
use crate::error::ImageError;
use crate::own::Config;
use crate::tree::Tree;

/// As large as a manifest may be.
const MOST_JSON: u64 = 4 << 20;
/// As many indexes and manifests as are looked at.
const MOST_DESCRIPTORS: usize = 256;
/// As many as container tools take.
const MOST_LAYERS: usize = 512;

#[derive(Debug, Deserialize)]
struct Marker {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

#[derive(Debug, Deserialize)]
struct ImageConfig {
    #[serde(flatten)]
    platform: Platform,
    config: Option<Execution>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Execution {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
}

/// One image of a layout.
#[derive(Debug)]
pub struct Image {
    root: PathBuf,
    /// Digest of the manifest, which names everything else.
    pub digest: String,
    layers: Vec<Descriptor>,
    execution: Execution,
}

impl Image {
    /// Reads index, manifest and config.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let marker_path = root.join("oci-layout");
        let marker: Marker = parse(&marker_path, &read(&marker_path)?)?;
        if !marker.version.starts_with("1.") {
            return Err(wrong(&marker_path, format!("version {} is not known", marker.version)));
        }
        let chosen = choose(root)?;
        let (path, manifest): (_, Manifest) = json(root, &chosen)?;
        if manifest.layers.len() > MOST_LAYERS {
            let count = manifest.layers.len();
            return Err(wrong(&path, format!("it has {count} layers; {MOST_LAYERS} are taken")));
        }
        for layer in &manifest.layers {
            if !is_layer(&layer.media_type) {
                let kind = layer.media_type.escape_debug();
                return Err(wrong(&path, format!("it has a layer of the kind {kind}, not tar")));
            }
        }
        let (path, config): (_, ImageConfig) = json(root, &manifest.config)?;
        if !config.platform.is_ours() {
            let Platform { os, architecture } = config.platform;
            let found = format!("{os}/{architecture}");
            return Err(wrong(&path, format!("the image is for {}", found.escape_debug())));
        }
        let execution = config.config.unwrap_or_default();
        let root = root.to_owned();
        Ok(Self { root, digest: chosen.digest, layers: manifest.layers, execution })
    }

    /// Bytes of all layers, as they lie there.
    pub fn len_bytes(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }

    /// As whom its makers want it to run, if not as root.
    pub fn user(&self) -> Option<&str> {
        let root = ["", "0", "root", "0:0", "root:root"];
        self.execution.user.as_deref().filter(|user| !root.contains(user))
    }

    /// What it runs: its entry point, and behind that `command` or else its own.
    pub fn config(&self, command: Option<&[String]>) -> Config {
        let own = &self.execution;
        let command = command.or(own.cmd.as_deref()).unwrap_or_default();
        let argv = own.entrypoint.iter().flatten().chain(command).cloned().collect();
        let pair = |text: &String| match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (text.clone(), String::new()),
        };
        let env: BTreeMap<_, _> = own.env.iter().flatten().map(pair).collect();
        let cwd = own.working_dir.clone().filter(|path| !path.is_empty());
        Config { argv, env, cwd: cwd.unwrap_or_else(|| "/".to_owned()), ..Config::default() }
    }

    /// All layers on top of each other.
    pub fn tree(&self, spool: &mut Spool, told: &dyn Fn(u64)) -> Result<Tree, ImageError> {
        let mut tree = Tree::new();
        for layer in &self.layers {
            let path = blob(&self.root, layer)?;
            verify(&path, layer)?;
            let file = Arc::new(File::open(&path).map_err(ImageError::io("open", &path))?);
            tree.next_layer();
            archive::unpack(&path, &file, Style::Layer, &mut tree, spool, told)?;
        }
        Ok(tree)
    }
}

/// The one manifest for this platform, in indexes within indexes.
fn choose(root: &Path) -> Result<Descriptor, ImageError> {
    let path = root.join("index.json");
    let top: Index = parse(&path, &read(&path)?)?;
    let mut ahead = top.manifests;
    let mut found: Vec<Descriptor> = Vec::new();
    let mut seen = 0;
    while let Some(next) = ahead.pop() {
        seen += 1;
        if seen > MOST_DESCRIPTORS {
            return Err(wrong(&path, format!("it names more than {MOST_DESCRIPTORS} manifests")));
        }
        if next.media_type.ends_with(".image.index.v1+json")
            || next.media_type.ends_with(".manifest.list.v2+json")
        {
            ahead.extend(json::<Index>(root, &next)?.1.manifests);
        } else if next.platform.as_ref().is_none_or(Platform::is_ours)
            && !found.iter().any(|known| known.digest == next.digest)
        {
            found.push(next);
        }
    }
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (None, _) => Err(wrong(&path, "it has no image for linux/amd64".to_owned())),
        (Some(_), more) => Err(wrong(
            &path,
            format!("it has {} images for linux/amd64; export the wanted one alone", more + 1),
        )),
    }
}

fn is_layer(media_type: &str) -> bool {
    let kind = media_type
        .strip_prefix("application/vnd.oci.image.layer.")
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs."));
    let end = kind.and_then(|kind| kind.split_once("tar")).map(|(_, end)| end);
    matches!(end, Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

/// A blob that is JSON, with its digest checked.
fn json<T: DeserializeOwned>(root: &Path, from: &Descriptor) -> Result<(PathBuf, T), ImageError> {
    let path = blob(root, from)?;
    let text = read(&path)?;
    let found = format!("{:x}", HexDigest(&Sha256::digest(&text)));
    compare(&path, from, &found)?;
    let value = parse(&path, &text)?;
    Ok((path, value))
}

fn verify(path: &Path, from: &Descriptor) -> Result<(), ImageError> {
    let found = fs::metadata(path).map_err(ImageError::io("look at", path))?;
    if found.is_file() && found.len() < from.size {
        return Err(ImageError::CutOff { path: path.to_owned() });
    }
    let content = Content::Named { path: path.to_owned(), stamp: Stamp::of(&found) };
    let mut hasher = Sha256::new();
    content.read(&mut |bytes| {
        hasher.update(bytes);
        Ok(())
    })?;
    compare(path, from, &format!("{:x}", HexDigest(&hasher.finalize())))
}

fn compare(path: &Path, from: &Descriptor, found: &str) -> Result<(), ImageError> {
    if from.digest.strip_prefix("sha256:") == Some(found) {
        return Ok(());
    }
    Err(ImageError::Digest { path: path.to_owned(), found: found.to_owned() })
}

struct HexDigest<'a>(&'a [u8]);

impl std::fmt::LowerHex for HexDigest<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// Where a blob lies. A digest that is not just hexadecimal digits could lead anywhere.
fn blob(root: &Path, from: &Descriptor) -> Result<PathBuf, ImageError> {
    let digits = from.digest.strip_prefix("sha256:").unwrap_or_default();
    let plain = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if digits.len() != 64 || !plain {
        let digest: String = from.digest.chars().take(80).collect();
        let why = format!("`{}` is not a digest of the kind sha256", digest.escape_debug());
        return Err(wrong(&root.join("index.json"), why));
    }
    Ok(root.join("blobs/sha256").join(digits))
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let found = fs::metadata(path).map_err(ImageError::io("look at", path))?;
    if !found.is_file() || found.len() > MOST_JSON {
        return Err(wrong(path, format!("it is not a file of at most {MOST_JSON} bytes")));
    }
    fs::read(path).map_err(ImageError::io("read", path))
}

fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(text).map_err(|error| wrong(path, error.to_string()))
}

fn wrong(path: &Path, why: String) -> ImageError {
    ImageError::Layout { path: path.to_owned(), why }
}
