//! An instance's memory as a file: written until it is armed, never after.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use memfd::{FileSeal, Memfd};

use super::{BackingKind, Mapping, MemoryError};
use crate::sys::SysError;

/// State of an image that its instance still writes to.
#[derive(Debug)]
pub struct Writable;

/// State of an image that nobody can write to any more.
#[derive(Debug)]
pub struct Sealed;

/// A memfd that holds guest RAM.
#[derive(Debug)]
pub struct Image<State> {
    file: OwnedFd,
    bytes: u64,
    kind: BackingKind,
    state: PhantomData<State>,
}

/// An image that could not be sealed.
#[derive(Debug)]
pub struct Unsealed {
    /// As it was.
    pub image: Image<Writable>,
    /// Why not.
    pub error: MemoryError,
}

impl<State> Image<State> {
    /// Its backing.
    #[must_use]
    pub fn kind(&self) -> BackingKind {
        self.kind
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file, to be handed to another process.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Image<Writable> {
    /// An image of zeroes.
    ///
    /// # Errors
    ///
    /// Why this host cannot give the memory, see [`super::Backing::check`].
    pub fn new(kind: BackingKind, bytes: u64) -> Result<Self, MemoryError> {
        let backing = kind.backing();
        backing.check(bytes)?;
        let fail =
            |what| move |source| MemoryError::Memfd { what, requested_mib: bytes >> 20, source };
        let memfd = backing.memfd().create("guest-ram").map_err(|error| match error {
            memfd::Error::Create(source)
            | memfd::Error::AddSeals(source)
            | memfd::Error::GetSeals(source) => fail("creating")(source),
        })?;
        memfd.as_file().set_len(bytes).map_err(fail("sizing"))?;
        Ok(Self { file: memfd.into_file().into(), bytes, kind, state: PhantomData })
    }

    /// Maps the image so that writes reach the file.
    ///
    /// # Errors
    ///
    /// What mmap(2) says.
    pub fn map_shared(&self) -> Result<Mapping, MemoryError> {
        Mapping::shared(self.file.as_fd(), self.bytes, self.kind)
    }

    /// Seals the image. Fails while a writable shared mapping is left: [`Mapping::make_private`]
    /// turns the instance's own into a private one first.
    ///
    /// # Errors
    ///
    /// `EBUSY` if somebody can still write to it. The image comes back, and can be sealed later.
    pub fn seal(self) -> Result<Image<Sealed>, Unsealed> {
        match self.add_seals() {
            Ok(()) => Ok(Image {
                file: self.file,
                bytes: self.bytes,
                kind: self.kind,
                state: PhantomData,
            }),
            Err(source) => {
                let requested_mib = self.bytes >> 20;
                let error = MemoryError::Memfd { what: "sealing", requested_mib, source };
                Err(Unsealed { image: self, error })
            }
        }
    }

    fn add_seals(&self) -> std::io::Result<()> {
        let memfd = Memfd::try_from_fd(self.file.try_clone()?)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
        memfd
            .add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealWrite])
            .and_then(|()| memfd.add_seal(FileSeal::SealSeal))
            .map_err(|error| match error {
                memfd::Error::Create(source)
                | memfd::Error::AddSeals(source)
                | memfd::Error::GetSeals(source) => source,
            })
    }

    /// Takes the image as sealed by another process.
    ///
    /// # Errors
    ///
    /// `EPERM` if it is not.
    pub fn adopt_sealed(self) -> Result<Image<Sealed>, MemoryError> {
        Image::adopt(self.file, self.bytes, self.kind)
    }
}

impl Image<Sealed> {
    /// Takes over a sealed image that another process sent.
    ///
    /// # Errors
    ///
    /// `EPERM` if the file is not sealed: it could still change below a private mapping.
    pub fn adopt(file: OwnedFd, bytes: u64, kind: BackingKind) -> Result<Self, MemoryError> {
        let seals =
            rustix::fs::fcntl_get_seals(&file).map_err(SysError::new("fcntl(F_GET_SEALS)"))?;
        if !seals.contains(rustix::fs::SealFlags::WRITE) {
            return Err(SysError::new("adopting an unsealed image")(rustix::io::Errno::PERM).into());
        }
        Ok(Self { file, bytes, kind, state: PhantomData })
    }

    /// Maps the image copy-on-write.
    ///
    /// # Errors
    ///
    /// What mmap(2) says; `ENOMEM` for hugetlb if the pool cannot back every private page.
    pub fn map_private(&self) -> Result<Mapping, MemoryError> {
        Mapping::private(self.file.as_fd(), self.bytes, self.kind)
    }
}
