//! The report for people.

use std::fmt::Write as _;

use super::{RunSummary, linux, tables};

/// README.md of a run; `pictures` are the names of its plots.
pub(super) fn readme(name: &str, run: &RunSummary, pictures: &[String]) -> String {
    let mut text = format!("# Bench run {name}\n\n");
    if let Some(why) = &run.void {
        let _infallible = writeln!(
            text,
            "> **VOID.** {why}. A fork had the wrong outcome; no figure of this run counts.\n"
        );
    }
    if let Some(why) = &run.ended {
        let _infallible = writeln!(text, "> **Incomplete.** The run ended at {why}.\n");
    }
    text.push_str(&conditions(run));
    section(
        &mut text,
        "Branch",
        "Times in µs, nearest-rank percentiles of the raw samples. A fork \
        that failed counts as infinitely slow. p99.9 only where ten samples lie beyond it.",
        &tables::scenarios(run),
    );
    if !run.unavailable.is_empty() {
        text.push_str("Not run on this host:\n\n");
        for (scenario, reason) in &run.unavailable {
            let _infallible = writeln!(text, "- `{scenario}`: {reason}");
        }
        text.push('\n');
    }
    section(
        &mut text,
        "Stages",
        "The p50s of the stages do not add up to the p50 of branch: each \
        is a median of its own, and stages of parent and child overlap.",
        &tables::stages(run),
    );
    linux_guests(&mut text, run);
    section(
        &mut text,
        "Figures of the specification",
        "The stage is the one that grew most since \
        `quiet`, or in `quiet` itself the longest.",
        &tables::figures(run),
    );
    section(
        &mut text,
        "Other times",
        "In µs where the name ends in `_us`. `cold_create_us`, \
        `process_fork_us` and `posix_spawn_us` are what a fork is compared with, measured in the \
        same run.",
        &tables::others(run),
    );
    section(
        &mut text,
        "Counts and values",
        "Counts of calls and allocations are exact and per fork.",
        &tables::values(run),
    );
    notes(&mut text, run);
    text.push_str("## Plots\n\n");
    for picture in pictures {
        let _infallible = writeln!(text, "![{picture}](plots/{picture}.svg)\n");
    }
    text
}

fn linux_guests(text: &mut String, run: &RunSummary) {
    let compared = linux::compared(run);
    if compared.is_empty() {
        return;
    }
    let nested = run.scenarios.iter().any(|it| it.scenario.kind.is_linux() && it.host == "nested");
    let about = if nested {
        "On a nested host: look at the ratios, everything else is the emulator's. Both sides ran on \
         the same host, in turn. Times in µs, rates in MiB/s."
    } else {
        "Both sides ran on this host, in turn. Times in µs, rates in MiB/s."
    };
    section(text, "Linux guests", about, &compared);
    let profile = linux::profile(run);
    if !profile.is_empty() {
        let about = "One boot of each with all messages of the kernel, which cost time themselves: \
            when the host heard of a moment, and what the kernel's clock said, which begins late.";
        section(text, "Boot profile", about, &profile);
    }
}

fn section(text: &mut String, title: &str, about: &str, table: &str) {
    let _infallible = writeln!(text, "## {title}\n\n{about}\n\n{table}");
}

fn conditions(run: &RunSummary) -> String {
    let host = &run.host;
    let load = run.load.map(|load| load.map(|value| format!("{value:.2}")).join(" "));
    let rows = [
        ("command", format!("`{}`", run.command)),
        ("revision", format!("`{}`", run.revision)),
        ("host kind", host.kind.clone()),
        ("kernel", format!("{}, KVM modules: {}", host.kernel, host.kvm_modules)),
        ("CPU", format!("{}, {} cores", host.cpu_model, host.cores)),
        ("memory", format!("{} MiB", host.memory_mib)),
        (
            "huge pages",
            format!(
                "THP {}, for shared memory {}; hugetlb pool {} pages of 2 MiB",
                host.thp_enabled, host.thp_shmem_enabled, host.hugetlb_pages
            ),
        ),
        ("load average", format!("{} before, {} after", load[0], load[1])),
        ("took", format!("{:.0} s", run.seconds)),
    ];
    let mut text = "| | |\n| --- | --- |\n".to_owned();
    for (name, value) in rows {
        let _infallible = writeln!(text, "| {name} | {value} |");
    }
    text.push('\n');
    text
}

fn notes(text: &mut String, run: &RunSummary) {
    let mut lines = Vec::new();
    for summary in &run.scenarios {
        let name = &summary.scenario.name;
        lines.extend(summary.notes.iter().map(|note| format!("- `{name}`: {note}")));
        let failures = summary.failures.iter();
        lines.extend(failures.map(|(why, times)| format!("- `{name}`: failed {times} ×: {why}")));
    }
    if !lines.is_empty() {
        let _infallible = writeln!(text, "## Remarks\n\n{}\n", lines.join("\n"));
    }
}
