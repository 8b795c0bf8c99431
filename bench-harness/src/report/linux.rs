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

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::report::{Met, Revision, summarize};
    use crate::scenario::Catalogue;
    use crate::session::{Outcome, ScenarioRun, Session};

    fn boots() -> RunSummary {
        let mut run = ScenarioRun { host: Some("nested".to_owned()), ..ScenarioRun::default() };
        for us in [900.0, 1000.0, 1100.0] {
            run.recorder.record_apart("boot_us", us);
        }
        run.baselines_us.insert("qemu_boot_us".to_owned(), vec![800.0]);
        run.baselines_us.insert("qemu_boot_packed_us".to_owned(), vec![2000.0]);
        for (index, moment) in (1..).map(f64::from).zip(MOMENTS) {
            let slow = if index > 2.0 { 5.0 } else { 0.0 };
            run.values.insert(format!("profile_ours_{moment}_host_ms"), index + slow);
            run.values.insert(format!("profile_qemu_{moment}_host_ms"), index);
        }
        let scenario = Catalogue::standard().unwrap().get("linux-boot").unwrap().clone();
        let session = Session {
            command: String::new(),
            host_kind: "direct".to_owned(),
            started: UNIX_EPOCH,
            seconds: 1.0,
            load: [[0.0; 3]; 2],
            outcomes: vec![(scenario, Outcome::Done(Box::new(run)))],
            void: None,
            ended: None,
        };
        summarize(&session, Revision { hash: "1a2b3c4".to_owned(), dirty: false })
    }

    #[test]
    fn what_was_measured_stands_beside_what_it_is_compared_with() {
        let run = boots();
        let text = compared(&run);
        let row = "| boot_us | 3 | 1,000 | 1,100 | 1,100 | qemu_boot_us | 1 | 800.0 | 1.25 |";
        assert!(text.contains(row), "{text}");
        assert!(!text.contains("guest_fork_us"), "{text}");
        assert!(profile(&run).contains("| initramfs | 8 | – | 3 | – |"), "{}", profile(&run));
    }

    #[test]
    fn a_boot_is_held_against_the_faster_one_and_the_slow_part_is_named() {
        let run = boots();
        let boot = run.figures.iter().find(|figure| figure.scenario == "linux-boot").unwrap();
        assert_eq!((boot.met, boot.measured), (Met::Missed, Some(1.25)));
        assert_eq!(boot.stage.as_deref(), Some("until initramfs"));
        let hardware = run.figures.iter().filter(|figure| figure.scenario == "linux-fork");
        assert!(hardware.clone().count() == 2 && hardware.clone().all(|it| it.measured.is_none()));
    }
}
