//! Where the time of a fork goes: a bar for each process of a fork, one colour per stage.

use super::axis::Axis;
use super::svg::{Anchor, LABEL, Svg, label_width};
use super::{RIGHT, WIDTH, colour};
use crate::record::Micros;

const BAR: f64 = 20.0;
const ROW: f64 = 32.0;
/// Between two bars of a scenario.
const GAP: f64 = 1.0;

/// The bars of one scenario.
#[derive(Clone, Debug)]
pub struct StageRow {
    /// Name of the scenario.
    pub label: String,
    /// For each process that takes part, its stages in the order of their path, with their p50 in
    /// µs. The processes work at the same time, so each has a bar of its own.
    pub bars: Vec<Vec<(String, f64)>>,
    /// p50 of the whole in µs, drawn as a mark: the p50s of the stages do not add up to it, and
    /// the gap shows what no stage accounts for.
    pub branch_us: Option<f64>,
}

impl StageRow {
    /// Length of the longest bar.
    #[must_use]
    pub fn longest_us(&self) -> f64 {
        let length = |bar: &Vec<(String, f64)>| bar.iter().map(|(_, us)| us).sum::<f64>();
        self.bars.iter().map(length).fold(0.0, f64::max)
    }
}

/// Horizontal bars of stages on top of each other, on one linear axis.
#[must_use]
pub fn stage_stack(title: &str, subtitle: &str, rows: &[StageRow]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in rows.iter().flat_map(|row| row.bars.iter().flatten()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let left = rows.iter().map(|row| label_width(&row.label)).fold(60.0, f64::max) + 28.0;
    let legend: Vec<_> =
        names.iter().enumerate().map(|(index, name)| (colour(index), (*name).to_owned())).collect();

    // The legend's height is known only once it is laid out.
    let top = Svg::new(WIDTH, 0.0, "", "").legend((20.0, 74.0), RIGHT, &legend) + 22.0;
    let count = f64::from(u32::try_from(rows.len()).unwrap_or(u32::MAX));
    let bottom = top + count * ROW;
    let mut svg = Svg::new(WIDTH, bottom + 62.0, title, subtitle);
    svg.legend((20.0, 74.0), RIGHT, &legend);

    let longest = |row: &StageRow| row.longest_us().max(row.branch_us.unwrap_or(0.0));
    let most = rows.iter().map(longest).filter(|us| us.is_finite()).fold(0.0, f64::max);
    // Room at the right for the number behind the longest bar.
    let x = Axis::linear(most, (left, RIGHT - 58.0));
    x.draw_below(&mut svg, (top, bottom), "p50 (µs)");
    let mut y = top + (ROW - BAR) / 2.0;
    for row in rows {
        svg.text((left - 8.0, y + 14.0), Anchor::End, LABEL, &row.label);
        let end = bars(&mut svg, &x, &names, row, y);
        let end = row.branch_us.filter(|us| us.is_finite()).map_or(end, |us| {
            let mark = x.px(us);
            svg.line((mark, y - 4.0), (mark, y + BAR + 4.0), "#1c2530", 2.0);
            mark.max(end)
        });
        let whole = Micros(row.branch_us.unwrap_or_else(|| row.longest_us())).to_string();
        svg.text((end + 7.0, y + 14.0), Anchor::Start, LABEL, &whole);
        y += ROW;
    }
    svg.finish()
}

/// Draws the bars of a scenario, one below the other in the height of one, and returns where the
/// longest ends.
fn bars(svg: &mut Svg, x: &Axis, names: &[&str], row: &StageRow, y: f64) -> f64 {
    let count = f64::from(u32::try_from(row.bars.len()).unwrap_or(u32::MAX)).max(1.0);
    let height = (BAR - GAP * (count - 1.0)) / count;
    let mut y = y;
    let mut longest = x.px(0.0);
    for bar in &row.bars {
        let mut sum = 0.0;
        for (name, us) in bar.iter().filter(|(_, us)| us.is_finite()) {
            let index = names.iter().position(|known| known == name).unwrap_or(0);
            let (start, end) = (x.px(sum), x.px(sum + us));
            svg.rect((start, y), (end - start, height), colour(index));
            sum += us;
        }
        longest = longest.max(x.px(sum));
        y += height + GAP;
    }
    longest
}
