//! Where in guest memory something happened, and how often.

use super::svg::{AXIS, Anchor, FRAME, LABEL, Svg};

/// Cells of the map, row by row from the lowest address.
const COLUMNS: usize = 64;
const ROWS: usize = 16;
const CELL: f64 = 12.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 92.0;
/// From nothing over once, by powers of four.
const SHADES: [&str; 6] = ["#f3f5f7", "#cfe3f2", "#8fbfe0", "#4a90c2", "#c2703a", "#8f1d1d"];

/// A map of memory up to the address `bytes`: each cell is as dark as something happened often in its
/// pages (of 4 KiB). What is no memory stays white: nothing happens there.
#[must_use]
pub fn heat_map(title: &str, subtitle: &str, bytes: u64, pages: &[f64]) -> String {
    let cells = COLUMNS * ROWS;
    let per_cell = (bytes / 4096).div_ceil(cells as u64).max(1);
    let mut counts = vec![0_u32; cells];
    for page in pages {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a page's number; what is none falls out below"
        )]
        let cell = usize::try_from(*page as u64 / per_cell).unwrap_or(usize::MAX);
        if let Some(count) = counts.get_mut(cell) {
            *count += 1;
        }
    }
    let (width, height) = (LEFT + number(COLUMNS) * CELL + 20.0, TOP + number(ROWS) * CELL + 70.0);
    let mut svg = Svg::new(width, height, title, subtitle);
    for (cell, count) in counts.iter().enumerate() {
        let at = (LEFT + number(cell % COLUMNS) * CELL, TOP + number(cell / COLUMNS) * CELL);
        svg.rect(at, (CELL - 1.0, CELL - 1.0), shade(*count));
    }
    for row in (0..=ROWS).step_by(4) {
        let mib = (bytes * row as u64 / ROWS as u64) >> 20;
        let y = TOP + number(row) * CELL;
        svg.line((LEFT - 6.0, y), (LEFT - 2.0, y), FRAME, 1.0);
        svg.text((LEFT - 10.0, y + 4.0), Anchor::End, LABEL, &format!("{mib} MiB"));
    }
    let y = TOP + number(ROWS) * CELL + 20.0;
    for (index, colour) in SHADES.iter().enumerate() {
        let x = LEFT + number(index) * 110.0;
        svg.rect((x, y), (CELL, CELL), colour);
        let label = match index {
            0 => "never".to_owned(),
            1 => "once".to_owned(),
            _ => format!("{} and more", from(index)),
        };
        svg.text((x + CELL + 5.0, y + 10.0), Anchor::Start, LABEL, &label);
    }
    let about = format!("a cell is {} KiB", per_cell * 4);
    svg.text((LEFT, y + 36.0), Anchor::Start, AXIS, &about);
    svg.finish()
}

/// From how often on a shade is used.
fn from(shade: usize) -> u32 {
    if shade < 2 { u32::from(shade > 0) } else { 2 << (2 * (shade - 2)) }
}

fn shade(count: u32) -> &'static str {
    let at = (0..SHADES.len()).rev().find(|shade| count >= from(*shade)).unwrap_or(0);
    SHADES[at]
}

#[expect(clippy::cast_precision_loss, reason = "cells of a plot")]
fn number(value: usize) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_often_is_darker() {
        assert_eq!([0, 1, 2, 8, 32, 128].map(shade), SHADES);
        assert_eq!(shade(7), SHADES[2]);
    }

    #[test]
    fn pages_fall_into_their_cells() {
        // A page each.
        let map = heat_map("t", "s", 4 << 20, &[0.0, 0.0, 1023.0, 5000.0]);
        assert_eq!(map.matches(SHADES[1]).count(), 2, "the page that was hit once, and the legend");
        assert_eq!(map.matches(SHADES[2]).count(), 2);
        assert_eq!(map.matches(SHADES[0]).count(), 1024 - 2 + 1);
        assert!(map.contains("a cell is 4 KiB"));
    }
}
