//! A whole session with a laboratory that only pretends: from scenarios to files.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::path::{Path, PathBuf};

use bench_harness::record::Sample;
use bench_harness::report::{Met, Revision, RunSummary, json_line, write};
use bench_harness::scenario::{Catalogue, Kind, Scenario, Set};
use bench_harness::session::{
    self, Lab, LabError, Outcome, Progress, ScenarioRun, Session, Silent, Watcher,
};
use bench_harness::stats::rng::Rng;

/// Forks nothing, but knows roughly what it would take.
struct PretendLab {
    rng: Rng,
    void_at: &'static str,
}

impl PretendLab {
    fn fork(&mut self, scenario: &Scenario) -> Sample {
        if self.rng.uniform() < 0.002 {
            return Sample::failed("apply: ENOMEM");
        }
        let pages = f64::from(scenario.dirty_pages());
        let mut total = 0.0;
        let mut sample = Sample::new();
        let stages = [
            ("exit", 8.0),
            ("capture", 5.0 + 0.4 * pages),
            ("wake", 12.0),
            ("apply", 8.0 + 1.2 * pages),
            ("enter", 30.0),
        ];
        for (stage, us) in stages {
            let us = us * (0.1 * self.rng.normal()).exp();
            total += us;
            sample = sample.with(format!("stage_{stage}_us"), us);
        }
        let tail = if self.rng.uniform() < 0.01 { 500.0 } else { 0.0 };
        if scenario.rate_pages_per_second == 0 {
            sample = sample.with("captured_pages", 2.0 + pages);
        }
        sample.with("branch_us", total + tail).with("pause_us", 13.0 + 0.4 * pages)
    }
}

impl Lab for PretendLab {
    fn host_kind(&self) -> String {
        "direct".to_owned()
    }

    fn run(
        &mut self,
        scenario: &Scenario,
        progress: &mut dyn Progress,
    ) -> Result<ScenarioRun, LabError> {
        if scenario.name == self.void_at {
            return Err(LabError::Void { reason: "child 3 has the checksum of child 2".into() });
        }
        if scenario.name == "backing-hugetlb" {
            return Err(LabError::Unavailable { reason: "the hugetlb pool is empty".into() });
        }
        let mut run =
            ScenarioRun { floor_us: Some(55.0), page_bytes: Some(4096), ..ScenarioRun::default() };
        progress.phase("forks", u64::from(scenario.forks));
        for fork in 0..scenario.forks {
            if scenario.kind == Kind::Depth {
                for depth in 1..=scenario.depth {
                    run.recorder.record(self.fork(scenario).with("depth", depth.into()));
                }
            } else if scenario.kind == Kind::Children {
                run.recorder.record(self.fork(scenario).with("alive_children", fork.into()));
            } else {
                run.recorder.record(self.fork(scenario));
            }
            progress.advance(1);
        }
        run.recorder.record_apart("prewarm_us", 1_800.0);
        run.baselines_us.insert("cold_create_us".to_owned(), vec![987.0, 1_002.0, 1_486.0]);
        run.memory_per_child_bytes = Some(1_600_000);
        Ok(run)
    }
}

struct Quiet;

impl Progress for Quiet {
    fn phase(&mut self, _: &str, _: u64) {}
    fn advance(&mut self, _: u64) {}
}

impl Watcher for Quiet {
    fn begin(&mut self, _: &Scenario, _: usize, _: usize) {}
    fn end(&mut self, _: &Scenario, _: &Outcome) {}
}

fn session(set: Set, void_at: &'static str) -> Session {
    let scenarios = Catalogue::standard().unwrap().select(set, &[]).unwrap();
    let mut lab = PretendLab { rng: Rng::new(1), void_at };
    session::run(&mut lab, &scenarios, "bench-harness run --set all", &mut Quiet).unwrap()
}

fn revision() -> Revision {
    Revision { hash: "0123456789abcdef0123456789abcdef01234567".into(), dirty: true }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        if path.exists() {
            fs::remove_dir_all(&path).unwrap();
        }
        Self(path)
    }
}

#[test]
fn a_run_is_kept_whole() {
    let results = Folder::new("whole");
    let session = session(Set::All, "");
    let (folder, summary) = write(&session, revision(), &results.0).unwrap();
    assert!(folder.file_name().unwrap().to_str().unwrap().ends_with("Z-0123456"));

    assert_eq!(
        RunSummary::read(&folder).unwrap(),
        RunSummary::read(&folder.join("summary.json")).unwrap()
    );
    let read = RunSummary::read(&folder).unwrap();
    assert_eq!(read.scenarios.len(), summary.scenarios.len());
    assert_eq!(read.unavailable["backing-hugetlb"], "the hugetlb pool is empty");

    let csv = fs::read_to_string(folder.join("raw/quiet.csv")).unwrap();
    assert_eq!(csv.lines().count(), 501);
    assert!(csv.starts_with("fork,stage_exit_us,stage_capture_us,"), "{}", &csv[..80]);
    for file in [
        "raw/quiet.apart.csv",
        "raw/quiet.baselines.csv",
        "hgrm/quiet.branch_us.hgrm",
        "plots/percentiles-quiet.svg",
        "plots/stages.svg",
        "plots/trend-dirty.svg",
        "plots/trend-memory.svg",
        "plots/trend-depth.svg",
        "plots/trend-children.svg",
    ] {
        assert!(folder.join(file).is_file(), "{file}");
    }

    let readme = fs::read_to_string(folder.join("README.md")).unwrap();
    for part in [
        "`bench-harness run --set all`",
        "(dirty)",
        "| quiet | 500 |",
        "| busy | 150 |",
        "10000/s",
        "the hugetlb pool is empty",
        "apply: ENOMEM",
        "load average",
    ] {
        assert!(readme.contains(part), "{part} is not in\n{readme}");
    }
    // Every plot that is shown is there.
    for line in readme.lines().filter(|line| line.starts_with("![")) {
        let file = line.split_once('(').unwrap().1.trim_end_matches(')');
        assert!(folder.join(file).is_file(), "{file}");
    }
}

#[test]
fn a_run_is_never_overwritten() {
    let results = Folder::new("twice");
    let session = session(Set::Default, "");
    let (folder, _) = write(&session, revision(), &results.0).unwrap();
    let before = fs::read(folder.join("summary.json")).unwrap();
    let error = write(&session, revision(), &results.0).unwrap_err().to_string();
    assert!(error.contains("never overwritten"), "{error}");
    assert_eq!(fs::read(folder.join("summary.json")).unwrap(), before);
}

#[test]
fn a_wrong_child_voids_the_run() {
    let results = Folder::new("void");
    let session = session(Set::Default, "busy");
    assert_eq!(session.void.as_deref(), Some("busy: child 3 has the checksum of child 2"));
    let (folder, summary) = write(&session, revision(), &results.0).unwrap();
    assert!(summary.figures.is_empty() && summary.scenarios.is_empty());
    let readme = fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(readme.contains("**VOID.** busy: child 3"), "{readme}");
}

#[test]
fn figures_say_what_was_missed_and_where() {
    let results = Folder::new("figures");
    let (_, summary) = write(&session(Set::All, ""), revision(), &results.0).unwrap();
    let figure = |what: &str, scenario: &str| {
        let found =
            summary.figures.iter().find(|f| f.what.contains(what) && f.scenario == scenario);
        found.unwrap().clone()
    };
    assert_eq!(figure("branch p50 (µs)", "quiet").met, Met::Must);
    assert_eq!(figure("per random dirty page", "dirty-1000").met, Met::Must);
    let cold = figure("cold creation", "quiet");
    assert_eq!(cold.met, Met::Must);
    assert!((cold.measured.unwrap() - 1_002.0 / 63.0).abs() < 1.5);
    let hot = figure("per page dirty in each round", "hot-1000");
    assert_eq!((hot.met, hot.stage.as_deref()), (Met::Missed, Some("apply")));
    assert!((hot.missed_by.unwrap() - 0.6).abs() < 0.05);
    let tail = figure("branch p99 (µs)", "quiet");
    assert_eq!((tail.met, tail.stage.as_deref()), (Met::Missed, Some("outside the stages")));
    assert_eq!(figure("pages left", "busy").met, Met::NotMeasured);
    assert_eq!(figure("deepest", "depth-64").met, Met::Must);
}

#[test]
fn the_json_line_is_the_promised_object() {
    let results = Folder::new("json");
    let (_, summary) = write(&session(Set::Default, ""), revision(), &results.0).unwrap();
    let line = json_line(summary.scenario("quiet").unwrap()).unwrap();
    assert!(!line.contains('\n'));
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = [
        "baselines",
        "failed",
        "floor_us",
        "host",
        "memory_per_child_bytes",
        "metrics",
        "n",
        "scenario",
    ];
    assert_eq!(keys, expected);
    assert_eq!((&value["scenario"], &value["host"]), (&"quiet".into(), &"direct".into()));
    for metric in ["branch_us", "pause_us", "stage_capture_us"] {
        for percentile in ["p50", "p90", "p99"] {
            assert!(
                value["metrics"][metric][percentile].is_number(),
                "{metric} {percentile}: {line}"
            );
        }
        assert!(!value["metrics"][metric]["max"].is_null());
    }
    assert_eq!(value["baselines"]["cold_create_us"], 1_002.0);
    assert!(value["baselines"]["process_fork_us"].is_null());
    assert_eq!(value["memory_per_child_bytes"], 1_600_000);
}

#[test]
fn an_error_of_the_laboratory_ends_the_session() {
    struct Broken;
    impl Lab for Broken {
        fn host_kind(&self) -> String {
            "none".into()
        }
        fn run(&mut self, _: &Scenario, _: &mut dyn Progress) -> Result<ScenarioRun, LabError> {
            Err(LabError::Failed("standby died".into()))
        }
    }
    let scenarios = Catalogue::standard().unwrap().select(Set::Default, &[]).unwrap();
    let error = session::run(&mut Broken, &scenarios, "x", &mut Quiet).unwrap_err();
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "standby died");
    assert!(Broken.run(&scenarios[0], &mut Silent).is_err());
}
