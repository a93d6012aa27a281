//! Drawing: one code for SVG and PNG, in pixels of half a unit.

use std::sync::Once;

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::axis::Axis;
use super::points::{drawable, range, stretches};
use super::{Chart, Curve, Stroke};
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
/// Dashes and gaps, in pixels, of curves whose colours are the palette's a second and a third time.
const DASHES: [(i32, i32); 2] = [(7 * SCALE as i32, 4 * SCALE as i32), (2 * SCALE as i32, 3 * SCALE as i32)];
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
/// Rows of a legend that a chart has room for; with more it is higher.
const ROWS: i32 = 2;
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

/// Size of a page of charts in pixels.
///
/// # Errors
/// What the drawing library reports of a text that it measures.
pub(super) fn page_size(charts: &[Chart]) -> Result<(u32, u32)> {
    let columns = if charts.len() > 1 { 2 } else { 1 };
    let height = heights(charts)?.into_iter().sum::<u32>().max(CHART.1 * SCALE);
    Ok((CHART.0 * columns * SCALE, height))
}

/// Heights in pixels of the rows of a page, two charts a row: more than [`CHART`]'s where a legend would take the curves' place.
fn heights(charts: &[Chart]) -> Result<Vec<u32>> {
    let mut heights = Vec::new();
    for (row, pair) in charts.chunks(2).enumerate() {
        let mut most = 0;
        for (column, chart) in pair.iter().enumerate() {
            let places = places(&items(chart), width(charts.len(), 2 * row + column) as i32)?;
            most = most.max(places.last().map_or(0, |(_, row)| row + 1));
        }
        heights.push(CHART.1 * SCALE + ((most - ROWS).max(0) * ROW) as u32);
    }
    Ok(heights)
}

/// Width in pixels of chart number `i` of so many. The last of an odd number of charts is as wide as the page.
fn width(charts: usize, i: usize) -> u32 {
    let alone = i + 1 == charts && i.is_multiple_of(2) && i > 0;
    CHART.0 * SCALE * if alone { 2 } else { 1 }
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
    let mut top = 0;
    for ((row, pair), height) in charts.chunks(2).enumerate().zip(heights(charts)?) {
        for (column, chart) in pair.iter().enumerate() {
            let corner = ((column as u32 * CHART.0 * SCALE) as i32, top as i32);
            let size = (width(charts.len(), 2 * row + column), height);
            draw_chart(&area.clone().shrink(corner, size), chart)?;
        }
        top += height;
    }
    Ok(())
}

/// Text of so many units, and where it stands about its point.
pub(crate) fn text(size: u32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    (FONT, size * SCALE).into_font().color(&BLACK).pos(Pos::new(horizontal, vertical))
}

/// A name as it is drawn: of one line, and not too long. Of a longer one both ends stay: names often differ in their ends alone.
pub(crate) fn fitting(name: &str) -> String {
    let mut letters: Vec<char> = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if letters.len() > LETTERS {
        let end = LETTERS / 2;
        letters.splice(LETTERS - 1 - end..letters.len() - end, ['…']);
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
        let line = Line::of(curve);
        let stretches = stretches(&curve.points);
        // A figure that was taken once must be seen; one without neighbours in a thin curve that goes on elsewhere is as thin as that is.
        let dot = if curve.stroke == Stroke::Strong || stretches.len() == 1 { 4 * scale } else { scale };
        for stretch in stretches {
            let points: Vec<(i32, i32)> = stretch.iter().map(|p| (at_x(p.0), at_y(p.1))).collect();
            match points.as_slice() {
                [point] => area.draw(&Circle::new(*point, dot, color(curve).filled())).map_err(failed)?,
                _ => line.draw(area, points)?,
            }
        }
    }
    Ok(())
}

fn color(curve: &Curve) -> RGBColor {
    COLORS[curve.color % COLORS.len()]
}

/// How a line is drawn.
struct Line {
    style: ShapeStyle,
    dashes: Option<(i32, i32)>,
}

impl Line {
    fn of(curve: &Curve) -> Self {
        let color = color(curve);
        let style = match curve.stroke {
            Stroke::Strong => color.stroke_width(2 * SCALE),
            Stroke::Thin => color.stroke_width(SCALE),
            Stroke::Faint => color.mix(0.3).stroke_width(SCALE),
        };
        let round = curve.color / COLORS.len() % (DASHES.len() + 1);
        Line { style, dashes: round.checked_sub(1).map(|dashed| DASHES[dashed]) }
    }

    fn solid(style: ShapeStyle) -> Self {
        Line { style, dashes: None }
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, points: Vec<(i32, i32)>) -> Result<()> {
        match self.dashes {
            None => area.draw(&PathElement::new(points, self.style)),
            Some((dash, gap)) => area.draw(&DashedPathElement::new(points, dash, gap, self.style)),
        }
        .map_err(failed)
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
        let span = match (y1 - y0, y1.abs()) {
            (0.0, 0.0) => 1.0,
            (0.0, size) => size,
            (span, _) => span,
        };
        let from_zero = y0 >= 0.0 && (y0 < 0.35 * y1 || y0 == y1);
        let low = if from_zero { 0.0 } else { y0 - 0.06 * span };
        let high = y1 + 0.06 * span;
        (low, chart.most.filter(|most| y1 <= *most).map_or(high, |most| high.min(most)))
    };
    let ticks = (width / (68 * SCALE as i32)).max(2) as usize;
    let mut y = Axis::new(low, high, logarithmic, false, 7);
    // Figures that differ in far digits alone: their curve is as good as flat, on a scale that can be written.
    let (mut low, mut high) = (low, high);
    while !y.is_legible() && high - low < y0.abs().max(y1.abs()) {
        let span = high - low;
        low = if y0 >= 0.0 { (low - 0.5 * span).max(0.0) } else { low - 0.5 * span };
        high = chart.most.filter(|most| y1 <= *most).map_or(high + 0.5 * span, |most| most.min(high + 0.5 * span));
        y = Axis::new(low, high, false, false, 7);
    }
    (Axis::new(x0, x1, false, true, ticks), y)
}

/// What the legend names, and how each is drawn.
fn items(chart: &Chart) -> Vec<(String, Line)> {
    let named = chart.curves.iter().filter(|curve| !curve.name.is_empty());
    let mut items: Vec<(String, Line)> = named.map(|curve| (fitting(&curve.name), Line::of(curve))).collect();
    if let Some((_, name)) = &chart.line {
        items.push((fitting(name), Line::solid(GREY.stroke_width(SCALE))));
    }
    if !chart.marks.is_empty() {
        items.push(("skipped".to_owned(), Line::solid(MARK.mix(0.5).stroke_width(SCALE))));
    }
    items
}

/// Where the items of a legend stand in a chart of this width: pixels from the left, and the row.
fn places(items: &[(String, Line)], width: i32) -> Result<Vec<(i32, i32)>> {
    fonts();
    let scale = SCALE as i32;
    let start = 14 * scale;
    let (mut at, mut row) = (start, 0);
    let mut places = Vec::new();
    for (name, _) in items {
        let measured = text(12, HPos::Left, VPos::Center).font.box_size(name).map_err(failed)?.0;
        let wide = SWATCH + 6 * scale + (f64::from(measured) * WIDER) as i32;
        if at > start && at + wide > width - RIGHT {
            (at, row) = (start, row + 1);
        }
        places.push((at, row));
        at += wide + 14 * scale;
    }
    Ok(places)
}

/// Draws the legend under the title; returns its height in pixels.
fn legend<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart, width: i32) -> Result<i32> {
    let scale = SCALE as i32;
    let items = items(chart);
    let places = places(&items, width)?;
    for ((name, swatch), (at, row)) in items.iter().zip(&places) {
        let y = 38 * scale + row * ROW;
        swatch.draw(area, vec![(*at, y), (at + SWATCH, y)])?;
        let style = text(12, HPos::Left, VPos::Center);
        area.draw_text(name, &style, (at + SWATCH + 6 * scale, y)).map_err(failed)?;
    }
    Ok(places.last().map_or(0, |(_, row)| (row + 1) * ROW))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::plot::svg;

    fn chart(curves: usize, points: &[(f64, f64)]) -> Chart {
        let curve = |i| Curve {
            name: format!("a run of a name that is not short, number {i}, train"),
            points: points.to_vec(),
            color: i,
            stroke: Stroke::Thin,
        };
        Chart {
            title: "Loss".into(),
            x: "step".into(),
            logarithmic: true,
            most: None,
            line: None,
            marks: Vec::new(),
            curves: (0..curves).map(curve).collect(),
        }
    }

    /// Numbers that stand between `before` and `after` in a text.
    fn numbers(text: &str, before: &str, after: &str) -> Vec<i32> {
        let found = text.split(before).skip(1).filter_map(|rest| rest.split(after).next());
        found.flat_map(|values| values.split([',', ' ']).filter_map(|value| value.parse().ok())).collect()
    }

    #[test]
    fn curves_lie_under_their_legend_however_many_it_names() {
        for curves in [1, 3, 28, 200] {
            let text = svg(&[chart(curves, &[(0.0, 3.0), (10.0, 1.0)])], false).unwrap();
            let height = numbers(&text, "viewBox=\"0 0 960 ", "\"")[0];
            let named: Vec<i32> = text
                .split("<text ")
                .filter(|part| part.contains("a run of a"))
                .flat_map(|part| numbers(part, " y=\"", "\""))
                .collect();
            assert_eq!(named.len(), curves);
            let lines: Vec<&str> = text.split("<polyline ").skip(1).filter(|part| part.contains("#0072B2")).collect();
            let drawn = lines.iter().flat_map(|part| numbers(part, "points=\"", "\"").into_iter().skip(1).step_by(2));
            // The first swatch is of that colour too.
            let low = drawn.clone().max().unwrap();
            assert!(named.iter().all(|&y| y < low && y < height), "{curves} curves: {named:?} over {low} of {height}");
            assert!(
                low < height - BOTTOM + 1 && height - low < 150 * SCALE as i32,
                "{curves} curves: {low} of {height}"
            );
        }
    }

    #[test]
    fn curves_of_one_colour_differ_in_their_dashes() {
        // A curve, and its swatch in the legend.
        let drawn = |curves: usize| {
            let text = svg(&[chart(curves, &[(0.0, 3.0), (10.0, 1.0)])], false).unwrap();
            text.split("<polyline ").skip(1).filter(|part| part.contains("#0072B2")).count()
        };
        let [first, second, third] = [1, 8, 15].map(drawn);
        assert_eq!(first, 2);
        assert!(second - first > 20 && third - second > 2 * (second - first), "{first}, {second}, {third}");
        let dashed: Vec<_> =
            (0..21).map(|color| Line::of(&Curve { color, ..chart(1, &[]).curves.remove(0) })).collect();
        for (i, one) in dashed.iter().enumerate() {
            assert!(dashed[..i].iter().all(|other| (one.style.color, one.dashes) != (other.style.color, other.dashes)));
        }
    }

    #[test]
    fn labels_of_figures_that_hardly_differ_can_be_read() {
        let near =
            [(0.0, 0.0), (1e6, 1e6 + 0.02), (123_456.001, 123_456.019), (1.5e10, 1.5001e10), (-3.0, -3.0 + 1e-13)];
        for (low, high) in near.into_iter().chain([(100.0 - 1e-9, 100.0), (1e-12, 1e-12), (2.5001, 2.5002), (1e8, 1e8)])
        {
            let (_, y) = axes((0.0, 10.0), (low, high), &chart(1, &[]), 960);
            assert!(y.ticks.len() > 1 && y.is_legible(), "{low} to {high}: {:?}", y.ticks);
            assert!(y.share(low) < 1.0 && y.share(high) > 0.0 || low == high, "{low} to {high}");
        }
        let (_, y) = axes((0.0, 10.0), (2.5001, 2.5002), &chart(1, &[]), 960);
        assert!(y.share(2.5002) - y.share(2.5001) > 0.8, "what can be told apart is");
    }

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(fitting("short\nname"), "short name");
        let name = format!("digits{}, validation", "-x".repeat(40));
        let drawn = fitting(&name);
        assert_eq!(drawn.chars().count(), LETTERS);
        assert!(drawn.starts_with("digits-x") && drawn.ends_with("-x, validation") && drawn.contains('…'), "{drawn}");
    }
}
