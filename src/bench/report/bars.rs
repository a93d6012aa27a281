//! Bars: each figure against its floor, and each peer against us.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::super::results::{Figure, PeerFigure};
use super::super::table;
use super::canvas::{Area, UNIT, WIDTH, bar, color, line, pale, shortened, words};
use crate::error::Result;
use crate::train::plot::axis::Axis;
use crate::train::plot::draw::{COLORS, GREY};
use crate::train::plot::picture;

/// Where bars begin and end, in units.
const LEFT: i32 = 330;
const RIGHT: i32 = 770;
/// Height of a row, and of a bar within it.
const ROW: i32 = 24;
const BAR: i32 = 14;
/// Room above the first row, and below the last.
const TOP: i32 = 34;
const BOTTOM: i32 = 10;
/// Letters of a name, and of what stands behind a bar.
const NAME: usize = 48;
const REMARK: usize = 54;

/// A row of a picture of bars.
enum Row {
    /// A heading.
    Heading(String),
    /// A name, the bar's value with its quartiles, what stands behind it; hollow where it is not to be quoted.
    Bar { name: String, value: [f64; 3], remark: String, color: RGBColor, hollow: bool },
    /// A name, and why it has no bar.
    Without(String, String),
}

/// The speed of each figure as a share of what its floor allows; nothing where no figure has a floor.
pub(super) fn against_floor(figures: &[Figure]) -> Result<Option<String>> {
    let mut rows = Vec::new();
    let mut suite = "";
    for figure in figures {
        let Some(floor) = figure.floor.as_ref().filter(|_| figure.seconds.count > 0) else { continue };
        if suite != figure.suite {
            suite = &figure.suite;
            rows.push(Row::Heading(suite.to_owned()));
        }
        let share = |seconds: f64| 100.0 * floor.seconds / seconds;
        let times = &figure.seconds;
        let share = [share(times.upper_quartile), share(times.median), share(times.lower_quartile)];
        let doubt = if figure.refused.is_some() { ", refused" } else { "" };
        rows.push(Row::Bar {
            name: figure.name.clone(),
            value: share,
            remark: format!(
                "{:.0} %: {} of {}{doubt}",
                share[1],
                table::seconds(floor.seconds),
                table::seconds(times.median)
            ),
            color: color(suite),
            hollow: figure.refused.is_some(),
        });
    }
    drawn(&rows, 100.0, |value| format!("{value} %"))
}

/// How many times as fast as each peer we are; nothing where there was none.
pub(super) fn against_peers(peers: &[PeerFigure]) -> Result<Option<String>> {
    let mut rows = Vec::new();
    let mut work = String::new();
    for peer in peers {
        if work != peer.work.title() {
            work = peer.work.title();
            rows.push(Row::Heading(work.clone()));
        }
        let ratio = &peer.ratio;
        rows.push(if ratio.count == 0 {
            Row::Without(peer.peer.clone(), peer.refused.clone().unwrap_or_else(|| "no turn was taken".to_owned()))
        } else {
            let doubt = if peer.refused.is_some() { ", refused" } else { "" };
            let (theirs, ours) = (table::seconds(peer.theirs.median), table::seconds(peer.ours.median));
            let spread = format!("{:.2} to {:.2}", ratio.lower_quartile, ratio.upper_quartile);
            Row::Bar {
                name: peer.peer.clone(),
                value: [ratio.lower_quartile, ratio.median, ratio.upper_quartile],
                remark: format!("{:.2}x ({spread}): {theirs} against {ours}{doubt}", ratio.median),
                color: COLORS[if ratio.median < 1.0 { 1 } else { 0 }],
                hollow: peer.refused.is_some(),
            }
        });
    }
    drawn(&rows, 1.0, |value| format!("{value}x"))
}

/// The picture, with a line at `mark`; nothing without rows.
fn drawn(rows: &[Row], mark: f64, tick: impl Fn(&str) -> String) -> Result<Option<String>> {
    if rows.is_empty() {
        return Ok(None);
    }
    let values = rows.iter().filter_map(|row| match row {
        Row::Bar { value, .. } if value[2].is_finite() => Some(value[2].max(value[1])),
        _ => None,
    });
    let most = values.fold(1.05 * mark, f64::max);
    let axis = Axis::new(0.0, most, false, false, 6);
    let height = TOP + BOTTOM + ROW * rows.len() as i32;
    let size = ((WIDTH * UNIT) as u32, (height * UNIT) as u32);
    picture(size, true, |area| draw(area, rows, &axis, mark, tick)).map(Some)
}

fn draw(area: &Area<'_, '_>, rows: &[Row], axis: &Axis, mark: f64, tick: impl Fn(&str) -> String) -> Result<()> {
    let at = |value: f64| LEFT + (axis.share(value) * f64::from(RIGHT - LEFT)).round() as i32;
    let bottom = TOP + ROW * rows.len() as i32;
    for (value, label) in &axis.ticks {
        line(area, &[(at(*value), TOP - 8), (at(*value), bottom)], GREY.mix(0.25).stroke_width(1))?;
        pale(area, &tick(label), (at(*value), TOP - 18), HPos::Center)?;
    }
    for (i, row) in rows.iter().enumerate() {
        let middle = TOP + ROW * i as i32 + ROW / 2;
        match row {
            Row::Heading(name) => pale(area, name, (8, middle + 3), HPos::Left)?,
            Row::Without(name, why) => {
                words(area, &shortened(name, NAME), (LEFT - 10, middle), HPos::Right)?;
                pale(area, &shortened(&format!("not compared: {why}"), 2 * REMARK), (LEFT + 8, middle), HPos::Left)?;
            }
            Row::Bar { name, value, remark, color, hollow } => {
                words(area, &shortened(name, NAME), (LEFT - 10, middle), HPos::Right)?;
                let style = if *hollow { color.stroke_width(UNIT as u32) } else { color.filled() };
                let [low, half, high] = value.map(at);
                bar(area, (LEFT, middle - BAR / 2), (half.max(LEFT + 1), middle + BAR / 2), style)?;
                whisker(area, (low, high), middle)?;
                words(area, &shortened(remark, REMARK), (RIGHT + 14, middle), HPos::Left)?;
            }
        }
    }
    line(area, &[(at(mark), TOP - 8), (at(mark), bottom)], BLACK.stroke_width(UNIT as u32))
}

/// From one quartile to the other.
fn whisker(area: &Area<'_, '_>, (low, high): (i32, i32), middle: i32) -> Result<()> {
    let style = BLACK.stroke_width(UNIT as u32);
    line(area, &[(low, middle), (high, middle)], style)?;
    for end in [low, high] {
        line(area, &[(end, middle - 4), (end, middle + 4)], style)?;
    }
    Ok(())
}
