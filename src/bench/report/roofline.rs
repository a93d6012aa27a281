//! The roofline (Williams, Waterman, Patterson 2009): what the memory and the arithmetic of this device allow at each arithmetic
//! intensity, both as this run measured them, and where the figures lie beneath.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::super::results::{Figure, Results};
use super::canvas::{Area, UNIT, WIDTH, color, line, words};
use crate::error::Result;
use crate::train::plot::axis::Axis;
use crate::train::plot::draw::{GREY, failed, text};
use crate::train::plot::picture;

const HEIGHT: i32 = 480;
const LEFT: i32 = 70;
const RIGHT: i32 = WIDTH - 24;
const TOP: i32 = 40;
const BOTTOM: i32 = HEIGHT - 52;
/// Half a point's width.
const DOT: i32 = 4;

/// A figure with bytes and operations.
pub(super) struct Point<'a> {
    /// Whose.
    pub figure: &'a Figure,
    /// Operations a byte.
    pub intensity: f64,
    /// Operations a second.
    pub speed: f64,
}

/// What bounds the points of a precision.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Roof {
    /// Of products; empty where it is that of all points.
    pub precision: String,
    /// Bytes a second of the fastest pass through the memory.
    pub memory: Option<f64>,
    /// Operations a second of the fastest product.
    pub product: Option<f64>,
}

impl Roof {
    /// Operations a second that it allows at an intensity.
    fn at(&self, intensity: f64) -> Option<f64> {
        match (self.memory.map(|memory| memory * intensity), self.product) {
            (Some(memory), Some(product)) => Some(memory.min(product)),
            (memory, product) => memory.or(product),
        }
    }

    /// Operations a byte where both bounds meet.
    fn ridge(&self) -> Option<f64> {
        self.memory.zip(self.product).map(|(memory, product)| product / memory)
    }

    /// Whether a figure is bounded by it: names of figures tell their precision, but where a device has one alone.
    fn is_over(&self, figure: &Figure) -> bool {
        self.precision.is_empty()
            || figure.name.split('/').any(|part| part.strip_suffix("_alone").unwrap_or(part) == self.precision)
    }
}

/// One a precision.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Roofs(Vec<Roof>);

impl Roofs {
    /// Operations a second that its roof allows a point.
    pub fn over(&self, point: &Point<'_>) -> Option<f64> {
        let named = self.0.iter().find(|roof| roof.is_over(point.figure));
        named.or(self.0.first())?.at(point.intensity)
    }
}

/// The figures that have a place in the plot, in their order.
pub(super) fn points(figures: &[Figure]) -> Vec<Point<'_>> {
    figures.iter().filter_map(point).collect()
}

fn point(figure: &Figure) -> Option<Point<'_>> {
    let (intensity, speed) = (figure.flops? / figure.bytes?, figure.flops? / figure.seconds.median);
    let usable = |value: f64| value.is_finite() && value > 0.0;
    (usable(intensity) && usable(speed)).then_some(Point { figure, intensity, speed })
}

/// The roofs over these points, as the run has measured them for its floors; in results that do not hold these, as the suite `device`
/// has measured them.
pub(super) fn roofs(results: &Results, points: &[Point<'_>]) -> Roofs {
    let usable = |speed: f64| (speed.is_finite() && speed > 0.0).then_some(speed);
    let limits = &results.machine.limits;
    let mut roofs: Vec<Roof> = limits
        .iter()
        .map(|limits| Roof {
            precision: if results.machine.limits.len() > 1 { limits.precision.clone() } else { String::new() },
            memory: usable(limits.copy.max(limits.in_place)),
            product: usable(limits.product),
        })
        .collect();
    // A precision that no point is of would draw a roof over nothing.
    roofs.retain(|roof| points.iter().any(|point| roof.is_over(point.figure)));
    if !roofs.is_empty() {
        return Roofs(roofs);
    }
    let measured =
        |figure: &&Figure| figure.suite == "device" && figure.refused.is_none() && figure.seconds.median > 0.0;
    let device = || results.figures.iter().filter(measured);
    let memory = device().find(|figure| figure.name == "copy/memory");
    let products = device().filter(|figure| figure.name.starts_with("product/"));
    let product = products.filter_map(|figure| Some(figure.flops? / figure.seconds.median)).reduce(f64::max);
    let memory = memory.and_then(|figure| Some(figure.bytes? / figure.seconds.median));
    Roofs(vec![Roof { precision: String::new(), memory, product }])
}

/// Operations a second as people read them, with the unit that suits the largest.
pub(super) fn unit(largest: f64) -> (f64, &'static str) {
    if largest >= 1e12 { (1e12, "TFLOP/s") } else { (1e9, "GFLOP/s") }
}

/// The plot; nothing without points. Points bear numbers, from 1 in their order.
pub(super) fn drawn(points: &[Point<'_>], roofs: &Roofs) -> Result<Option<String>> {
    if points.is_empty() {
        return Ok(None);
    }
    let size = ((WIDTH * UNIT) as u32, (HEIGHT * UNIT) as u32);
    picture(size, true, |area| draw(area, points, roofs)).map(Some)
}

/// Where values lie, in units.
struct Field {
    x: Axis,
    y: Axis,
    /// Least and greatest intensity.
    range: (f64, f64),
    /// Least operations a second.
    low: f64,
    /// Operations a second that a value of the vertical axis counts.
    each: f64,
}

impl Field {
    fn new(points: &[Point<'_>], roofs: &Roofs) -> Self {
        let intensities = || points.iter().map(|p| p.intensity).chain(roofs.0.iter().filter_map(Roof::ridge));
        let speeds = || points.iter().map(|p| p.speed).chain(roofs.0.iter().filter_map(|roof| roof.product));
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        let greatest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let range = (least(&mut intensities()) / 3.0, greatest(&mut intensities()) * 4.0);
        let (low, high) = (least(&mut speeds()) / 3.0, greatest(&mut speeds()) * 2.0);
        let each = unit(high).0;
        let axis = |low, high| Axis::new(low, high, true, false, 6);
        Field { x: axis(range.0, range.1), y: axis(low / each, high / each), range, low, each }
    }

    fn at(&self, intensity: f64, speed: f64) -> (i32, i32) {
        let x = LEFT + (self.x.share(intensity) * f64::from(RIGHT - LEFT)).round() as i32;
        (x, BOTTOM - (self.y.share(speed / self.each) * f64::from(BOTTOM - TOP)).round() as i32)
    }
}

fn draw(area: &Area<'_, '_>, points: &[Point<'_>], roofs: &Roofs) -> Result<()> {
    let field = Field::new(points, roofs);
    frame(area, &field)?;
    for (number, each) in roofs.0.iter().enumerate() {
        roof(area, &field, each, number == 0)?;
    }
    legend(area, points)?;
    let places: Vec<(i32, i32)> = points.iter().map(|p| field.at(p.intensity, p.speed)).collect();
    let mut taken: Vec<(i32, i32)> = places.clone();
    for (i, (point, &place)) in points.iter().zip(&places).enumerate() {
        let color = color(&point.figure.suite);
        let style = if point.figure.refused.is_some() { color.stroke_width(UNIT as u32) } else { color.filled() };
        area.draw(&Circle::new((place.0 * UNIT, place.1 * UNIT), DOT * UNIT, style)).map_err(failed)?;
        let label = free_place(place, &taken);
        words(area, &(i + 1).to_string(), label, HPos::Center)?;
        taken.push(label);
    }
    Ok(())
}

/// A place for a point's number where no other point or number stands, if one of those around it is free.
fn free_place(point: (i32, i32), taken: &[(i32, i32)]) -> (i32, i32) {
    let around = [(13, 0), (0, -12), (-13, 0), (0, 13), (12, -10), (-12, -10), (12, 11), (-12, 11), (24, 0), (-24, 0)];
    let free = |place: &(i32, i32)| {
        !taken.iter().any(|other| *other != point && (other.0 - place.0).abs() < 14 && (other.1 - place.1).abs() < 11)
    };
    let mut places = around.iter().map(|(x, y)| (point.0 + x, point.1 + y));
    places.find(free).unwrap_or((point.0 + 13, point.1))
}

fn frame(area: &Area<'_, '_>, field: &Field) -> Result<()> {
    for (value, label) in &field.y.ticks {
        let y = field.at(field.range.0, value * field.each).1;
        line(area, &[(LEFT, y), (RIGHT, y)], GREY.mix(0.25).stroke_width(1))?;
        words(area, label, (LEFT - 8, y), HPos::Right)?;
    }
    for (value, label) in &field.x.ticks {
        let x = field.at(*value, field.each).0;
        line(area, &[(x, TOP), (x, BOTTOM)], GREY.mix(0.15).stroke_width(1))?;
        words(area, label, (x, BOTTOM + 14), HPos::Center)?;
    }
    line(area, &[(LEFT, BOTTOM), (RIGHT, BOTTOM)], GREY.stroke_width(UNIT as u32))?;
    words(area, "arithmetic intensity, operations a byte", ((LEFT + RIGHT) / 2, BOTTOM + 36), HPos::Center)?;
    words(area, unit(field.each).1, (LEFT - 8, TOP - 20), HPos::Right)
}

/// A roof. All lie over the same memory, which bears its name at the first.
fn roof(area: &Area<'_, '_>, field: &Field, roof: &Roof, is_first: bool) -> Result<()> {
    let style = BLACK.stroke_width(UNIT as u32);
    let ridge = roof.ridge();
    let (first, last) = field.range;
    let (each, name) = unit(field.each);
    if let Some(product) = roof.product {
        let from = field.at(ridge.unwrap_or(first), product);
        let to = field.at(last, product);
        line(area, &[from, to], style)?;
        let of = if roof.precision.is_empty() { String::new() } else { format!(" in {}", roof.precision) };
        let told = format!("fastest product{of}, {:.0} {name}", product / each);
        words(area, &told, (to.0 - 6, to.1 - 12), HPos::Right)?;
    }
    if let Some(memory) = roof.memory {
        // From where the slope enters the field, at its side or at its foot.
        let from = first.max(field.low / memory);
        let to = ridge.unwrap_or(last).max(from);
        line(area, &[field.at(from, memory * from), field.at(to, memory * to)], style)?;
        if !is_first {
            return Ok(());
        }
        let middle = from * (to / from).powf(0.4);
        let middle = field.at(middle, memory * middle);
        let told = format!("memory, {:.1} GB/s", memory / 1e9);
        let place = ((middle.0 - 8) * UNIT, (middle.1 - 8) * UNIT);
        area.draw_text(&told, &text(12, HPos::Right, VPos::Bottom), place).map_err(failed)?;
    }
    Ok(())
}

/// Which colour is which suite.
fn legend(area: &Area<'_, '_>, points: &[Point<'_>]) -> Result<()> {
    let mut suites: Vec<&str> = points.iter().map(|point| point.figure.suite.as_str()).collect();
    suites.dedup();
    for (i, suite) in suites.iter().enumerate() {
        let at = (LEFT + 20 + 90 * i as i32, TOP - 20);
        area.draw(&Circle::new((at.0 * UNIT, at.1 * UNIT), DOT * UNIT, color(suite).filled())).map_err(failed)?;
        words(area, suite, (at.0 + 10, at.1), HPos::Left)?;
    }
    Ok(())
}
