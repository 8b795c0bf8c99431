//! Tests of the fork engine on this machine's KVM, with the bundled bare guest.
//!
//! Names are `direct::area::what_holds`. Without `/dev/kvm` every test is listed as ignored, with
//! the reason. `UKP_SOAK=1` runs the long ones in full.

use libtest_mimic::Arguments;
use tests::host;

mod faults;
mod forks;
mod hugetlb;
mod identity;
mod idle;
mod isolation;
mod leaks;
mod limits;
mod metrics;
mod owner;
mod pressure;
mod probes;
mod random;
mod state;
mod vcpus;

/// Tests at the same time unless asked otherwise: each has instances of its own that want a
/// processor.
const THREADS: usize = 2;

fn main() {
    runtime::owner::instance_if_asked();
    probes::load_and_wait_if_asked();
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    let missing = host::without_kvm();
    let areas = [
        isolation::cases(),
        random::cases(),
        pressure::cases(),
        state::cases(),
        vcpus::cases(),
        identity::cases(),
        forks::cases(),
        faults::cases(),
        limits::cases(),
        hugetlb::cases(),
        idle::cases(),
        leaks::cases(),
        owner::cases(),
        probes::cases(),
        metrics::cases(),
    ];
    let cases = areas.into_iter().flatten();
    let trials = cases.map(|case| case.needs(missing.clone()).into_trial("direct")).collect();
    libtest_mimic::run(&arguments, trials).exit();
}
