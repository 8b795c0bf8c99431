use std::collections::BTreeMap;

use super::*;
use crate::stats::interleave::Side::{A, B};

fn batch(branch_us: &[f64]) -> Batch {
    let metrics = BTreeMap::from([("branch_us".to_owned(), branch_us.to_vec())]);
    Batch { metrics, failed: 0 }
}

/// Units whose A is around 100 µs in a machine that changes speed, and whose B is `factor` times that.
fn units(n: u32, factor: f64) -> Vec<Unit> {
    let unit = |index: u32| {
        let mood = if index.is_multiple_of(3) { 2.0 } else { 1.0 };
        let wobble = 1.0 + f64::from(index % 5) / 500.0;
        let a = batch(&[100.0 * mood, 90.0 * mood, 4000.0]);
        let b = batch(&[100.0 * mood * factor * wobble, 90.0 * mood, 9000.0]);
        Unit { order: [A, B, B, A], a: vec![a.clone(), a], b: vec![b.clone(), b] }
    };
    (0..n).map(unit).collect()
}

fn verdict(units: &[Unit], thresholds: &Thresholds) -> Verdict {
    judge(units, &["branch_us"], 1, thresholds).metrics[0].verdict
}

#[test]
fn all_three_thresholds_must_be_passed() {
    let default = Thresholds::default();
    assert_eq!(verdict(&units(12, 1.15), &default), Verdict::Slower);
    assert_eq!(verdict(&units(12, 0.80), &default), Verdict::Faster);
    assert_eq!(verdict(&units(12, 1.15), &Thresholds { p: 1e-6, ..default }), Verdict::Same);
    let absolute = Thresholds { absolute_us: 60.0, ..default };
    assert_eq!(verdict(&units(12, 1.15), &absolute), Verdict::Same);
    assert_eq!(verdict(&units(12, 1.15), &Thresholds { relative: 0.2, ..default }), Verdict::Same);
    assert_eq!(verdict(&units(12, 1.03), &default), Verdict::Same);
}

#[test]
fn several_comparisons_share_the_p() {
    let units = units(10, 1.15);
    let one = judge(&units, &["branch_us"], 1, &Thresholds::default());
    let many = judge(&units, &["branch_us"], 8, &Thresholds::default());
    assert_eq!(one.metrics[0].verdict, Verdict::Slower);
    assert_eq!(many.metrics[0].verdict, Verdict::Same);
}

#[test]
fn a_metric_that_is_not_there_alarms() {
    let mut units = units(12, 1.0);
    assert!(!judge(&units, &["branch_us"], 1, &Thresholds::default()).timing_alarm());
    units[3].b[0].metrics.clear();
    assert!(judge(&units, &["branch_us"], 1, &Thresholds::default()).timing_alarm());
    assert!(judge(&[], &["branch_us"], 1, &Thresholds::default()).timing_alarm());
}

#[test]
fn failures_alarm_and_count_as_slow() {
    let mut units = units(12, 1.0);
    for unit in &mut units {
        unit.b[0].failed = 5;
        unit.b[1].failed = 5;
    }
    let judgement = judge(&units, &["branch_us"], 1, &Thresholds::default());
    assert!(judgement.failure_alarm());
    assert_eq!(judgement.metrics[0].verdict, Verdict::Slower);
    assert_eq!(judgement.failed, (0, 120));
    for unit in &mut units {
        unit.a = unit.b.clone();
    }
    let both = judge(&units, &["branch_us"], 1, &Thresholds::default());
    assert!(!both.failure_alarm());
    assert_eq!(both.metrics[0].verdict, Verdict::Same);
}
