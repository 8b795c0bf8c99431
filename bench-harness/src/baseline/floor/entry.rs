//! One exit and one entry of a vCPU that runs all the time.

use std::time::Duration;

use runtime::kvm::{DirtyMode, Host, Machine};
use runtime::memory::{Image, RamLayout, Sealed};
use runtime::sys::now_ns;

use super::super::{BaselineError, Figure, Rounds, guest, us_since};
use super::FloorConfig;

const SAMPLES: usize = 1000;
const WARM_UP: usize = 50;

/// One round of `KVM_RUN`: entry, two instructions, exit. With registers handed over in the
/// `kvm_run` page and dirty pages logged, as in an instance.
pub(super) fn exit_and_entry(
    host: &Host,
    image: &Image<Sealed>,
    config: &FloorConfig,
    limit: Duration,
) -> Result<Figure, BaselineError> {
    let layout = RamLayout::new(config.memory_mib);
    let mapping = image.map_private()?;
    let machine = guest::machine(layout, config.vcpus, DirtyMode::Ring);
    let (machine, mut vcpus, log) = Machine::new(host, machine, &mapping, true)?;
    let mut samples = Vec::with_capacity(SAMPLES);
    if let Some(vcpu) = vcpus.first_mut() {
        guest::boot(vcpu)?;
        for counts in Rounds::new(WARM_UP, SAMPLES, limit) {
            let start = now_ns();
            guest::run(vcpu)?;
            if counts {
                samples.push(us_since(start));
            }
        }
    }
    // The machine before the mapping below it.
    drop((log, vcpus, machine));
    Figure::of("exit and entry", &samples)
}
