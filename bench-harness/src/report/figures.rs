//! The figures of the specification (section 5) that the bench can show, against what was measured.

use serde::{Deserialize, Serialize};

use super::sizes::ratio;
use super::summary::stage_word;
use super::{ScenarioSummary, linux};
use crate::record::Summary;

/// How far a figure is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Met {
    /// The further goal, too.
    Then,
    /// What must be reached.
    Must,
    /// Not reached.
    Missed,
    /// There is no bound: it is to be told.
    Told,
    /// A scenario that it needs was not run, or did not measure it.
    NotMeasured,
}

/// One figure and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FigureVerdict {
    /// What is asked, unit included.
    pub what: String,
    /// The scenario that shows it.
    pub scenario: String,
    /// Bound that must be reached; none if there is only a further goal.
    pub must: Option<f64>,
    /// The further goal.
    pub then: Option<f64>,
    /// Whether the bounds are lower bounds.
    pub at_least: bool,
    /// The figure of this run.
    pub measured: Option<f64>,
    /// Where it lies with 95 % confidence, if that was reckoned.
    #[serde(default)]
    pub interval: Option<[f64; 2]>,
    /// The verdict.
    pub met: Met,
    /// If it was missed: by how much (0.2 is 20 %) of the bound that was missed.
    pub missed_by: Option<f64>,
    /// If it was missed: the stage that has the most to do with it.
    pub stage: Option<String>,
}

/// What part of the forks a figure is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Middle,
    Tail,
    PauseTail,
}

/// Access to the scenarios of a run.
struct Runs<'a>(&'a [ScenarioSummary]);

impl<'a> Runs<'a> {
    fn get(&self, name: &str) -> Option<&'a ScenarioSummary> {
        self.0.iter().find(|summary| summary.scenario.name == name)
    }

    fn metric(&self, scenario: &str, metric: &str) -> Option<&'a Summary> {
        self.get(scenario)?.metrics.get(metric)
    }

    fn branch(&self, scenario: &str) -> Option<f64> {
        Some(self.metric(scenario, "branch_us")?.p50.0)
    }

    fn value(&self, scenario: &str, name: &str) -> Option<f64> {
        self.get(scenario)?.values.get(name).copied()
    }

    /// µs that each dirty page adds to the quiet fork.
    fn per_page(&self, scenario: &str) -> Option<f64> {
        // What was really left to the fork.
        let captured = |scenario| Some(self.metric(scenario, "captured_pages")?.p50.0);
        let pages = captured(scenario)? - captured("quiet")?;
        Some((self.branch(scenario)? - self.branch("quiet")?) / pages)
    }

    /// How many times slower than a fork a baseline of the same scenario is.
    fn times(&self, scenario: &str, baseline: &str) -> Option<f64> {
        let baseline = self.get(scenario)?.baselines.get(baseline)?;
        Some(baseline.p50.0 / self.branch(scenario)?)
    }

    /// The stage to look at: the largest one, or the one that grew most since `quiet`.
    fn culprit(&self, scenario: &str, of: Of) -> Option<String> {
        let summary = self.get(scenario)?;
        match of {
            Of::Tail => return summary.tail_stage.clone(),
            Of::PauseTail => return summary.pause_tail_stage.clone(),
            Of::Middle => {}
        }
        let quiet = self.get("quiet").filter(|_| scenario != "quiet");
        let excess = |name: &&String| {
            let p50 = |s: &ScenarioSummary| s.metrics.get(*name).map_or(0.0, |m| m.p50.0);
            p50(summary) - quiet.map_or(0.0, p50)
        };
        let stage = summary.stages.iter().max_by(|a, b| excess(a).total_cmp(&excess(b)))?;
        Some(stage_word(stage))
    }
}

/// All figures, in the order of the specification.
pub(super) fn verdicts(scenarios: &[ScenarioSummary]) -> Vec<FigureVerdict> {
    let runs = Runs(scenarios);
    let mut table = Table { runs: &runs, rows: Vec::new() };
    latency(&mut table);
    flatness(&mut table);
    dirty_pages(&mut table);
    crowd(&mut table);
    probes(&mut table);
    linux_guests(&mut table);
    table.rows
}

fn linux_guests(table: &mut Table<'_>) {
    let name = "linux-fork";
    // Elsewhere it says something about the emulator.
    let hardware = table.runs.get(name).filter(|summary| summary.host == "hardware");
    let fork = hardware.and_then(|summary| summary.metrics.get("guest_fork_us"));
    let (p50, p99) = (fork.map(|it| it.p50.0), fork.map(|it| it.p99.0));
    let what = "guest_fork p50 in Linux, hardware KVM (µs)";
    table.at_most(what, name, Some(500.0), Some(350.0), p50);
    let what = "guest_fork p99 in Linux, hardware KVM (µs)";
    table.tail_at_most(what, (name, Of::Tail), Some(1000.0), None, p99);
    let name = "linux-boot";
    let boot = table.runs.metric(name, "boot_us").map(|summary| summary.p50.0);
    let theirs = table.runs.get(name).and_then(|summary| {
        let best = |it: &&str| Some(summary.baselines.get(*it)?.p50.0);
        let all = ["qemu_boot_us", "qemu_boot_packed_us"];
        all.iter().filter_map(best).reduce(f64::min)
    });
    let ratio = boot.zip(theirs).map(|(ours, theirs)| ours / theirs);
    table.at_most("boot to init / QEMU microvm's, p50", name, Some(1.0), None, ratio);
    let part = table.runs.get(name).and_then(linux::slowest_part);
    if let Some(row) = table.rows.last_mut().filter(|row| row.met == Met::Missed) {
        row.stage = part;
    }
}

fn latency(table: &mut Table<'_>) {
    let quiet = table.runs.metric("quiet", "branch_us");
    let p50 = quiet.map(|summary| summary.p50.0);
    let p99 = quiet.map(|summary| summary.p99.0);
    let tail = quiet.map(|summary| summary.p99.0 / summary.p50.0);
    let floor = table.runs.get("quiet").and_then(ScenarioSummary::branch_per_floor);
    table.at_most("branch p50 (µs)", "quiet", Some(150.0), None, p50);
    table.tail_at_most("branch p99 (µs)", ("quiet", Of::Tail), Some(329.0), None, p99);
    table.at_most("branch p50 / floor", "quiet", None, Some(1.3), floor);
    table.tail_at_most("branch p99 / p50", ("quiet", Of::Tail), None, Some(2.0), tail);
    let pause = table.runs.metric("dirty-100", "pause_us").map(|summary| summary.p99.0);
    table.tail_at_most(
        "pause p99 with 100 dirty pages (µs)",
        ("dirty-100", Of::PauseTail),
        Some(250.0),
        Some(100.0),
        pause,
    );
    let cold = table.runs.times("quiet", "cold_create_us");
    table.at_least("cold creation / branch, p50", "quiet", Some(10.0), Some(20.0), cold);
    let process = table.runs.times("quiet", "process_fork_us");
    table.at_least("fork(2) of a process / branch, p50", "quiet", Some(1.0), None, process);
}

fn flatness(table: &mut Table<'_>) {
    for name in ["memory-128m", "memory-1g", "memory-4g", "memory-8g"] {
        let reference = table.runs.metric(name, "reference_branch_us").map(|summary| summary.p50.0);
        let ratio = table.runs.branch(name).zip(reference).map(|(a, b)| ratio(a, b));
        table.at_most("branch p50 / that of 512 MiB", name, Some(1.1), None, ratio);
    }
    let same = table.runs.value("repeat-1000", "last_by_first_ratio");
    table.told("branch p50, last forks / first ones of the same parent", "repeat-1000", same);
    for (name, what) in [
        ("repeat-1000", "branch p50, last forks / first ones of a young parent"),
        ("depth-64", "branch p50, deepest forks / first ones"),
        ("children-100", "branch p50, 100 children alive / few"),
    ] {
        let drift = table.runs.get(name).and_then(|summary| summary.drift_ratio);
        table.at_most(what, name, Some(1.1), None, drift);
    }
}

fn dirty_pages(table: &mut Table<'_>) {
    for name in ["dirty-100", "dirty-1000", "dirty-10000"] {
        let us = table.runs.per_page(name);
        table.at_most("branch p50 per random dirty page (µs)", name, Some(3.0), Some(1.5), us);
    }
    let us = table.runs.per_page("hot-1000");
    table.at_most(
        "branch p50 per page dirty in each round (µs)",
        "hot-1000",
        Some(1.0),
        Some(0.5),
        us,
    );
    let pages = table.runs.metric("busy", "captured_pages").map(|summary| summary.p50.0);
    table.at_most("pages left at the fork, p50", "busy", Some(50.0), Some(20.0), pages);
    let tax = table.runs.value("busy", "forkable_tax_ratio");
    table.at_most("guest time lost to being forkable (share)", "busy", None, Some(0.03), tax);
}

fn probes(table: &mut Table<'_>) {
    let name = "probes";
    let cost = |level: &str| table.runs.value(name, level);
    let (on, all) = (cost("probes_on_cost_ratio"), cost("probes_all_cost_ratio"));
    let of = |metric| table.runs.metric(name, metric);
    let faults = of("child_process_faults").map(|summary| summary.p50.0);
    let young = of("young_process_faults");
    let interval = |level: &str| {
        let end = |end| cost(&format!("probes_{level}_cost_{end}"));
        end("low").zip(end("high")).map(|(low, high)| [low, high])
    };
    let (about_on, about_all) = (interval("on"), interval("all"));
    table.at_most("what probes that are on add to branch (share)", name, Some(0.01), None, on);
    table.within(about_on);
    table.at_most("what all probes add to branch (share)", name, Some(0.03), None, all);
    table.within(about_all);
    for (what, value) in [
        ("what probes that are on add to a page fault (µs)", cost("probes_on_fault_cost_us")),
        ("what all probes add to a page fault (µs)", cost("probes_all_fault_cost_us")),
        ("what all probes add to an exit (µs)", cost("probes_all_exit_cost_us")),
        (
            "what timing its own call to KVM costs an instance (µs)",
            cost("probes_call_cost_ns").map(|ns| ns / 1000.0),
        ),
    ] {
        table.told(what, name, value);
    }
    table.at_most(
        "page faults of a child before its first exit, p50",
        name,
        Some(0.0),
        None,
        faults,
    );
    let (p50, p90) = (young.map(|it| it.p50.0), young.map(|it| it.p90.0));
    table.at_most("page faults in its first millisecond, p50", name, Some(10.0), None, p50);
    table.at_most("page faults in its first millisecond, p90", name, Some(10.0), None, p90);
}

fn crowd(table: &mut Table<'_>) {
    const MIB: f64 = 1_048_576.0;
    let name = "children-1000";
    let started = table.runs.value(name, "started_s");
    table.at_most("1,000 children started in (s)", name, Some(10.0), Some(3.0), started);
    let bytes = table.runs.get(name).and_then(|summary| summary.memory_per_child_bytes);
    #[expect(clippy::cast_precision_loss, reason = "bytes of one child are far below 2^52")]
    let mib = bytes.map(|bytes| bytes as f64 / MIB);
    table.at_most("memory per child, kernel included (MiB)", name, Some(4.0), Some(2.0), mib);
    let private = table.runs.value(name, "private_user_bytes").map(|bytes| bytes / MIB);
    table.at_most("of it private user memory (MiB)", name, Some(1.0), None, private);
    let idle = table.runs.value("upkeep", "idle_cpu_ratio");
    table.at_most(
        "CPU of an idle instance with standby (cores)",
        "upkeep",
        Some(0.001),
        None,
        idle,
    );
}

struct Table<'a> {
    runs: &'a Runs<'a>,
    rows: Vec<FigureVerdict>,
}

impl Table<'_> {
    fn at_most(
        &mut self,
        what: &str,
        scenario: &str,
        must: Option<f64>,
        then: Option<f64>,
        measured: Option<f64>,
    ) {
        self.push((what, scenario), (must, then), false, measured, Of::Middle);
    }

    fn tail_at_most(
        &mut self,
        what: &str,
        (scenario, of): (&str, Of),
        must: Option<f64>,
        then: Option<f64>,
        measured: Option<f64>,
    ) {
        self.push((what, scenario), (must, then), false, measured, of);
    }

    fn at_least(
        &mut self,
        what: &str,
        scenario: &str,
        must: Option<f64>,
        then: Option<f64>,
        measured: Option<f64>,
    ) {
        self.push((what, scenario), (must, then), true, measured, Of::Middle);
    }

    fn told(&mut self, what: &str, scenario: &str, measured: Option<f64>) {
        self.push((what, scenario), (None, None), false, measured, Of::Middle);
    }

    /// How sure the last figure is.
    fn within(&mut self, interval: Option<[f64; 2]>) {
        if let Some(row) = self.rows.last_mut() {
            row.interval = interval;
        }
    }

    fn push(
        &mut self,
        (what, scenario): (&str, &str),
        (must, then): (Option<f64>, Option<f64>),
        at_least: bool,
        measured: Option<f64>,
        of: Of,
    ) {
        // Infinite by infinite: everything failed, which reaches no upper bound.
        let measured = measured.map(|value| if value.is_nan() { f64::INFINITY } else { value });
        let reaches =
            |bound: f64, value: f64| if at_least { value >= bound } else { value <= bound };
        let met = match measured {
            None => Met::NotMeasured,
            Some(_) if must.is_none() && then.is_none() => Met::Told,
            Some(value) if then.is_some_and(|bound| reaches(bound, value)) => Met::Then,
            Some(value) if must.is_some_and(|bound| reaches(bound, value)) => Met::Must,
            Some(_) => Met::Missed,
        };
        let missed = met == Met::Missed;
        let bound = must.or(then).filter(|_| missed);
        self.rows.push(FigureVerdict {
            what: what.to_owned(),
            scenario: scenario.to_owned(),
            must,
            then,
            at_least,
            measured: measured.filter(|value| value.is_finite()),
            interval: None,
            met,
            missed_by: bound
                .zip(measured)
                .map(|(b, v)| (v / b - 1.0).abs())
                .filter(|m| m.is_finite()),
            stage: if missed { self.runs.culprit(scenario, of) } else { None },
        });
    }
}
