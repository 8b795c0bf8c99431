//! The order in which the batches of A and B are measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::rng::Rng;

/// Which of the two revisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The base.
    A,
    /// The change.
    B,
}

/// What one batch measured: some forks of one fresh instance in one fresh process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Samples by metric, finite; µs if the name ends in `_us`.
    pub metrics: BTreeMap<String, Vec<f64>>,
    /// Forks that failed.
    #[serde(default)]
    pub failed: u64,
}

impl Batch {
    /// Median of one metric, failed forks as infinite. `None` without samples.
    #[must_use]
    pub fn median(&self, metric: &str) -> Option<f64> {
        let mut samples = self.metrics.get(metric)?.clone();
        if samples.is_empty() {
            return None;
        }
        let failed = usize::try_from(self.failed).unwrap_or(usize::MAX).min(1 << 20);
        samples.resize(samples.len() + failed, f64::INFINITY);
        super::signed_rank::median(&mut samples)
    }
}

/// Two batches of each side, next to each other in time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// Order in which they were measured.
    pub order: [Side; 4],
    /// Batches of the base.
    pub a: Vec<Batch>,
    /// Batches of the change.
    pub b: Vec<Batch>,
}

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Units of four batches. With k units the smallest p is 2⁻ᵏ.
    pub units: u32,
    /// Seed of the coins. Kept in the report, so that the orders can be checked.
    pub seed: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self { units: 20, seed: 1 }
    }
}

impl Plan {
    /// The order of each unit: `ABBA` or `BAAB`, by a coin each.
    #[must_use]
    pub fn orders(&self) -> Vec<[Side; 4]> {
        use Side::{A, B};
        let mut rng = Rng::new(self.seed);
        (0..self.units).map(|_| if rng.coin() { [A, B, B, A] } else { [B, A, A, B] }).collect()
    }
}

/// Measures A and B in turn and returns the units for [`super::judge`].
///
/// `a` and `b` measure one batch each. Every call must start from the same state: a fresh process
/// and a fresh instance, warmed up the same way. What lives on from call to call on one side only
/// (a parent that stays alive, a file in the page cache that one revision reads) is booked to that
/// revision, and no statistics can take it out again.
///
/// One batch of each side is measured first and thrown away: the first one pays for cold files and
/// memory that the machine has never used.
///
/// # Errors
///
/// The first error of `a` or `b`; what was measured before is dropped, because a test on the units
/// that happened to work is a test on other units.
pub fn interleave<E>(
    plan: &Plan,
    mut a: impl FnMut() -> Result<Batch, E>,
    mut b: impl FnMut() -> Result<Batch, E>,
    mut measured: impl FnMut(Side, &Batch),
) -> Result<Vec<Unit>, E> {
    a()?;
    b()?;
    let mut units = Vec::new();
    for order in plan.orders() {
        let mut unit = Unit { order, a: Vec::new(), b: Vec::new() };
        for side in order {
            let batch = match side {
                Side::A => a()?,
                Side::B => b()?,
            };
            measured(side, &batch);
            match side {
                Side::A => unit.a.push(batch),
                Side::B => unit.b.push(batch),
            }
        }
        units.push(unit);
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_is_balanced_and_both_orders_occur() {
        let orders = Plan { units: 64, seed: 3 }.orders();
        let first = orders.iter().filter(|order| order[0] == Side::A).count();
        assert!((16..=48).contains(&first), "{first}");
        for order in orders {
            // Mean position of A and of B is the same: that is what cancels a linear drift.
            assert_eq!((order[0], order[1]), (order[3], order[2]));
            assert_ne!(order[0], order[1]);
        }
    }

    #[test]
    fn batches_go_to_their_side_in_the_planned_order() {
        let plan = Plan { units: 5, seed: 9 };
        let batch = |failed| Ok::<_, ()>(Batch { failed, ..Batch::default() });
        let mut seen = Vec::new();
        let units = interleave(&plan, || batch(1), || batch(2), |side, _| seen.push(side)).unwrap();
        assert_eq!(seen, plan.orders().concat());
        assert!(units.iter().all(|u| u.a.iter().all(|b| b.failed == 1)));
        assert!(units.iter().all(|u| u.a.len() == 2 && u.b.len() == 2 && u.b[1].failed == 2));
    }

    #[test]
    fn an_error_ends_it() {
        let mut calls = 0;
        let bad = || {
            calls += 1;
            if calls > 3 { Err("no instance") } else { Ok(Batch::default()) }
        };
        let result = interleave(&Plan::default(), bad, || Ok(Batch::default()), |_, _| ());
        assert_eq!(result.unwrap_err(), "no instance");
    }

    #[test]
    fn failed_forks_are_slow_in_the_median() {
        let metrics = BTreeMap::from([("branch_us".to_owned(), vec![1.0, 2.0, 3.0])]);
        let mut batch = Batch { metrics, ..Batch::default() };
        assert_eq!(batch.median("branch_us"), Some(2.0));
        batch.failed = 2;
        assert_eq!(batch.median("branch_us"), Some(3.0));
        batch.failed = 4;
        assert_eq!(batch.median("branch_us"), Some(f64::INFINITY));
        assert_eq!(batch.median("pause_us"), None);
    }
}
