//! Scales with round ticks.

use super::svg::{AXIS, Anchor, FRAME, GRID, LABEL, Svg};
use super::{LEFT, RIGHT};
use crate::record::Micros;

/// More than this between smallest and largest value makes an axis logarithmic.
const LOG_RATIO: f64 = 8.0;

/// From values to px.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    is_log: bool,
    low: f64,
    high: f64,
    start_px: f64,
    end_px: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// From 0 to the first round tick that is not below `high`.
    pub(super) fn linear(high: f64, px: (f64, f64)) -> Self {
        let high = if high > 0.0 && high.is_finite() { high } else { 1.0 };
        let step = round_up(high / 6.0);
        let mut ticks = vec![0.0];
        while ticks.last().is_some_and(|last| *last < high * 0.999) {
            ticks.push(step * f64::from(u32::try_from(ticks.len()).unwrap_or(u32::MAX)));
        }
        let high = ticks.last().copied().unwrap_or(high);
        Self { is_log: false, low: 0.0, high, start_px: px.0, end_px: px.1, ticks }
    }

    /// Logarithmic if the values span more than a factor of eight, else linear from 0.
    pub(super) fn fit(values: &[f64], px: (f64, f64)) -> Self {
        let values = || values.iter().copied().filter(|value| value.is_finite());
        let high = values().fold(0.0, f64::max);
        let low = values().filter(|value| *value > 0.0).fold(high, f64::min);
        if low <= 0.0 || high / low <= LOG_RATIO {
            return Self::linear(high, px);
        }
        let mut ticks = vec![round_down(low)];
        while ticks.last().is_some_and(|last| *last < high * 0.999) {
            ticks.push(ticks.last().map_or(1.0, |last| round_up(last * 1.1)));
        }
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        if ticks.len() > 11 {
            // 1-2-5 becomes too dense: decades.
            ticks.retain(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9);
        }
        Self { is_log: true, low, high, start_px: px.0, end_px: px.1, ticks }
    }

    pub(super) fn px(&self, value: f64) -> f64 {
        let share = if self.is_log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.start_px + share * (self.end_px - self.start_px)
    }

    /// Draws it as the y axis of a plot, with grid lines.
    pub(super) fn draw_left(&self, svg: &mut Svg, label: &str) {
        for tick in &self.ticks {
            let y = self.px(*tick);
            svg.line((LEFT, y), (RIGHT, y), GRID, 1.0);
            svg.text((LEFT - 8.0, y + 4.0), Anchor::End, LABEL, &number(*tick));
        }
        let label = if self.is_log { format!("{label}, log scale") } else { label.to_owned() };
        let middle = f64::midpoint(self.start_px, self.end_px);
        svg.turned_text((22.0, middle), Anchor::Middle, AXIS, &label, -90);
    }

    /// Draws it as the x axis below `bottom`, with grid lines from `top`.
    pub(super) fn draw_below(&self, svg: &mut Svg, (top, bottom): (f64, f64), label: &str) {
        for tick in &self.ticks {
            let x = self.px(*tick);
            svg.line((x, top), (x, bottom), GRID, 1.0);
            svg.text((x, bottom + 18.0), Anchor::Middle, LABEL, &number(*tick));
        }
        svg.line((self.start_px, bottom), (self.end_px, bottom), FRAME, 1.0);
        let middle = f64::midpoint(self.start_px, self.end_px);
        svg.text((middle, bottom + 42.0), Anchor::Middle, AXIS, label);
    }
}

/// A number on an axis: no digits that say nothing.
pub(super) fn number(value: f64) -> String {
    let rounded = value.round();
    if rounded.abs() >= 10.0 && (value - rounded).abs() < 1e-6 {
        return if rounded >= 1000.0 {
            Micros(rounded).to_string()
        } else {
            format!("{rounded:.0}")
        };
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The next number up of the series …, 1, 2, 5, 10, 20, …
fn round_up(value: f64) -> f64 {
    let decade = 10f64.powf(value.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    factors.iter().map(|f| f * decade).find(|round| *round >= value * 0.9999).unwrap_or(value)
}

/// The next number down of that series.
fn round_down(value: f64) -> f64 {
    let decade = 10f64.powf(value.log10().floor());
    let factors = [5.0, 2.0, 1.0];
    factors.iter().map(|f| f * decade).find(|round| *round <= value * 1.0001).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|tick| number(*tick)).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        assert_eq!(
            labels(&Axis::linear(117.0, (0.0, 1.0))),
            ["0", "20", "40", "60", "80", "100", "120"]
        );
        let log = Axis::fit(&[65.0, 4100.0], (0.0, 1.0));
        assert_eq!(labels(&log), ["50", "100", "200", "500", "1,000", "2,000", "5,000"]);
        assert!(log.px(65.0) > 0.0 && log.px(4100.0) < 1.0);
        assert_eq!(labels(&Axis::fit(&[0.0], (0.0, 1.0))).len(), 6);
    }

    #[test]
    fn a_wide_range_has_decades_only() {
        let log = Axis::fit(&[0.5, 1e6], (0.0, 1.0));
        assert_eq!(labels(&log), ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]);
    }
}
