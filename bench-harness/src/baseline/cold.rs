//! The same virtual machine made from nothing, in this process, and done well.
//!
//! What is timed: a fresh private mapping of an image that is there already, VM, memslots, interrupt
//! controllers, vCPUs with their CPUID, registers, and the run to the first exit. The memslots come
//! before interrupt controllers and vCPUs, which saves 5 to 7 ms on Linux 6.18 (SRCU); no dirty
//! tracking. The other side of that order, the slow end of the machine, is timed apart.

use std::time::Duration;

use runtime::kvm::{DirtyMode, Host, Machine, MachineConfig};
use runtime::memory::{BackingKind, Image, RamLayout, Sealed};
use runtime::sys::now_ns;

use super::{BaselineError, Rounds, guest, us_between, us_since};

/// What is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColdConfig {
    /// Guest RAM in MiB, at least 8.
    pub memory_mib: u32,
    /// Number of vCPUs; the first is run.
    pub vcpus: u32,
    /// What the image is made of.
    pub backing: BackingKind,
    /// Most samples.
    pub samples: usize,
    /// Most time for all of it; five samples are taken whatever the time.
    pub limit: Duration,
}

impl Default for ColdConfig {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            vcpus: 1,
            backing: BackingKind::Small,
            samples: 50,
            limit: Duration::from_secs(2),
        }
    }
}

/// Samples in µs, in the order in which they were taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cold {
    /// From nothing but the image to the first exit.
    pub create_us: Vec<f64>,
    /// From there until vCPUs, machine and mapping are gone.
    pub teardown_us: Vec<f64>,
}

/// Machines that are made before the first that counts.
const WARM_UP: usize = 2;

/// Makes machines of one kind from nothing but an image.
#[derive(Debug)]
pub struct Maker {
    host: Host,
    image: Image<Sealed>,
    machine: MachineConfig,
}

impl Maker {
    /// What does not count: the image.
    ///
    /// # Errors
    ///
    /// What this host lacks.
    pub fn new(memory_mib: u32, vcpus: u32, backing: BackingKind) -> Result<Self, BaselineError> {
        let layout = RamLayout::new(memory_mib.max(RamLayout::MIN_MIB));
        Ok(Self {
            host: Host::open()?,
            image: guest::image(backing, layout)?,
            machine: guest::machine(layout, vcpus, DirtyMode::Bitmap),
        })
    }

    /// Makes one and ends it: how long either took, in µs.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn make(&self) -> Result<[f64; 2], BaselineError> {
        let start = now_ns();
        let mapping = self.image.map_private()?;
        let (machine, mut vcpus, log) = Machine::new(&self.host, self.machine, &mapping, false)?;
        let vcpu = vcpus.first_mut().ok_or(BaselineError::NoSamples { what: "a machine" })?;
        guest::boot(vcpu)?;
        guest::run(vcpu)?;
        let exit = now_ns();
        drop((log, vcpus, machine, mapping));
        Ok([us_between(start, exit), us_since(exit)])
    }
}

/// Makes machines one after another.
///
/// # Errors
///
/// What this host lacks, or the step that failed.
pub fn measure(config: &ColdConfig) -> Result<Cold, BaselineError> {
    let maker = Maker::new(config.memory_mib, config.vcpus, config.backing)?;
    let mut cold = Cold::default();
    for counts in Rounds::new(WARM_UP, config.samples, config.limit) {
        let [create, teardown] = maker.make()?;
        if counts {
            cold.create_us.push(create);
            cold.teardown_us.push(teardown);
        }
    }
    Ok(cold)
}
