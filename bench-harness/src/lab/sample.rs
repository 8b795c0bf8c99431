//! From the engine's report of a fork to a sample.

use runtime::fork::{ChildReport, ForkReport};

use crate::record::Sample;

/// Stages of the parent, then those of the child, each in the order of the path.
const STAGES: [&str; 11] = [
    "stage_take_wake_us",
    "stage_quiesce_us",
    "stage_settle_us",
    "stage_capture_pages_us",
    "stage_capture_state_us",
    "stage_resume_us",
    "stage_awake_us",
    "stage_apply_us",
    "stage_restore_us",
    "stage_commit_us",
    "stage_run_us",
];

/// How many of them are the parent's.
const OF_PARENT: usize = 6;

/// Names of all stages, and of those in the child.
pub(crate) fn stages() -> [Vec<String>; 2] {
    [&STAGES[..], &STAGES[OF_PARENT..]].map(|names| names.iter().map(ToString::to_string).collect())
}

/// Nanoseconds in µs.
#[expect(clippy::cast_precision_loss, reason = "2^53 ns are 104 days")]
pub(super) fn us(ns: u64) -> f64 {
    ns as f64 / 1e3
}

/// The sample of a fork. Of several children the last one to leave the guest counts: it is the one
/// that `branch` waits for.
pub(crate) fn sample(report: &ForkReport) -> Sample {
    if let Some((step, errno)) = report.failed {
        return failed(step.name(), errno);
    }
    let last = report.children.iter().max_by_key(|child| child.exited);
    let (Some(child), Some(branch_ns)) = (last, report.branch_ns()) else {
        return Sample::failed("no child came to life");
    };
    let mut sample =
        Sample::new().with("branch_us", us(branch_ns)).with("pause_us", us(report.parent.resumed));
    for (stage, ns) in STAGES.into_iter().zip(durations(report, child)) {
        sample = sample.with(stage, us(ns));
    }
    sample
        .with("captured_pages", report.captured_pages.into())
        .with("helped_pages", child.helped_pages.into())
        .with("applied_pages", child.applied_pages.into())
        .with("private_pages", child.private_pages.into())
        .with("child_faults", child.faults.into())
        .with("fork_cpu_us", us(child.cpu_ns))
}

/// A fork that failed.
pub(super) fn failed(step: &str, errno: i32) -> Sample {
    Sample::failed(format!("{step}: {}", std::io::Error::from_raw_os_error(errno)))
}

fn durations(report: &ForkReport, child: &ChildReport) -> [u64; 11] {
    let parent = &report.parent;
    let since = |from: u64, to: u64| to.saturating_sub(from);
    [
        parent.woken,
        since(parent.woken, parent.quiesced),
        since(parent.quiesced, parent.settled),
        since(parent.settled, parent.pages),
        since(parent.pages, parent.released),
        since(parent.released, parent.resumed),
        child.awake,
        since(child.awake, child.applied),
        since(child.applied, child.restored),
        since(child.restored, child.entered),
        since(child.entered, child.exited),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Recorder;
    use runtime::fork::{ParentMoments, Step};

    fn report() -> ForkReport {
        let child = |exited| ChildReport {
            awake: 20_000,
            applied: 30_000,
            restored: 40_000,
            entered: 45_000,
            exited,
            ..ChildReport::default()
        };
        ForkReport {
            parent: ParentMoments {
                doorbell_ns: 0,
                woken: 1_000,
                quiesced: 2_000,
                settled: 3_000,
                pages: 10_000,
                released: 15_000,
                resumed: 16_000,
            },
            children: vec![child(90_000), child(70_000)],
            ..ForkReport::default()
        }
    }

    #[test]
    fn stages_of_each_side_add_up() {
        let mut recorder = Recorder::new();
        recorder.record(sample(&report()));
        let sum = |stages: &[&str]| stages.iter().map(|s| recorder.samples(s)[0]).sum::<f64>();
        assert!((sum(&STAGES[..OF_PARENT]) - recorder.samples("pause_us")[0]).abs() < 1e-9);
        assert!((sum(&STAGES[OF_PARENT..]) - recorder.samples("branch_us")[0]).abs() < 1e-9);
        assert!((recorder.samples("branch_us")[0] - 90.0).abs() < 1e-9);
    }

    #[test]
    fn a_failed_fork_names_its_step() {
        let mut recorder = Recorder::new();
        let failed = Some((Step::ApplyPages, 12));
        recorder.record(sample(&ForkReport { failed, ..report() }));
        let (why, times) = recorder.failures().into_iter().next().unwrap();
        assert!(why.starts_with("apply_pages: ") && times == 1, "{why}");
    }
}
