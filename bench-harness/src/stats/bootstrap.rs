//! How sure a median is.

use super::rng::Rng;
use super::signed_rank::median;

/// Samples that are drawn of the samples.
const DRAWN: usize = 4000;

/// The interval in which the median lies with 95 % confidence: its 2.5th and 97.5th percentile over
/// samples of the same size, drawn with replacement (B. Efron, "Bootstrap methods: another look at the
/// jackknife", 1979). `None` without values.
#[must_use]
pub fn median_interval(values: &[f64], rng: &mut Rng) -> Option<[f64; 2]> {
    let size = u64::try_from(values.len()).ok().filter(|size| *size > 0)?;
    let mut medians: Vec<f64> = (0..DRAWN)
        .filter_map(|_| {
            let draw = |_| usize::try_from(rng.bits() % size).ok().map(|at| values[at]);
            let mut drawn: Vec<f64> = values.iter().filter_map(draw).collect();
            median(&mut drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    let at = |per_mille: usize| medians.get(DRAWN * per_mille / 1000).copied();
    Some([at(25)?, at(975)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_true_median_lies_within_as_often_as_promised() {
        const ROUNDS: u32 = 200;
        let mut rng = Rng::new(11);
        let mut within = 0;
        for _ in 0..ROUNDS {
            let values: Vec<f64> = (0..40).map(|_| 3.0 + rng.normal()).collect();
            let [low, high] = median_interval(&values, &mut rng).expect("there are values");
            assert!(low < high && high - low < 2.0, "{low} to {high}");
            within += u32::from((low..=high).contains(&3.0));
        }
        assert!(within * 100 >= ROUNDS * 90, "{within} of {ROUNDS}");
        assert_eq!(median_interval(&[2.0; 5], &mut rng), Some([2.0, 2.0]));
        assert_eq!(median_interval(&[], &mut rng), None);
    }
}
