//! Which stage makes slow forks slow.

use super::summary::stage_word;
use crate::record::{Recorder, Summary};

/// Of so many forks one belongs to the tail.
const ONE_IN: usize = 50;

/// The stage whose mean in the slowest 2 % of the forks by `metric` lies furthest above its median,
/// or `outside the stages` if what no stage accounts for does. `None` without stages or forks.
///
/// p99 of a stage would not do: the fork that is slow in one stage need not be slow as a whole.
pub(super) fn tail_stage<'a>(
    recorder: &Recorder,
    metric: &str,
    stages: impl Iterator<Item = &'a String>,
) -> Option<String> {
    let whole = excess(recorder, metric, metric)?;
    let excesses = stages.filter_map(|stage| Some((stage, excess(recorder, metric, stage)?)));
    let excesses: Vec<(&String, f64)> = excesses.collect();
    let (stage, most) = excesses.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let explained: f64 = excesses.iter().map(|(_, us)| us).sum();
    Some(if whole - explained > *most {
        "outside the stages".to_owned()
    } else {
        stage_word(stage)
    })
}

/// Mean of a part in the forks that did not fail and are slowest by `metric`, minus its median, in
/// µs.
fn excess(recorder: &Recorder, metric: &str, part: &str) -> Option<f64> {
    let mut pairs = recorder.pairs(Some(metric), part);
    pairs.retain(|(whole, us)| whole.is_finite() && us.is_finite());
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    let all: Vec<f64> = pairs.iter().map(|(_, us)| *us).collect();
    let tail = Summary::of(&all[..all.len().div_ceil(ONE_IN)])?;
    Some(tail.mean.0 - Summary::of(&all)?.p50.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Sample;

    fn recorder(slow: impl Fn(Sample) -> Sample) -> Recorder {
        let mut recorder = Recorder::new();
        for fork in 0..100u32 {
            let jitter = f64::from(fork % 7);
            let sample = Sample::new().with("stage_enter_us", 30.0 + jitter);
            recorder.record(match fork {
                50 | 51 => slow(sample),
                _ => sample.with("stage_wake_us", 10.0).with("branch_us", 40.0 + jitter),
            });
        }
        recorder
    }

    #[test]
    fn the_stage_that_is_slow_when_the_fork_is() {
        let stages = ["stage_enter_us".to_owned(), "stage_wake_us".to_owned()];
        let wake = recorder(|s| s.with("stage_wake_us", 900.0).with("branch_us", 930.0));
        let of = |recorder: &Recorder, metric: &str| tail_stage(recorder, metric, stages.iter());
        assert_eq!(of(&wake, "branch_us").as_deref(), Some("wake"));
        let outside = recorder(|s| s.with("stage_wake_us", 10.0).with("branch_us", 930.0));
        assert_eq!(of(&outside, "branch_us").as_deref(), Some("outside the stages"));
        assert_eq!(of(&Recorder::new(), "branch_us"), None);
        // The forks that are slow by another metric are others.
        let mut other = recorder(|s| s.with("stage_wake_us", 900.0).with("branch_us", 930.0));
        for us in [500.0, 600.0, 700.0] {
            let pause = Sample::new().with("pause_us", us).with("stage_enter_us", us);
            other.record(pause.with("stage_wake_us", 10.0));
        }
        assert_eq!(of(&other, "pause_us").as_deref(), Some("enter"));
    }
}
