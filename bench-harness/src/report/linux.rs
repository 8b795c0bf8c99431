//! What was measured with Linux guests, beside what it is compared with.

use super::tables::{or_none, table};
use super::{RunSummary, ScenarioSummary};
use crate::record::Summary;

/// Metric, and what it is held against. Of rates more is better, of times less.
const COMPARED: [(&str, &str); 20] = [
    ("guest_fork_us", "guest_true_unforked_us"),
    ("guest_fork_us", "guest_true_us"),
    ("guest_fork_us", "qemu_snapshot_restore_us"),
    ("guest_fork_child_us", "guest_true_unforked_us"),
    ("guest_fork_child_us", "guest_true_us"),
    ("guest_fork_child_us", "qemu_snapshot_restore_us"),
    ("ready_us", "guest_true_unforked_us"),
    ("ready_us", "guest_true_us"),
    ("ready_us", "qemu_snapshot_restore_us"),
    ("exec_us", "guest_true_unforked_us"),
    ("exec_us", "guest_true_us"),
    ("exec_us", "qemu_snapshot_restore_us"),
    ("boot_us", "qemu_boot_us"),
    ("boot_us", "qemu_boot_packed_us"),
    ("vsock_round_trip_us", "qemu_vsock_round_trip_us"),
    ("unarmed_vsock_round_trip_us", "qemu_vsock_round_trip_us"),
    ("vsock_to_guest_mib_s", "qemu_vsock_to_guest_mib_s"),
    ("unarmed_vsock_to_guest_mib_s", "qemu_vsock_to_guest_mib_s"),
    ("vsock_to_host_mib_s", "qemu_vsock_to_host_mib_s"),
    ("unarmed_vsock_to_host_mib_s", "qemu_vsock_to_host_mib_s"),
];

/// Moments of a boot in their order, as the scenario names them.
const MOMENTS: [&str; 6] = ["entered", "console", "initramfs", "serial", "init", "first_line"];

fn of_linux(run: &RunSummary) -> impl Iterator<Item = &ScenarioSummary> {
    run.scenarios.iter().filter(|summary| summary.scenario.kind.is_linux())
}

/// Each metric beside what it is compared with; empty without such scenarios.
pub(super) fn compared(run: &RunSummary) -> String {
    let head = ["metric", "n", "p50", "p90", "max", "beside", "n", "p50", "ratio of p50s"];
    let row = |summary: &ScenarioSummary, metric: &str, beside: &str| {
        let ours = summary.metrics.get(metric)?;
        let theirs = summary.baselines.get(beside);
        let ratio = theirs.map(|theirs| format!("{:.2}", ours.p50.0 / theirs.p50.0));
        let mut row = vec![metric.to_owned(), ours.n.to_string()];
        row.extend([ours.p50, ours.p90, ours.max].map(|us| us.to_string()));
        row.push(beside.to_owned());
        row.push(or_none(theirs.map(|theirs: &Summary| theirs.n)));
        row.push(or_none(theirs.map(|theirs| theirs.p50)));
        row.push(or_none(ratio));
        Some(row)
    };
    let rows: Vec<Vec<String>> = of_linux(run)
        .flat_map(|summary| {
            COMPARED.iter().filter_map(move |(metric, beside)| row(summary, metric, beside))
        })
        .collect();
    if rows.is_empty() { String::new() } else { table(&head, &rows) }
}

/// Where the time of a boot goes; empty if none was measured.
pub(super) fn profile(run: &RunSummary) -> String {
    let head = ["moment, in ms", "ours", "its kernel's clock", "QEMU", "its kernel's clock"];
    let Some(summary) = run.scenario("linux-boot") else { return String::new() };
    let value = |who: &str, moment: &str, clock: &str| {
        let value = summary.values.get(&format!("profile_{who}_{moment}_{clock}_ms"));
        or_none(value.map(|ms| format!("{ms:.0}")))
    };
    let row = |moment: &&str| {
        let mut row = vec![moment.replace('_', " ")];
        for who in ["ours", "qemu"] {
            row.extend(["host", "kernel"].map(|clock| value(who, moment, clock)));
        }
        row
    };
    table(&head, &MOMENTS.iter().map(row).collect::<Vec<_>>())
}

/// The part of a boot that takes longest beyond what it takes QEMU.
pub(super) fn slowest_part(summary: &ScenarioSummary) -> Option<String> {
    let at = |who: &str, moment: &str| {
        summary.values.get(&format!("profile_{who}_{moment}_host_ms")).copied()
    };
    let mut before = (0.0, 0.0);
    let mut parts = Vec::new();
    for moment in MOMENTS {
        let now = (at("ours", moment)?, at("qemu", moment)?);
        parts.push((moment, (now.0 - before.0) - (now.1 - before.1)));
        before = now;
    }
    let (moment, _) = parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(format!("until {}", moment.replace('_', " ")))
}
