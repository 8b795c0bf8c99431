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
mod owner;
mod pressure;
mod random;
mod state;
mod vcpus;

/// Tests at the same time unless asked otherwise: each has instances of its own that want a
/// processor.
const THREADS: usize = 2;

/// Tests that are known to fail: defects that are open. They run when asked for by name with
/// `UKP_KNOWN=1`, and are listed at every run.
const KNOWN: &[(&str, &str)] = &[
    (
        "state::all_vcpus_go_on_in_parent_and_child",
        "in a child forked from inside, a vCPU that had not rung the doorbell may stand still",
    ),
    (
        "faults::step_prewarm_fails",
        "a standby killed while it is made is reported as `take`, not as `prewarm`",
    ),
];

fn main() {
    runtime::owner::instance_if_asked();
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
    ];
    let all = std::env::var_os("UKP_KNOWN").is_some();
    let known =
        |case: &tests::case::Case| KNOWN.iter().find(|(name, _)| !all && *name == case.name());
    for (name, defect) in KNOWN.iter().filter(|_| !all) {
        eprintln!("known to fail, not run: direct::{name}: {defect}");
    }
    let cases = areas.into_iter().flatten().filter(|case| known(case).is_none());
    let trials = cases.map(|case| case.needs(missing.clone()).into_trial("direct")).collect();
    libtest_mimic::run(&arguments, trials).exit();
}
