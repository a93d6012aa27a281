//! Drawing: one code for SVG and PNG, in pixels of half a unit.

use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::axis::Axis;
use super::points::{drawable, range, stretches};
use super::{Chart, Stroke};
use crate::error::{Error, Result};

/// Pixels a unit: an SVG gets positions to half a unit, a PNG twice the resolution.
pub(crate) const SCALE: u32 = 2;
/// Colours that people with any colour vision tell apart (Okabe and Ito 2008).
pub(crate) const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
];
pub(crate) const GREY: RGBColor = RGBColor(128, 128, 128);
/// Of what marks trouble.
const MARK: RGBColor = RGBColor(200, 30, 60);
const FONT: &str = "sans-serif";
/// Width and height of one chart, in units.
const CHART: (u32, u32) = (480, 300);
/// Room around the field of curves, in pixels.
const LEFT: i32 = 56 * SCALE as i32;
const RIGHT: i32 = 18 * SCALE as i32;
const BOTTOM: i32 = 42 * SCALE as i32;
const ROW: i32 = 18 * SCALE as i32;
/// A swatch of the legend.
const SWATCH: i32 = 18 * SCALE as i32;
/// Of the width that a text has in the font it was measured in: other fonts are wider.
const WIDER: f64 = 1.15;
/// Letters of a name at most.
const LETTERS: usize = 40;
/// Vertical marks drawn at most.
const MARKS: usize = 200;

pub(crate) fn failed(e: impl std::fmt::Display) -> Error {
    Error::Training(format!("cannot draw a plot: {e}"))
}

/// Size of a page of charts in pixels. The last of an odd number of charts is as wide as the page.
pub(super) fn page_size(charts: usize) -> (u32, u32) {
    let columns = if charts > 1 { 2 } else { 1 };
    (CHART.0 * columns * SCALE, CHART.1 * (charts as u32).div_ceil(columns).max(1) * SCALE)
}

/// Makes the font known that text is measured in.
pub(super) fn fonts() {
    static FONTS: Once = Once::new();
    FONTS.call_once(|| {
        // A font that cannot be registered shows as an error of the first text drawn.
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
}

/// Draws charts, two side by side.
pub(super) fn page<B: DrawingBackend>(area: &DrawingArea<B, Shift>, charts: &[Chart]) -> Result<()> {
    fonts();
    let (width, height) = (CHART.0 * SCALE, CHART.1 * SCALE);
    for (i, chart) in charts.iter().enumerate() {
        let alone = i + 1 == charts.len() && i % 2 == 0 && i > 0;
        let corner = ((i as u32 % 2 * width) as i32, (i as u32 / 2 * height) as i32);
        let size = (if alone { 2 * width } else { width }, height);
        draw_chart(&area.clone().shrink(corner, size), chart)?;
    }
    Ok(())
}

/// Text of so many units, and where it stands about its point.
pub(crate) fn text(size: u32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    (FONT, size * SCALE).into_font().color(&BLACK).pos(Pos::new(horizontal, vertical))
}

/// A name as it is drawn: of one line, and not too long.
pub(crate) fn fitting(name: &str) -> String {
    let mut letters: Vec<char> = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if letters.len() > LETTERS {
        letters.truncate(LETTERS - 1);
        letters.push('…');
    }
    letters.into_iter().collect()
}

fn draw_chart<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart) -> Result<()> {
    let (width, height) = area.dim_in_pixel();
    let (width, height) = (width as i32, height as i32);
    let scale = SCALE as i32;
    area.draw_text(&chart.title, &text(15, HPos::Left, VPos::Center), (14 * scale, 18 * scale)).map_err(failed)?;
    let all = || chart.curves.iter().flat_map(|c| c.points.iter()).filter(|p| drawable(p));
    let line = chart.line.as_ref().filter(|(at, _)| at.is_finite());
    let (Some((x0, x1)), Some((y0, y1))) =
        (range(all().map(|p| p.0)), range(all().map(|p| p.1).chain(line.map(|(at, _)| *at))))
    else {
        let style = text(13, HPos::Center, VPos::Center).color(&GREY);
        return area.draw_text("no figures", &style, (width / 2, height / 2)).map_err(failed);
    };
    let top = 38 * scale + legend(area, chart, width)?;
    let (x, y) = axes((x0, x1), (y0, y1), chart, width);
    let (right, bottom) = (width - RIGHT, height - BOTTOM);
    let at_x = |v: f64| LEFT + (x.share(v) * f64::from(right - LEFT)).round() as i32;
    let at_y = |v: f64| bottom - (y.share(v) * f64::from(bottom - top)).round() as i32;
    let path = |points: Vec<(i32, i32)>, style: ShapeStyle| area.draw(&PathElement::new(points, style)).map_err(failed);

    for (value, label) in &y.ticks {
        let at = at_y(*value);
        path(vec![(LEFT, at), (right, at)], GREY.mix(0.25).stroke_width(1))?;
        area.draw_text(label, &text(12, HPos::Right, VPos::Center), (LEFT - 6 * scale, at + scale)).map_err(failed)?;
    }
    for (value, label) in &x.ticks {
        let at = at_x(*value);
        path(vec![(at, bottom), (at, bottom + 4 * scale)], GREY.stroke_width(1))?;
        area.draw_text(label, &text(12, HPos::Center, VPos::Top), (at, bottom + 6 * scale)).map_err(failed)?;
    }
    path(vec![(LEFT, bottom), (right, bottom)], GREY.stroke_width(SCALE))?;
    let middle = (LEFT + right) / 2;
    area.draw_text(&chart.x, &text(12, HPos::Center, VPos::Top), (middle, bottom + 22 * scale)).map_err(failed)?;

    for mark in chart.marks.iter().filter(|m| (x0..=x1).contains(*m)).step_by(chart.marks.len() / MARKS + 1) {
        path(vec![(at_x(*mark), top), (at_x(*mark), bottom)], MARK.mix(0.5).stroke_width(SCALE))?;
    }
    if let Some((at, _)) = line {
        path(vec![(LEFT, at_y(*at)), (right, at_y(*at))], GREY.stroke_width(SCALE))?;
    }
    // Faint curves first: they stay behind the others.
    let (faint, strong): (Vec<_>, Vec<_>) = chart.curves.iter().partition(|c| c.stroke == Stroke::Faint);
    for curve in faint.into_iter().chain(strong) {
        let color = COLORS[curve.color % COLORS.len()];
        let style = stroke(curve.stroke, color);
        for stretch in stretches(&curve.points) {
            let points: Vec<(i32, i32)> = stretch.iter().map(|p| (at_x(p.0), at_y(p.1))).collect();
            match points.as_slice() {
                [point] => area.draw(&Circle::new(*point, 4 * scale, color.filled())).map_err(failed)?,
                _ => path(points, style)?,
            }
        }
    }
    Ok(())
}

fn stroke(stroke: Stroke, color: RGBColor) -> ShapeStyle {
    match stroke {
        Stroke::Strong => color.stroke_width(2 * SCALE),
        Stroke::Thin => color.stroke_width(SCALE),
        Stroke::Faint => color.mix(0.3).stroke_width(SCALE),
    }
}

/// The two axes, a little wider than the figures.
fn axes((x0, x1): (f64, f64), (y0, y1): (f64, f64), chart: &Chart, width: i32) -> (Axis, Axis) {
    let (x0, x1) = match (x0, x1) {
        (x0, x1) if x1 <= x0 => (x0 - 1.0, x1 + 1.0),
        // A first record at step 10 of 2000 is as good as the beginning.
        (x0, x1) if x0 >= 0.0 && x0 < 0.1 * x1 => (0.0, x1),
        range => range,
    };
    // A logarithmic scale is worth it from some multiples on.
    let logarithmic = chart.logarithmic && y0 > 0.0 && y1 / y0 > 8.0;
    let (low, high) = if logarithmic {
        let margin = (y1 / y0).powf(0.05);
        (y0 / margin, y1 * margin)
    } else {
        let span = if y1 > y0 { y1 - y0 } else { y1.abs().max(1e-9) };
        let from_zero = y0 >= 0.0 && (y0 < 0.35 * y1 || y0 == y1);
        let low = if from_zero { 0.0 } else { y0 - 0.06 * span };
        let high = y1 + 0.06 * span;
        (low, chart.most.filter(|most| y1 <= *most).map_or(high, |most| high.min(most)))
    };
    let ticks = (width / (68 * SCALE as i32)).max(2) as usize;
    (Axis::new(x0, x1, false, true, ticks), Axis::new(low, high, logarithmic, false, 7))
}

/// Draws the legend under the title; returns its height in pixels.
fn legend<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart, width: i32) -> Result<i32> {
    let scale = SCALE as i32;
    let mut items: Vec<(String, ShapeStyle)> = chart
        .curves
        .iter()
        .filter(|curve| !curve.name.is_empty())
        .map(|curve| (fitting(&curve.name), stroke(curve.stroke, COLORS[curve.color % COLORS.len()])))
        .collect();
    if let Some((_, name)) = &chart.line {
        items.push((fitting(name), GREY.stroke_width(SCALE)));
    }
    if !chart.marks.is_empty() {
        items.push(("skipped".to_owned(), MARK.mix(0.5).stroke_width(SCALE)));
    }
    let style = text(12, HPos::Left, VPos::Center);
    let start = 14 * scale;
    let (mut at, mut row) = (start, 0);
    for (name, swatch) in &items {
        let measured = area.estimate_text_size(name, &style).map_err(failed)?.0;
        let wide = SWATCH + 6 * scale + (f64::from(measured) * WIDER) as i32;
        if at > start && at + wide > width - RIGHT {
            (at, row) = (start, row + 1);
        }
        let y = 38 * scale + row * ROW;
        area.draw(&PathElement::new(vec![(at, y), (at + SWATCH, y)], *swatch)).map_err(failed)?;
        area.draw_text(name, &style, (at + SWATCH + 6 * scale, y)).map_err(failed)?;
        at += wide + 14 * scale;
    }
    Ok(if items.is_empty() { 0 } else { (row + 1) * ROW })
}
