//! What the pictures of a benchmark's page share: one colour a suite, lines, bars, text that fits.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use crate::error::Result;
use crate::train::plot::draw::{COLORS, GREY, SCALE, failed, text};

/// Pixels of a picture's unit.
pub(super) const UNIT: i32 = SCALE as i32;
/// Width of a picture, in units.
pub(super) const WIDTH: i32 = 1100;

/// A picture that is drawn in units.
pub(super) type Area<'a, 'b> = DrawingArea<SVGBackend<'b>, Shift>;

/// The colour of a suite.
pub(super) fn color(suite: &str) -> RGBColor {
    let known = ["device", "update", "kernel", "step", "data"];
    COLORS[known.iter().position(|name| *name == suite).unwrap_or(COLORS.len() - 1)]
}

/// A line through points.
pub(super) fn line(area: &Area<'_, '_>, points: &[(i32, i32)], style: ShapeStyle) -> Result<()> {
    let points: Vec<(i32, i32)> = points.iter().map(|&(x, y)| (x * UNIT, y * UNIT)).collect();
    area.draw(&PathElement::new(points, style)).map_err(failed)
}

/// A rectangle.
pub(super) fn bar(area: &Area<'_, '_>, from: (i32, i32), to: (i32, i32), style: ShapeStyle) -> Result<()> {
    let corners = [from, to].map(|(x, y)| (x * UNIT, y * UNIT));
    area.draw(&Rectangle::new(corners, style)).map_err(failed)
}

/// Text at a point, centred above and below it.
pub(super) fn words(area: &Area<'_, '_>, what: &str, at: (i32, i32), side: HPos) -> Result<()> {
    area.draw_text(what, &text(12, side, VPos::Center), (at.0 * UNIT, at.1 * UNIT)).map_err(failed)
}

/// Pale text at a point.
pub(super) fn pale(area: &Area<'_, '_>, what: &str, at: (i32, i32), side: HPos) -> Result<()> {
    let style = text(12, side, VPos::Center).color(&GREY);
    area.draw_text(what, &style, (at.0 * UNIT, at.1 * UNIT)).map_err(failed)
}

/// The beginning of a text that takes at most so many letters.
pub(super) fn shortened(what: &str, letters: usize) -> String {
    match what.char_indices().nth(letters) {
        Some((at, _)) => format!("{}…", &what[..at]),
        None => what.to_owned(),
    }
}
