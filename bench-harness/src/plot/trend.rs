//! How a figure follows a size: memory, dirty pages, depth, number of children.

use super::axis::{Axis, number};
use super::svg::{AXIS, Anchor, FRAME, GRID, LABEL, Svg};
use super::{LEFT, RIGHT, WIDTH, colour};

const HEIGHT: f64 = 430.0;
const BOTTOM: f64 = HEIGHT - 62.0;

/// One size.
#[derive(Clone, Copy, Debug)]
pub struct TrendPoint {
    /// The size; 0 stands one step left of the smallest other one.
    pub x: f64,
    /// Median in µs.
    pub p50_us: f64,
    /// 99th percentile in µs.
    pub p99_us: f64,
}

/// p50 and p99 against a size on a logarithmic axis.
#[must_use]
pub fn trend(title: &str, subtitle: &str, labels: (&str, &str), points: &[TrendPoint]) -> String {
    let mut svg = Svg::new(WIDTH, HEIGHT, title, subtitle);
    let legend = [(colour(0), "p50".to_owned()), (colour(1), "p99 (dashed)".to_owned())];
    let top = svg.legend((LEFT, 72.0), RIGHT, &legend) + 18.0;

    let mut points = points.to_vec();
    points.sort_unstable_by(|a, b| a.x.total_cmp(&b.x));
    let values: Vec<f64> = points.iter().flat_map(|p| [p.p50_us, p.p99_us]).collect();
    let y = Axis::fit(&values, (BOTTOM, top));
    y.draw_left(&mut svg, labels.1);
    let x = Sizes::new(&points);
    x.draw(&mut svg, &points, top, labels.0);
    let lines: [fn(&TrendPoint) -> f64; 2] = [|p| p.p50_us, |p| p.p99_us];
    for (index, value) in lines.into_iter().enumerate() {
        // A line over a gap would look like a measurement of what failed.
        for part in points.split(|point| !value(point).is_finite()) {
            let line: Vec<_> = part.iter().map(|p| (x.px(p.x), y.px(value(p)))).collect();
            svg.curve(&line, colour(index), index == 1);
            for point in &line {
                svg.dot(*point, colour(index));
            }
        }
    }
    svg.finish()
}

/// The x axis, with ticks at the sizes that were measured.
struct Sizes {
    /// log₁₀ of the first and last place.
    low: f64,
    high: f64,
    zero: Option<f64>,
}

impl Sizes {
    fn new(points: &[TrendPoint]) -> Self {
        let logs: Vec<f64> = points.iter().filter(|p| p.x > 0.0).map(|p| p.x.log10()).collect();
        let high = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let low = logs.iter().copied().fold(f64::INFINITY, f64::min);
        let (low, high) = if logs.is_empty() { (0.0, 1.0) } else { (low, high) };
        let step = logs.get(1).map_or(1.0, |second| (second - low).clamp(0.3, 1.0));
        let zero = points.iter().any(|p| p.x <= 0.0).then_some(low - step);
        Self { low: zero.unwrap_or(low), high: high.max(low + 0.1), zero }
    }

    fn px(&self, size: f64) -> f64 {
        let place = if size > 0.0 { size.log10() } else { self.zero.unwrap_or(self.low) };
        // A margin on both sides keeps the dots off the frame.
        LEFT + 24.0 + (place - self.low) / (self.high - self.low) * (RIGHT - LEFT - 48.0)
    }

    fn draw(&self, svg: &mut Svg, points: &[TrendPoint], top: f64, label: &str) {
        let mut last = f64::NEG_INFINITY;
        for point in points {
            let x = self.px(point.x);
            svg.line((x, top), (x, BOTTOM), GRID, 1.0);
            if x - last > 36.0 {
                svg.text((x, BOTTOM + 18.0), Anchor::Middle, LABEL, &number(point.x));
                last = x;
            }
        }
        svg.line((LEFT, BOTTOM), (RIGHT, BOTTOM), FRAME, 1.0);
        let middle = f64::midpoint(LEFT, RIGHT);
        let label = format!("{label}, log scale");
        svg.text((middle, BOTTOM + 42.0), Anchor::Middle, AXIS, &label);
    }
}
