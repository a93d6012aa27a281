//! Curves of runs and schedules, as SVG and PNG. No system font is needed.

use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::files::write_whole;
use super::metrics::{Record, SplitName};
use crate::error::{Error, Result};

/// Colours that people with any colour vision tell apart (Okabe and Ito 2008).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
];
const GREY: RGBColor = RGBColor(128, 128, 128);
const FONT: &str = "sans-serif";
/// Points of a curve at most; longer ones keep the least and the greatest of each stretch.
const POINTS: usize = 1200;
/// Size of one chart.
const CHART: (u32, u32) = (560, 340);

/// A curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// Points from left to right; what is not finite is left out.
    pub points: Vec<(f64, f64)>,
}

/// A chart of curves over one axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// What is shown.
    pub title: String,
    /// What runs to the right.
    pub x: String,
    /// Whether values stand on a logarithmic scale, where all are above 0.
    pub logarithmic: bool,
    /// Horizontal line, such as a clip's bound.
    pub line: Option<f64>,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// A run's name and its records.
pub type NamedRun<'a> = (&'a str, &'a [Record]);

/// The charts of one run or several: loss, accuracy, learning rate, gradient norm, speed. Charts without a point are left out.
pub fn charts(runs: &[NamedRun<'_>], clip: Option<f64>) -> Vec<Chart> {
    let several = runs.len() > 1;
    let named = |run: &str, what: &str| match (several, what) {
        (true, "") => run.to_owned(),
        (true, what) => format!("{run}, {what}"),
        (false, what) => what.to_owned(),
    };
    let curve = |run: &NamedRun<'_>, split: SplitName, what: &str, value: fn(&Record) -> Option<f64>| Curve {
        name: named(run.0, what),
        points: run
            .1
            .iter()
            .filter(|record| record.split == split)
            .filter_map(|record| Some((record.step as f64, value(record)?)))
            .collect(),
    };
    let chart = |title: &str, logarithmic: bool, line: Option<f64>, curves: Vec<Curve>| Chart {
        title: title.to_owned(),
        x: "step".to_owned(),
        logarithmic,
        line,
        curves: curves.into_iter().filter(|c| c.points.iter().any(|p| p.1.is_finite())).collect(),
    };
    let both = |value: fn(&Record) -> Option<f64>| -> Vec<Curve> {
        runs.iter()
            .flat_map(|run| {
                [curve(run, SplitName::Train, "train", value), curve(run, SplitName::Validation, "validation", value)]
            })
            .collect()
    };
    let train = |value: fn(&Record) -> Option<f64>| -> Vec<Curve> {
        runs.iter().map(|run| curve(run, SplitName::Train, "", value)).collect()
    };
    let mut all = vec![
        chart("loss", true, None, both(|r| Some(r.loss))),
        chart("accuracy", false, None, both(|r| r.accuracy)),
        chart("learning rate", false, None, train(|r| r.lr)),
        chart("gradient norm", true, clip, train(|r| r.grad_norm)),
        chart("samples a second", false, None, train(|r| r.samples_per_s)),
        chart("tokens a second", false, None, train(|r| r.tokens_per_s)),
    ];
    all.retain(|chart| !chart.curves.is_empty());
    all
}

/// The chart of a schedule: `rates[step]`.
pub fn schedule_chart(name: &str, rates: &[f64]) -> Chart {
    Chart {
        title: "learning rate".to_owned(),
        x: "step".to_owned(),
        logarithmic: false,
        line: None,
        curves: vec![Curve {
            name: name.to_owned(),
            points: rates.iter().enumerate().map(|(step, &rate)| (step as f64, rate)).collect(),
        }],
    }
}

/// Charts side by side as an SVG picture. With `themed`, text takes the colour of the page around it.
///
/// # Errors
/// What the drawing library reports.
pub fn svg(charts: &[Chart], themed: bool) -> Result<String> {
    let mut text = String::new();
    let size = page_size(charts.len());
    let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
    if !themed {
        area.fill(&WHITE).map_err(failed)?;
    }
    draw(&area, charts, 1)?;
    area.present().map_err(failed)?;
    drop(area);
    if themed {
        let (width, height) = size;
        let sized = format!("width=\"{width}\" height=\"{height}\"");
        text = text.replace("#000000", "currentColor").replacen(&sized, "width=\"100%\"", 1);
    }
    Ok(text)
}

/// Writes charts to a file, SVG or PNG by its ending.
///
/// # Errors
/// Another ending, or what the operating system refuses.
pub fn write(charts: &[Chart], path: &Path) -> Result<()> {
    if charts.is_empty() {
        return Err(Error::data(path, "not written: found no figure to draw, expected a run with records"));
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => write_whole(path, svg(charts, false)?.as_bytes()),
        Some("png") => {
            const SCALE: u32 = 2;
            let (width, height) = page_size(charts.len());
            let (width, height) = (width * SCALE, height * SCALE);
            let mut pixels = vec![0u8; (width * height * 3) as usize];
            let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
            area.fill(&WHITE).map_err(failed)?;
            draw(&area, charts, SCALE)?;
            area.present().map_err(failed)?;
            drop(area);
            let mut bytes = std::io::Cursor::new(Vec::new());
            image::write_buffer_with_format(
                &mut bytes,
                &pixels,
                width,
                height,
                image::ExtendedColorType::Rgb8,
                image::ImageFormat::Png,
            )
            .map_err(failed)?;
            write_whole(path, bytes.get_ref())
        }
        other => Err(Error::config(
            path.display().to_string(),
            format!("found the ending {:?}, expected .svg or .png", other.unwrap_or("")),
        )),
    }
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::Training(format!("cannot draw a plot: {e}"))
}

fn columns(charts: usize) -> u32 {
    if charts > 1 { 2 } else { 1 }
}

fn page_size(charts: usize) -> (u32, u32) {
    let columns = columns(charts);
    (CHART.0 * columns, CHART.1 * (charts as u32).div_ceil(columns).max(1))
}

fn draw<B: DrawingBackend>(area: &DrawingArea<B, Shift>, charts: &[Chart], scale: u32) -> Result<()> {
    static FONTS: Once = Once::new();
    FONTS.call_once(|| {
        // A font that cannot be registered shows as an error of the first text drawn.
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    let columns = columns(charts.len()) as usize;
    let rows = charts.len().div_ceil(columns).max(1);
    for (part, chart) in area.split_evenly((rows, columns)).iter().zip(charts) {
        draw_chart(part, chart, scale)?;
    }
    Ok(())
}

/// The least and the greatest, a little widened; none where nothing is finite.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|v| v.is_finite() && v.abs() < 1e30)
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    (low <= high).then_some((low, high))
}

fn draw_chart<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart, scale: u32) -> Result<()> {
    let all = || chart.curves.iter().flat_map(|c| c.points.iter());
    let (Some((x0, x1)), Some((y0, y1))) = (range(all().map(|p| p.0)), range(all().map(|p| p.1).chain(chart.line)))
    else {
        return Ok(());
    };
    let (x0, x1) = if x1 > x0 { (x0, x1) } else { (x0 - 1.0, x1 + 1.0) };
    // Some decades are worth a logarithmic scale; drawn by hand, so that one code serves both.
    let logarithmic = chart.logarithmic && y0 > 0.0 && y1 / y0 > 20.0;
    let place = move |y: f64| if logarithmic { y.max(1e-300).log10() } else { y };
    let (low, high) = (place(y0), place(y1));
    let margin = if high > low { 0.05 * (high - low) } else { high.abs().max(1e-9) * 0.1 };
    let low = if !logarithmic && low >= 0.0 { (low - margin).max(0.0) } else { low - margin };
    let mut builder = ChartBuilder::on(area);
    builder
        .margin(10 * scale)
        .margin_right(18 * scale)
        .x_label_area_size(34 * scale)
        .y_label_area_size(62 * scale)
        .caption(&chart.title, (FONT, 17 * scale));
    let mut context = builder.build_cartesian_2d(x0..x1, low..high + margin).map_err(failed)?;
    let label = move |y: &f64| number(if logarithmic { 10f64.powf(*y) } else { *y });
    context
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GREY.mix(0.25))
        .axis_style(GREY)
        .x_desc(&chart.x)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&label)
        .label_style((FONT, 12 * scale, &BLACK))
        .axis_desc_style((FONT, 12 * scale, &BLACK))
        .draw()
        .map_err(failed)?;
    if let Some(line) = chart.line {
        let ends = [(x0, place(line)), (x1, place(line))];
        context.draw_series(LineSeries::new(ends, GREY.stroke_width(scale))).map_err(failed)?;
    }
    let named = chart.curves.iter().any(|c| !c.name.is_empty());
    // The legend stands where curves most likely do not: they end high, or low.
    let ends = chart.curves.iter().filter_map(|c| c.points.last()).map(|p| place(p.1)).filter(|y| y.is_finite());
    let rises = ends.fold(f64::NEG_INFINITY, f64::max) > (low + high) / 2.0;
    for (i, curve) in chart.curves.iter().enumerate() {
        draw_curve(&mut context, curve, COLORS[i % COLORS.len()], scale, &place)?;
    }
    if named {
        context
            .configure_series_labels()
            .position(if rises { SeriesLabelPosition::LowerRight } else { SeriesLabelPosition::UpperRight })
            .background_style(GREY.mix(0.08))
            .label_font((FONT, 12 * scale, &BLACK))
            .legend_area_size(22 * scale)
            .margin(6 * scale)
            .draw()
            .map_err(failed)?;
    }
    Ok(())
}

type Context<'a, B> = ChartContext<'a, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn draw_curve<B: DrawingBackend>(
    context: &mut Context<'_, B>,
    curve: &Curve,
    color: RGBColor,
    scale: u32,
    place: &impl Fn(f64) -> f64,
) -> Result<()> {
    let points: Vec<(f64, f64)> = thinned(&curve.points).into_iter().map(|(x, y)| (x, place(y))).collect();
    let style = color.stroke_width(2 * scale);
    let drawn = match points.as_slice() {
        // One point is a dot, as are few: an evaluation at the end alone must show.
        [_] => {
            context.draw_series(points.iter().map(|&p| Circle::new(p, 3 * scale, color.filled()))).map_err(failed)?
        }
        _ => context.draw_series(LineSeries::new(points, style)).map_err(failed)?,
    };
    if !curve.name.is_empty() {
        let length = 18 * scale as i32;
        drawn
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + length, y)], color.stroke_width(2 * scale)));
    }
    Ok(())
}

/// At most [`POINTS`] points: of each stretch the least and the greatest, in their order. What is not finite is left out.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite() && p.1.abs() < 1e30).collect();
    if finite.len() <= POINTS {
        return finite;
    }
    let stretch = finite.len().div_ceil(POINTS / 2);
    let mut kept = Vec::with_capacity(POINTS + 2);
    for part in finite.chunks(stretch) {
        let least = part.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(i, _)| i);
        let greatest = part.iter().enumerate().max_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(i, _)| i);
        kept.push(part[least.min(greatest)]);
        if least != greatest {
            kept.push(part[least.max(greatest)]);
        }
    }
    kept
}

/// A number for an axis: `1500`, `0.25`, `3e-4`, `2M`.
fn number(value: f64) -> String {
    let magnitude = value.abs();
    let trimmed = |text: String| {
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    if magnitude < 1e-12 {
        "0".to_owned()
    } else if magnitude >= 1e6 {
        trimmed(format!("{:.2}", value / 1e6)) + "M"
    } else if magnitude >= 1e4 {
        trimmed(format!("{:.1}", value / 1e3)) + "k"
    } else if magnitude >= 100.0 {
        format!("{value:.0}")
    } else if magnitude >= 1.0 {
        trimmed(format!("{value:.2}"))
    } else if magnitude >= 1e-2 {
        trimmed(format!("{value:.3}"))
    } else {
        let text = format!("{value:.1e}");
        text.replace(".0e", "e")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        Chart {
            title: "loss".into(),
            x: "step".into(),
            logarithmic: true,
            line: Some(1.0),
            curves: vec![Curve { name: "a".into(), points }],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_figures_can_be_drawn(ys in prop::collection::vec(prop::num::f64::ANY, 0..40)) {
            let points = ys.iter().enumerate().map(|(i, &y)| (i as f64, y)).collect();
            let text = svg(&[chart(points)], true).unwrap();
            prop_assert!(text.starts_with("<svg"));
        }
    }

    #[test]
    fn thinning_keeps_the_extremes() {
        let points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), f64::from((i * 7919) % 1000))).collect();
        let kept = thinned(&points);
        assert!(kept.len() <= POINTS + 2);
        assert_eq!(range(kept.iter().map(|p| p.1)), Some((0.0, 999.0)));
    }

    #[test]
    fn another_ending_is_refused() {
        let wrong = write(&[chart(vec![(0.0, 1.0)])], Path::new("x.gif")).unwrap_err().to_string();
        assert!(wrong.contains(".svg or .png"), "{wrong}");
    }
}
