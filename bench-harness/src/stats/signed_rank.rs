//! Wilcoxon's signed-rank test with its exact distribution, and the estimate that belongs to it.

/// Result of the test on differences whose signs are exchangeable if nothing changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SignedRank {
    /// Probability of a rank sum of the positive differences at least this high.
    pub p_greater: f64,
    /// Probability of one at most this high.
    pub p_less: f64,
    /// Differences that are not zero.
    pub used: usize,
}

/// Tests whether differences lean to one side, one-sided both ways.
///
/// Zeros are left out. Ties get the mean of their ranks; infinities are the largest and tie with
/// each other. The distribution is that of all 2ᵏ assignments of signs to these very ranks, counted
/// and not approximated, so ties cost nothing. NaN must not occur.
///
/// Source: E. Lehmann, *Nonparametrics* (1975), chapter 3; counted by dynamic programming over the
/// sum, O(k³).
#[must_use]
pub fn test(differences: &[f64]) -> SignedRank {
    let mut sorted: Vec<f64> = differences.iter().copied().filter(|d| *d != 0.0).collect();
    sorted.sort_unstable_by(|a, b| a.abs().total_cmp(&b.abs()));
    let ranks = doubled_ranks(&sorted);
    let observed: usize =
        sorted.iter().zip(&ranks).filter(|(d, _)| **d > 0.0).map(|(_, rank)| rank).sum();
    let probability = distribution(&ranks);
    SignedRank {
        p_greater: probability[observed..].iter().sum::<f64>().min(1.0),
        p_less: probability[..=observed].iter().sum::<f64>().min(1.0),
        used: sorted.len(),
    }
}

/// Twice the mean rank of each of the values, sorted by size: an integer with ties, too.
fn doubled_ranks(sorted: &[f64]) -> Vec<usize> {
    let mut ranks = vec![0; sorted.len()];
    let mut start = 0;
    while start < sorted.len() {
        let size = sorted[start].abs().to_bits();
        let ties = sorted[start..].iter().take_while(|d| d.abs().to_bits() == size).count();
        // Ranks are start + 1 ..= start + ties; twice their mean is the sum of first and last.
        ranks[start..start + ties].fill(2 * start + ties + 1);
        start += ties;
    }
    ranks
}

/// Probability of each sum of a random subset of the ranks, every subset being equally likely.
fn distribution(ranks: &[usize]) -> Vec<f64> {
    let total: usize = ranks.iter().sum();
    let mut probability = vec![0.0; total + 1];
    probability[0] = 1.0;
    let mut reached = 0;
    for rank in ranks {
        reached += rank;
        // From above, so that each rank is used at most once.
        for sum in (0..=reached).rev() {
            let with = if sum >= *rank { probability[sum - rank] } else { 0.0 };
            probability[sum] = f64::midpoint(probability[sum], with);
        }
    }
    probability
}

/// Hodges–Lehmann estimate: the median of the means of all pairs, each value with itself included.
/// Up to 29 % of the values may be arbitrarily wrong. `None` without values; a pair of opposite
/// infinities counts as 0.
#[must_use]
pub fn hodges_lehmann(values: &[f64]) -> Option<f64> {
    let mut means = Vec::with_capacity(values.len() * (values.len() + 1) / 2);
    for (index, a) in values.iter().enumerate() {
        for b in &values[index..] {
            let mean = f64::midpoint(*a, *b);
            means.push(if mean.is_nan() { 0.0 } else { mean });
        }
    }
    median(&mut means)
}

/// Median; the mean of the middle two for an even number. `None` without values.
#[must_use]
pub fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = values[values.len() / 2 - 1];
    let mean = f64::midpoint(lower, upper);
    Some(if mean.is_nan() { 0.0 } else { mean })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// p by trying every pattern of signs.
    fn brute_force(differences: &[f64]) -> f64 {
        let sizes: Vec<f64> = differences.iter().map(|d| d.abs()).collect();
        let rank = |i: usize| {
            let below = sizes.iter().filter(|s| **s < sizes[i]).count();
            let equal = sizes.iter().filter(|s| s.to_bits() == sizes[i].to_bits()).count();
            2 * below + equal + 1
        };
        let ranks: Vec<usize> = (0..sizes.len()).map(rank).collect();
        let sum = |positive: &dyn Fn(usize) -> bool| {
            (0..ranks.len()).filter(|i| positive(*i)).map(|i| ranks[i]).sum::<usize>()
        };
        let observed = sum(&|i| differences[i] > 0.0);
        let patterns = 1u32 << sizes.len();
        let as_high = (0..patterns).filter(|p| sum(&|i| p >> i & 1 == 1) >= observed).count();
        f64::from(u32::try_from(as_high).unwrap()) / f64::from(patterns)
    }

    #[test]
    fn all_on_one_side_is_as_unlikely_as_it_gets() {
        let result = test(&[0.1, 0.2, 0.3, f64::INFINITY, 0.5]);
        assert!((result.p_greater - 1.0 / 32.0).abs() < 1e-12);
        assert!((result.p_less - 1.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_is_no_evidence() {
        for differences in [&[][..], &[0.0, 0.0], &[f64::INFINITY, f64::NEG_INFINITY]] {
            assert!(test(differences).p_greater >= 0.5);
        }
    }

    #[test]
    fn one_wild_value_does_not_move_the_estimate_far() {
        let calm = hodges_lehmann(&[1.0, 1.1, 0.9, 1.05, 0.95]).unwrap();
        let wild = hodges_lehmann(&[1.0, 1.1, 0.9, 1.05, f64::INFINITY]).unwrap();
        assert!((calm - 1.0).abs() < 0.01 && (wild - 1.0).abs() < 0.2, "{calm} {wild}");
        assert_eq!(hodges_lehmann(&[]), None);
    }

    proptest! {
        #[test]
        fn exact_is_exact(differences in prop::collection::vec(
            prop_oneof![(-4i8..=4).prop_filter("not zero", |d| *d != 0).prop_map(f64::from),
                        -1.0f64..-0.1, 0.1f64..1.0], 1..11)
        ) {
            prop_assert!((test(&differences).p_greater - brute_force(&differences)).abs() < 1e-9);
        }

        #[test]
        fn swapping_the_sides_swaps_the_answers(d in prop::collection::vec(-1.0f64..1.0, 0..30)) {
            let swapped: Vec<f64> = d.iter().map(|d| -d).collect();
            let (one, other) = (test(&d), test(&swapped));
            prop_assert!((one.p_greater - other.p_less).abs() < 1e-9);
        }
    }
}
