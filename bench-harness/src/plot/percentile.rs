//! Percentile curves over an axis of nines, as HDR plotters draw them.

use super::axis::Axis;
use super::svg::{AXIS, Anchor, FRAME, GRID, LABEL, Svg};
use super::{LEFT, RIGHT, WIDTH, colour};

const HEIGHT: f64 = 460.0;
const BOTTOM: f64 = HEIGHT - 62.0;

/// One curve.
#[derive(Clone, Copy, Debug)]
pub struct Curve<'a> {
    /// Its name in the legend.
    pub label: &'a str,
    /// Samples in µs, in any order; infinite for failed forks.
    pub samples_us: &'a [f64],
}

/// Percentile curves, one or several in one frame. x is −log₁₀ of the share of samples beyond, so
/// that every nine more takes the same room; y is the metric in µs, logarithmic if it spans much.
#[must_use]
pub fn percentile_curves(
    title: &str,
    subtitle: &str,
    y_label: &str,
    curves: &[Curve<'_>],
) -> String {
    let mut svg = Svg::new(WIDTH, HEIGHT, title, subtitle);
    let legend: Vec<_> =
        curves.iter().enumerate().map(|(index, curve)| (colour(index), legend_of(curve))).collect();
    let top = svg.legend((LEFT, 72.0), RIGHT, &legend) + 18.0;

    let all: Vec<f64> = curves.iter().flat_map(|curve| curve.samples_us).copied().collect();
    let y = Axis::fit(&all, (BOTTOM, top));
    y.draw_left(&mut svg, y_label);
    let most = curves.iter().map(|curve| curve.samples_us.len()).max().unwrap_or(0).max(1);
    let nines = Nines::new(most);
    nines.draw(&mut svg, top);
    for (index, curve) in curves.iter().enumerate() {
        svg.curve(&points(curve.samples_us, &nines, &y), colour(index), false);
    }
    svg.finish()
}

fn legend_of(curve: &Curve<'_>) -> String {
    let n = curve.samples_us.len();
    match curve.samples_us.iter().filter(|sample| !sample.is_finite()).count() {
        0 => format!("{} (n = {n})", curve.label),
        failed => format!("{} (n = {n}, {failed} failed)", curve.label),
    }
}

/// The x axis.
struct Nines {
    most: f64,
}

impl Nines {
    /// Room for the largest of n samples, which stands at 1 − 1/2n.
    fn new(n: usize) -> Self {
        Self { most: (2.0 * count(n)).log10().max(1.0) }
    }

    fn px(&self, quantile: f64) -> f64 {
        LEFT + -(1.0 - quantile).log10() / self.most * (RIGHT - LEFT)
    }

    fn draw(&self, svg: &mut Svg, top: f64) {
        let ticks = [
            (0.0, "0"),
            (0.5, "50"),
            (0.75, "75"),
            (0.9, "90"),
            (0.95, "95"),
            (0.99, "99"),
            (0.999, "99.9"),
            (0.9999, "99.99"),
            (0.99999, "99.999"),
        ];
        for (quantile, label) in ticks {
            let x = self.px(quantile);
            if x <= RIGHT + 0.5 {
                svg.line((x, top), (x, BOTTOM), GRID, 1.0);
                svg.text((x, BOTTOM + 18.0), Anchor::Middle, LABEL, label);
            }
        }
        svg.line((LEFT, BOTTOM), (RIGHT, BOTTOM), FRAME, 1.0);
        let middle = f64::midpoint(LEFT, RIGHT);
        svg.text((middle, BOTTOM + 42.0), Anchor::Middle, AXIS, "percentile (%)");
    }
}

fn points(samples: &[f64], nines: &Nines, y: &Axis) -> Vec<(f64, f64)> {
    let mut sorted: Vec<f64> = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = count(sorted.len());
    let mut points: Vec<(f64, f64)> = Vec::new();
    for (index, sample) in sorted.iter().enumerate().filter(|(_, sample)| sample.is_finite()) {
        let point = (nines.px((count(index) + 0.5) / n), y.px(*sample));
        // What is less than half a px away cannot be seen and only makes the file large.
        let apart = |last: &(f64, f64)| (last.0 - point.0).abs() + (last.1 - point.1).abs() >= 0.5;
        if points.last().is_none_or(apart) {
            points.push(point);
        }
    }
    points
}

fn count(n: usize) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}
