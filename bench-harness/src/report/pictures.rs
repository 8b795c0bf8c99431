//! The plots of a run.

use runtime::memory::RamLayout;

use super::{RunSummary, ScenarioSummary};
use crate::plot::{Curve, StageRow, TrendPoint, heat_map, percentile_curves, stage_stack, trend};
use crate::record::Recorder;

/// Name (without `.svg`) and text of each plot.
pub(super) fn pictures(
    run: &RunSummary,
    recorder: &dyn Fn(&str) -> Option<Recorder>,
) -> Vec<(String, String)> {
    let mut pictures = stage_pictures(run);
    pictures.extend(trend_pictures(run));
    for summary in &run.scenarios {
        let name = &summary.scenario.name;
        let Some(recorder) = recorder(name) else { continue };
        let metrics =
            ["branch_us", "pause_us", "latency_us", "guest_fork_us", "ready_us", "exec_us"];
        let samples: Vec<_> =
            metrics.iter().map(|metric| (*metric, recorder.samples(metric))).collect();
        let curves: Vec<Curve<'_>> = samples
            .iter()
            .filter(|(_, samples)| !samples.is_empty())
            .map(|(label, samples)| Curve {
                label: label.trim_end_matches("_us"),
                samples_us: samples,
            })
            .collect();
        for (metric, what) in [
            ("guest_fault_page", "Faults of a child's guest that KVM resolved"),
            ("process_fault_page", "Page faults of a child in guest memory"),
        ] {
            let pages = recorder.samples(metric);
            if recorder.metrics().any(|known| known == metric) {
                let title = format!("{what}, first millisecond included");
                let about = conditions(run, summary);
                let end = RamLayout::new(summary.scenario.memory_mib).end();
                let text = heat_map(&title, &about, end, &pages);
                pictures.push((format!("heat-{name}-{}", metric.replace('_', "-")), text));
            }
        }
        if !curves.is_empty() {
            let text = percentile_curves(name, &conditions(run, summary), "time (µs)", &curves);
            pictures.push((format!("percentiles-{name}"), text));
        }
    }
    pictures
}

fn host(run: &RunSummary) -> String {
    let [before, after] = run.load.map(|load| load[0]);
    format!("{} host, {}, load {before:.1} to {after:.1}", run.host.kind, run.host.kernel)
}

fn conditions(run: &RunSummary, summary: &ScenarioSummary) -> String {
    let scenario = &summary.scenario;
    format!(
        "{} MiB, {} vCPU, {} dirty pages; {}",
        scenario.memory_mib,
        scenario.vcpus,
        scenario.dirty_pages(),
        // A Linux guest may have run on another kind of host.
        host(run).replacen(&run.host.kind, &summary.host, 1)
    )
}

/// Bars on one axis must be of one order of magnitude to be read.
const STAGE_SPAN: f64 = 6.0;

fn stage_pictures(run: &RunSummary) -> Vec<(String, String)> {
    let row = |summary: &ScenarioSummary| StageRow {
        label: summary.scenario.name.clone(),
        bars: summary.stage_p50s(),
        branch_us: summary.branch().map(|branch| branch.p50.0),
    };
    let with_stages = run.scenarios.iter().filter(|summary| !summary.stages.is_empty());
    let mut rows: Vec<StageRow> = with_stages.map(row).collect();
    let mut pictures = Vec::new();
    while !rows.is_empty() {
        let shortest = rows.iter().map(StageRow::longest_us).fold(f64::INFINITY, f64::min);
        let fits = |row: &StageRow| row.longest_us() <= shortest * STAGE_SPAN;
        let (now, later): (Vec<_>, Vec<_>) = rows.into_iter().partition(fits);
        if now.is_empty() {
            break; // Infinite lengths only: nothing to draw.
        }
        rows = later;
        let name = match pictures.len() {
            0 => "stages".to_owned(),
            index => format!("stages-{}", index + 1),
        };
        let about = format!(
            "p50 of each stage: parent above, child below; the mark is branch; {}",
            host(run)
        );
        pictures.push((name, stage_stack("Where the time of a fork goes", &about, &now)));
    }
    pictures
}

fn trend_pictures(run: &RunSummary) -> Vec<(String, String)> {
    let point = |x: f64, summary: &ScenarioSummary| {
        let branch = summary.branch()?;
        Some(TrendPoint { x, p50_us: branch.p50.0, p99_us: branch.p99.0 })
    };
    // `quiet` is the first point of each: 512 MiB, nothing dirty, one child.
    let family = |stem: &str, size: fn(&ScenarioSummary) -> u32| -> Vec<TrendPoint> {
        let member = |s: &&ScenarioSummary| {
            let name = &s.scenario.name;
            name == "quiet" || name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('-'))
        };
        run.scenarios.iter().filter(member).filter_map(|s| point(size(s).into(), s)).collect()
    };
    let sizes = |name: &str| -> Vec<TrendPoint> {
        let sizes = run.scenario(name).map(|summary| summary.sizes.as_slice()).unwrap_or_default();
        sizes.iter().map(|p| TrendPoint { x: p.size, p50_us: p.p50.0, p99_us: p.p99.0 }).collect()
    };
    let most =
        if run.scenario("children-1000").is_some() { "children-1000" } else { "children-100" };
    let trends = [
        ("memory", "guest memory (MiB)", family("memory", |s| s.scenario.memory_mib)),
        (
            "dirty",
            "pages dirtied just before the fork",
            family("dirty", |s| s.scenario.dirty_pages()),
        ),
        ("vcpus", "vCPUs", family("vcpus", |s| s.scenario.vcpus)),
        ("fanout", "children per fork", family("fanout", |s| s.scenario.children_per_fork)),
        ("depth", "depth of the child", sizes("depth-64")),
        ("children", "children alive", sizes(most)),
    ];
    let several = trends.into_iter().filter(|(_, _, points)| points.len() > 1);
    let picture = |(name, label, points): (&str, &str, Vec<TrendPoint>)| {
        let title = format!("branch against {label}");
        (format!("trend-{name}"), trend(&title, &host(run), (label, "branch (µs)"), &points))
    };
    several.map(picture).collect()
}
