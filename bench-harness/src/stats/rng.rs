//! A small generator of random bits, for coins and simulations.

/// `SplitMix64` (G. Steele et al., "Fast splittable pseudorandom number generators", 2014). Not for
/// secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that gives the same bits for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A fair coin.
    pub fn coin(&mut self) -> bool {
        self.bits() >> 63 == 1
    }

    /// Uniform in (0, 1), neither end included.
    pub fn uniform(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "52 bits fit into f64 exactly")]
        let high = (self.bits() >> 12) as f64;
        (high + 0.5) / f64::from(1u32 << 26) / f64::from(1u32 << 26)
    }

    /// Standard normal (Box–Muller, one of the pair).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_right() {
        let mut rng = Rng::new(7);
        let n = 100_000;
        let (mut heads, mut sum, mut squares) = (0, 0.0, 0.0);
        for _ in 0..n {
            heads += i32::from(rng.coin());
            let x = rng.normal();
            sum += x;
            squares += x * x;
        }
        let n = f64::from(n);
        assert!((f64::from(heads) / n - 0.5).abs() < 0.01);
        assert!((sum / n).abs() < 0.02 && (squares / n - 1.0).abs() < 0.03);
    }
}
