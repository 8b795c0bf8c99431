//! The laboratory on this host's KVM: a tiny scenario of each kind from end to end, and a run that
//! must be void.
//!
//! Instances are this same program, so it has a `main` of its own.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs::{self, OpenOptions};
use std::process::ExitCode;
use std::time::Instant;

use bench_harness::baseline::BaselineError;
use bench_harness::baseline::cold::{self, ColdConfig};
use bench_harness::baseline::floor::{DirtyPages, Floor, FloorConfig, Standby};
use bench_harness::lab::{EngineLab, Options};
use bench_harness::scenario::{Catalogue, Scenario};
use bench_harness::session::{Lab, LabError, ScenarioRun, Silent};
use libtest_mimic::{Arguments, Failed, Trial};
use runtime::memory::BackingKind;

const SCENARIOS: &str = r#"
[[scenario]]
name = "dirty"
about = "100 random dirty pages"
memory_mib = 32
forks = 6
warmup = 2
dirty = { pages = 100, mode = "random" }

[[scenario]]
name = "same"
about = "the same pages, announced, in open loop"
memory_mib = 32
forks = 4
warmup = 1
announce_us = 500
interval_us = 20000
dirty = { pages = 50, mode = "same" }

[[scenario]]
name = "busy"
about = "pages at a rate"
memory_mib = 32
forks = 3
warmup = 1
rate_pages_per_second = 10000

[[scenario]]
name = "vcpus"
about = "two vCPUs"
memory_mib = 32
vcpus = 2
forks = 4
warmup = 1

[[scenario]]
name = "depth"
about = "three deep"
kind = "depth"
memory_mib = 32
depth = 3
forks = 2
warmup = 1
dirty = { pages = 20, mode = "random" }

[[scenario]]
name = "children"
about = "three alive"
kind = "children"
memory_mib = 32
keep_children = 3
cycles = 2
forks = 2
warmup = 1

[[scenario]]
name = "reference"
about = "another machine is forked in turn"
memory_mib = 64
reference_mib = 32
forks = 3
warmup = 1

[[scenario]]
name = "fanout"
about = "three at once"
kind = "fanout"
memory_mib = 32
children_per_fork = 3
forks = 2
warmup = 1

[[scenario]]
name = "tax"
about = "work over 1 MiB"
kind = "tax"
memory_mib = 32
work_mib = 1
forks = 2
warmup = 1

[[scenario]]
name = "probes"
about = "with and without probes"
kind = "probes"
memory_mib = 32
work_mib = 1
forks = 10
warmup = 1

[[scenario]]
name = "upkeep"
about = "off the path"
kind = "upkeep"
memory_mib = 32
forks = 1
warmup = 1
"#;

fn main() -> ExitCode {
    runtime::owner::instance_if_asked();
    let mut arguments = Arguments::from_args();
    // They share two processors with each other's standbys, and count processes.
    arguments.test_threads = Some(1);
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let trial = |name: &str, run: fn() -> Result<(), Failed>| {
        Trial::test(name, run).with_ignored_flag(kvm.is_err())
    };
    let trials = vec![
        trial("every_kind_of_scenario_runs_and_leaves_nothing", every_kind),
        trial("a_wrong_checksum_voids_the_run", negative_control),
        trial("floor_and_baselines_come_with_a_scenario", compared),
        trial("every_primitive_takes_time_and_no_process_is_left", primitives),
        trial("every_backing_has_a_floor_or_says_what_it_lacks", backings),
        trial("making_a_machine_takes_time_and_so_does_its_end", cold_machines),
    ];
    if let Err(error) = &kvm {
        eprintln!("/dev/kvm cannot be opened, tests that need it are ignored: {error}");
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn scenario(name: &str) -> Scenario {
    Catalogue::parse("test", SCENARIOS).unwrap().get(name).unwrap().clone()
}

fn run(name: &str, options: Options) -> Result<ScenarioRun, LabError> {
    EngineLab::new(options).run(&scenario(name), &mut Silent)
}

const BARE: Options = Options { compare: false, warm_memory: false, spoil_model: false };

/// Processes of this program besides this one: their names.
fn others() -> Vec<String> {
    let own = fs::read_link("/proc/self/exe").unwrap();
    let pid = std::process::id().to_string();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
        .filter(|entry| entry.file_name() != pid.as_str())
        .filter(|entry| fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == own))
        .map(|entry| fs::read_to_string(entry.path().join("stat")).unwrap_or_default())
        .collect()
}

fn every_kind() -> Result<(), Failed> {
    for scenario in Catalogue::parse("test", SCENARIOS)?.all() {
        let name = &scenario.name;
        let run = match run(name, BARE) {
            Err(LabError::Unavailable { reason }) if name == "probes" => {
                eprintln!("probes: {reason}");
                continue;
            }
            run => run.map_err(|error| format!("{name}: {error:?}"))?,
        };
        let recorder = &run.recorder;
        let forks = match name.as_str() {
            "depth" => 6,
            "tax" | "children" => 4,
            _ => usize::try_from(scenario.forks)?,
        };
        assert_eq!((recorder.forks(), recorder.failed()), (forks, 0), "{name}");
        for metric in ["branch_us", "pause_us", "stage_run_us", "captured_pages", "prewarm_us"] {
            assert!(!recorder.samples(metric).is_empty(), "{name} has no {metric}");
        }
        assert!(recorder.samples("branch_us").iter().all(|us| *us > 1.0 && *us < 1e7), "{name}");
        assert_eq!(others(), [""; 0], "{name} left processes behind");
        shows(name, &run);
    }
    Ok(())
}

/// What each kind measures besides.
fn shows(name: &str, run: &ScenarioRun) {
    let metrics: &[&str] = match name {
        "same" => &["latency_us"],
        "depth" => &["depth"],
        "children" => &["alive_children"],
        "tax" => &["tax_parent_ratio", "tax_child_ratio"],
        "upkeep" => &["arm_us", "teardown_us"],
        "reference" => &["reference_branch_us"],
        "probes" => &["probes_off_branch_us", "probes_trace_exit_us", "guest_fault_page"],
        _ => &[],
    };
    let values: &[&str] = match name {
        "busy" => &["forkable_tax_ratio"],
        "children" => &["started_s", "private_user_bytes"],
        "upkeep" => &["idle_cpu_ratio"],
        "probes" => &[
            "probes_on_cost_ratio",
            "probes_on_cost_high",
            "probes_all_cost_ratio",
            "probes_all_exit_cost_us",
            "probes_call_cost_ns",
            "probes_order_seed",
        ],
        _ => &[],
    };
    for metric in metrics {
        assert!(!run.recorder.samples(metric).is_empty(), "{name} has no {metric}");
    }
    for value in values {
        assert!(run.values.contains_key(*value), "{name} has no {value}: {:?}", run.values);
    }
}

/// If the harness expects something else in memory than there is, it must say so.
fn negative_control() -> Result<(), Failed> {
    for name in ["dirty", "vcpus", "fanout"] {
        match run(name, Options { spoil_model: true, ..BARE }) {
            Err(LabError::Void { reason }) if reason.contains("checksum") => {}
            other => return Err(format!("{name} with a wrong model: {other:?}").into()),
        }
        assert_eq!(others(), [""; 0], "{name} left processes behind");
    }
    Ok(())
}

fn compared() -> Result<(), Failed> {
    let run = run("dirty", Options { compare: true, ..BARE })?;
    let floor = run.floor_us.unwrap();
    let branch = run.recorder.summary("branch_us").unwrap();
    assert!(floor > 1.0 && floor < 3.0 * branch.p50.0, "{floor} µs, {branch:?}");
    for baseline in ["cold_create_us", "process_fork_us", "posix_spawn_us"] {
        assert!(run.baselines_us.contains_key(baseline), "{baseline}: {:?}", run.notes);
    }
    // A parent that writes nothing: a cold machine after each of the few forks, not in a row.
    let plain = self::run("vcpus", Options { compare: true, ..BARE })?;
    assert_eq!(plain.baselines_us["cold_create_us"].len(), 4, "{:?}", plain.baselines_us);
    assert_eq!(plain.recorder.forks(), 4, "forks that do not count are counted");
    for run in [&run, &plain] {
        // Of all that is available others take and give back, too; but not the machine's size.
        let private = run.values.get("private_user_bytes").copied().unwrap_or(0.0);
        assert!((50_000.0..32e6).contains(&private), "a child has {private} bytes");
        assert!(run.memory_per_child_bytes.is_none_or(|bytes| bytes < 32 << 20), "{run:?}");
    }
    Ok(())
}

fn primitives() -> Result<(), Failed> {
    let before = children_of_this_thread();
    let clock = Instant::now();
    let floor = Floor::measure(&FloorConfig { memory_mib: 64, ..FloorConfig::default() })?;
    let seconds = clock.elapsed().as_secs_f64();
    for (name, figure) in floor.primitives() {
        assert!(figure.n >= 5, "{name}: {figure:?}");
        assert!(figure.p50_us > 0.0 && figure.p50_us <= figure.p99_us, "{name}: {figure:?}");
        assert!(figure.p50_us < 50_000.0, "{name}: {figure:?}");
    }
    assert!(floor.apply_hot.p50_us < floor.apply.p50_us, "{floor:?}");
    assert!(floor.sum_us(DirtyPages::default(), Standby::Parked) > 0.0);
    assert!(seconds < 5.0, "took {seconds} s");
    assert_eq!(children_of_this_thread(), before, "a process is left");
    Ok(())
}

fn backings() -> Result<(), Failed> {
    for backing in [BackingKind::Thp, BackingKind::Hugetlb] {
        let config = FloorConfig { memory_mib: 64, backing, ..FloorConfig::default() };
        match Floor::measure(&config) {
            Ok(floor) => assert!(floor.apply.p50_us > 0.0),
            Err(BaselineError::Memory(error)) => {
                let text = error.to_string();
                assert!(text.contains("huge page") || text.contains("mmap"), "{text}");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn children_of_this_thread() -> String {
    fs::read_to_string("/proc/thread-self/children").unwrap()
}

fn cold_machines() -> Result<(), Failed> {
    let config = ColdConfig { memory_mib: 64, vcpus: 2, samples: 5, ..ColdConfig::default() };
    let cold = cold::measure(&config)?;
    assert_eq!(cold.create_us.len(), 5);
    assert_eq!(cold.create_us.len(), cold.teardown_us.len());
    // VM, memslot and vCPU alone are three system calls of tens of microseconds.
    assert!(cold.create_us.iter().all(|us| *us > 50.0 && *us < 1e6), "{cold:?}");
    assert!(cold.teardown_us.iter().all(|us| *us > 0.0 && *us < 1e6), "{cold:?}");
    let none = cold::measure(&ColdConfig { vcpus: 0, ..ColdConfig::default() });
    assert!(matches!(none, Err(BaselineError::NoSamples { .. })), "{none:?}");
    Ok(())
}
