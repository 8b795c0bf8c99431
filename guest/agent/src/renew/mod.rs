//! Becoming another machine: what has to be done in a child before its fork returns there.
//!
//! In this order: the kernel's random numbers, the wall clock, the generation file, the machine id,
//! the host name. If a step fails the child may not live, for it could be taken for its parent.

pub mod clock;
mod random;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::doorbell::{Doorbell, Identity};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("child could not be made unique, step \"{step}\"")]
pub struct RenewError {
    /// Which.
    pub step: &'static str,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Makes this machine another one.
pub trait Renew: Send + Sync {
    /// Takes on the identity. Returns only if nothing of the parent's is left.
    ///
    /// # Errors
    ///
    /// A step failed; the machine has to be stopped.
    fn renew(&self, identity: &Identity) -> Result<(), RenewError>;
}

/// The steps of a real machine.
pub struct Machine {
    doorbell: Arc<dyn Doorbell>,
    random: File,
    generation: PathBuf,
    id: PathBuf,
    /// What is mounted over the machine id where that cannot be written to.
    own_id: PathBuf,
    hostname: Option<String>,
}

impl Machine {
    /// Everything that can be made ready is: random device opened, generation 0 written.
    ///
    /// # Errors
    ///
    /// The random device or the generation file cannot be had.
    pub fn new(
        doorbell: Arc<dyn Doorbell>,
        hostname: Option<String>,
        run: &Path,
        machine_id: &Path,
    ) -> io::Result<Self> {
        let random = OpenOptions::new().write(true).open("/dev/urandom")?;
        let generation = run.join("generation");
        replace(&generation, b"0\n", 0o644)?;
        // A name without the UUID is the same in all machines, and set once.
        let hostname = hostname.filter(|name| name.contains(UUID));
        let own_id = run.join("machine-id");
        Ok(Self { doorbell, random, generation, id: machine_id.into(), own_id, hostname })
    }
}

/// Stands for the UUID in a host name.
const UUID: &str = "{uuid}";

impl Renew for Machine {
    fn renew(&self, identity: &Identity) -> Result<(), RenewError> {
        let step = |step| move |source| RenewError { step, source };
        random::credit(&self.random, &identity.entropy).map_err(step("credit entropy"))?;
        random::reseed(&self.random).map_err(step("reseed the random number generator"))?;
        clock::set(&*self.doorbell).map_err(step("set the wall clock"))?;
        let generation = format!("{}\n", identity.generation);
        replace(&self.generation, generation.as_bytes(), 0o644)
            .map_err(step("write the generation"))?;
        let id = format!("{}\n", identity.uuid.simple());
        write_machine_id(&self.id, &self.own_id, id.as_bytes())
            .map_err(step("write the machine id"))?;
        if let Some(hostname) = &self.hostname {
            set_hostname(hostname, &identity.uuid.to_string())
                .map_err(step("set the host name"))?;
        }
        Ok(())
    }
}

/// Sets the host name from a template.
///
/// # Errors
///
/// The kernel does not take it: it is longer than 64 bytes, or this is not root.
pub fn set_hostname(template: &str, uuid: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(template.replace(UUID, uuid).as_bytes())?)
}

/// Puts a new file in the place of `path`: whoever watches the folder sees it moved there, and who
/// reads sees the old contents or the new ones.
fn replace(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(mode).open(&new)?;
    file.write_all(contents)?;
    fs::rename(new, path)
}

/// A machine id that is not there is not made: the image wants it so. Over one that cannot be written
/// to `own` is mounted.
fn write_machine_id(path: &Path, own: &Path, id: &[u8]) -> io::Result<()> {
    use io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    let mut file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == NotFound => return Ok(()),
        Err(error) if [PermissionDenied, ReadOnlyFilesystem].contains(&error.kind()) => {
            fs::write(own, id)?;
            return Ok(rustix::mount::mount_bind(own, path)?);
        }
        Err(error) => return Err(error),
    };
    // In place, since it may be mounted over; old and new ones are equally long.
    file.write_all(id)?;
    file.set_len(u64::try_from(id.len()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("guest-agent-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn the_machine_id_is_rewritten_if_it_is_there() {
        let folder = folder("machine-id");
        let path = folder.join("machine-id");
        write_machine_id(&path, &folder.join("own"), b"new\n").unwrap();
        assert!(!path.exists(), "one that is not there is not made");
        fs::write(&path, "something longer\n").unwrap();
        write_machine_id(&path, &folder.join("own"), b"new\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_generation_is_replaced_as_a_whole() {
        let folder = folder("generation");
        let path = folder.join("generation");
        replace(&path, b"1\n", 0o644).unwrap();
        let mut old = File::open(&path).unwrap();
        replace(&path, b"22\n", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "22\n");
        assert_eq!(io::read_to_string(&mut old).unwrap(), "1\n");
        fs::remove_dir_all(folder).unwrap();
    }
}
