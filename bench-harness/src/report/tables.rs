//! The tables of a report, in Markdown.

use std::fmt::Write as _;

use super::figures::{FigureVerdict, Met};
use super::summary::stage_word;
use super::{RunSummary, ScenarioSummary};
use crate::record::Micros;

/// What stands in a cell that has no value.
const NONE: &str = "–";

pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return "Nothing.\n".to_owned();
    }
    let mut text = format!("| {} |\n|", head.join(" | "));
    for column in 0..head.len() {
        text.push_str(if column == 0 { " --- |" } else { " ---: |" });
    }
    text.push('\n');
    for row in rows {
        // Writing to a String cannot fail.
        let _infallible = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

pub(super) fn or_none<T: ToString>(value: Option<T>) -> String {
    value.map_or(NONE.to_owned(), |value| value.to_string())
}

/// Scenarios with their headline and conditions.
pub(super) fn scenarios(run: &RunSummary) -> String {
    let head = [
        "scenario",
        "n",
        "failed",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "max",
        "memory",
        "vCPUs",
        "dirty pages",
        "page size",
        "floor",
        "branch/floor",
    ];
    // Of boots and sockets there are no forks.
    let forks = run.scenarios.iter().filter(|it| it.n > 0 || !it.scenario.kind.is_linux());
    let rows: Vec<Vec<String>> = forks.map(|it| scenario_row(it, &run.host.kind)).collect();
    table(&head, &rows)
}

fn scenario_row(summary: &ScenarioSummary, host: &str) -> Vec<String> {
    let scenario = &summary.scenario;
    let branch = summary.branch();
    let page_size = summary.page_bytes.map(|bytes| match bytes >> 20 {
        0 => format!("{} KiB", bytes >> 10),
        mib => format!("{mib} MiB"),
    });
    let dirty = match (scenario.rate_pages_per_second, scenario.dirty_pages()) {
        (0, pages) => pages.to_string(),
        (rate, _) => format!("{rate}/s"),
    };
    let name = if summary.host == host {
        scenario.name.clone()
    } else {
        format!("{} ({} host)", scenario.name, summary.host)
    };
    let mut row = vec![name, summary.n.to_string(), summary.failed.to_string()];
    row.extend([
        or_none(branch.map(|b| b.p50)),
        or_none(branch.map(|b| b.p90)),
        or_none(branch.map(|b| b.p99)),
        or_none(branch.and_then(|b| b.p99_9)),
        or_none(branch.map(|b| b.max)),
        format!("{} MiB", scenario.memory_mib),
        scenario.vcpus.to_string(),
        dirty,
        or_none(page_size),
        or_none(summary.floor_us.map(Micros)),
        or_none(summary.branch_per_floor().map(|ratio| format!("{ratio:.2}"))),
    ]);
    row
}

/// p50, p90, p99 and maximum of each stage; a column per stage, in the order of the path.
pub(super) fn stages(run: &RunSummary) -> String {
    let mut stages: Vec<&str> = Vec::new();
    for stage in run.scenarios.iter().flat_map(|summary| &summary.stages) {
        if !stages.contains(&stage.as_str()) {
            stages.push(stage);
        }
    }
    let words: Vec<String> = stages.iter().map(|stage| stage_word(stage)).collect();
    let mut head = vec!["p50 / p90 / p99 / max in µs", "n"];
    head.extend(words.iter().map(String::as_str));
    let cell = |summary: &ScenarioSummary, stage: &str| {
        or_none(
            summary
                .metrics
                .get(stage)
                .map(|s| format!("{} / {} / {} / {}", s.p50, s.p90, s.p99, s.max)),
        )
    };
    let with_stages = run.scenarios.iter().filter(|summary| !summary.stages.is_empty());
    let rows = with_stages.map(|summary| {
        let mut row = vec![summary.scenario.name.clone(), summary.n.to_string()];
        row.extend(stages.iter().map(|stage| cell(summary, stage)));
        row
    });
    table(&head, &rows.collect::<Vec<_>>())
}

/// Everything else that was timed, one row per scenario and metric.
pub(super) fn others(run: &RunSummary) -> String {
    let mut rows = Vec::new();
    for summary in &run.scenarios {
        let shown = |name: &str| name == "branch_us" || summary.stages.iter().any(|s| s == name);
        let metrics = summary.metrics.iter().filter(|(name, _)| !shown(name));
        let baselines = summary.baselines.iter();
        for (name, s) in metrics.chain(baselines) {
            let mut row = vec![format!("{} {name}", summary.scenario.name), s.n.to_string()];
            row.extend([s.p50, s.p90, s.p99, s.max].map(|p| p.to_string()));
            rows.push(row);
        }
    }
    table(&["scenario, metric", "n", "p50", "p90", "p99", "max"], &rows)
}

/// Single values.
pub(super) fn values(run: &RunSummary) -> String {
    let mut rows = Vec::new();
    for summary in &run.scenarios {
        let mut push = |name: &str, value: String| {
            rows.push(vec![format!("{} {name}", summary.scenario.name), value]);
        };
        // The profile of a boot has a table of its own.
        for (name, value) in summary.values.iter().filter(|(it, _)| !it.starts_with("profile_")) {
            push(name, number(*value));
        }
        for (name, value) in &summary.floor_parts_us {
            push(&format!("floor: {name} (µs)"), Micros(*value).to_string());
        }
        if let Some(bytes) = summary.memory_per_child_bytes {
            push("memory per child (KiB)", (bytes / 1024).to_string());
        }
        if let Some(ratio) = summary.drift_ratio {
            push("last forks / first forks", format!("{ratio:.2}"));
        }
    }
    table(&["scenario, value", ""], &rows)
}

/// The figures of the specification.
pub(super) fn figures(run: &RunSummary) -> String {
    let head = ["figure", "scenario", "must reach", "then", "measured", "verdict", "stage"];
    let rows: Vec<Vec<String>> = run.figures.iter().map(figure_row).collect();
    table(&head, &rows)
}

fn number(value: f64) -> String {
    let decimals = if value.abs() < 0.1 { 4 } else { 2 };
    if value.abs() < 10.0 { format!("{value:.decimals$}") } else { Micros(value).to_string() }
}

fn figure_row(figure: &FigureVerdict) -> Vec<String> {
    let sign = if figure.at_least { "≥" } else { "≤" };
    let bound = |bound: Option<f64>| or_none(bound.map(|b| format!("{sign} {}", number(b))));
    let verdict = match (figure.met, figure.missed_by) {
        (Met::Then, _) => "met, further goal too".to_owned(),
        (Met::Must, _) => "met".to_owned(),
        (Met::Missed, Some(by)) => format!("**missed by {:.0} %**", by * 100.0),
        (Met::Missed, None) => "**missed**".to_owned(),
        (Met::Told, _) => NONE.to_owned(),
        (Met::NotMeasured, _) => "not measured".to_owned(),
    };
    let interval = figure.interval.map_or_else(String::new, |[low, high]| {
        format!(" (95 %: {} to {})", number(low), number(high))
    });
    vec![
        figure.what.clone(),
        figure.scenario.clone(),
        bound(figure.must),
        bound(figure.then),
        or_none(figure.measured.map(|value| number(value) + &interval)),
        verdict,
        figure.stage.clone().unwrap_or_else(|| NONE.to_owned()),
    ]
}
