//! Curves of runs and schedules, as SVG and PNG. No system font is needed.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::files::write_whole;
use super::forensics::LAYERS;
use super::metrics::{Record, SplitName};
use crate::error::{Error, Result};

pub(crate) mod axis;
pub(crate) mod draw;
mod points;

use draw::failed;

/// A curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its name in the legend; one without a name is not in it.
    pub name: String,
    /// Points from left to right; where one is not finite, the curve has a gap.
    pub points: Vec<(f64, f64)>,
    /// Which colour of the palette.
    pub color: usize,
    /// How it is drawn.
    pub stroke: Stroke,
}

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stroke {
    /// As what the chart is about.
    Strong,
    /// As what stands beside it.
    Thin,
    /// Pale, behind the others.
    Faint,
}

/// A chart of curves over one axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// What is shown, with its unit.
    pub title: String,
    /// What runs to the right.
    pub x: String,
    /// Whether a logarithmic scale is allowed; it is used where all values are above 0 and some multiples apart.
    pub logarithmic: bool,
    /// The most that a value can be, such as 100 %.
    pub most: Option<f64>,
    /// A horizontal line and its name, such as a clip's bound.
    pub line: Option<(f64, String)>,
    /// Steps that were skipped: vertical lines.
    pub marks: Vec<f64>,
    /// The curves.
    pub curves: Vec<Curve>,
}

impl Chart {
    fn over_steps(title: &str, curves: Vec<Curve>) -> Self {
        Chart {
            title: title.to_owned(),
            x: "step".to_owned(),
            logarithmic: false,
            most: None,
            line: None,
            marks: Vec::new(),
            curves,
        }
    }
}

/// A run's name and its records.
pub type NamedRun<'a> = (&'a str, &'a [Record]);

/// From this many points on, a noisy curve is smoothed.
const NOISY: usize = 80;

type Figure = fn(&Record) -> Option<f64>;

/// The charts of one run or several: loss, accuracy, learning rate, gradient norm (and of one run its shares by layer), speed.
/// Charts without a figure are left out. `clip` is the bound of the clip by global norm.
///
/// One run has a colour a split. Of several runs each has a colour, dashed from the eighth on: strong for validation, thin for training.
pub fn charts(runs: &[NamedRun<'_>], clip: Option<f64>) -> Vec<Chart> {
    let loss: Figure = |r| Some(r.loss);
    let accuracy: Figure = |r| r.accuracy.map(|a| 100.0 * a);
    let loss = Chart { logarithmic: true, ..Chart::over_steps("Loss", by_split(runs, loss)) };
    let accuracy = Chart { most: Some(100.0), ..Chart::over_steps("Accuracy (%)", by_split(runs, accuracy)) };
    let norm = Chart {
        logarithmic: true,
        line: clip.map(|clip| (clip, format!("clip at {clip}"))),
        marks: if runs.len() == 1 { skipped(runs[0].1) } else { Vec::new() },
        ..Chart::over_steps("Gradient norm", training(runs, |r| r.grad_norm))
    };
    let mut all = vec![
        loss,
        accuracy,
        norm,
        Chart { most: Some(100.0), ..Chart::over_steps("Share of the squared gradient norm (%)", shares(runs)) },
        Chart::over_steps("Learning rate", training(runs, |r| r.lr)),
        Chart::over_steps("Samples a second", training(runs, |r| r.samples_per_s)),
        Chart::over_steps("Tokens a second", training(runs, |r| r.tokens_per_s)),
        Chart::over_steps("Model FLOP utilization (%)", training(runs, |r| Some(100.0 * r.mfu?))),
    ];
    all.retain(|chart| chart.curves.iter().any(|c| c.points.iter().any(points::drawable)));
    all
}

fn figures(records: &[Record], split: SplitName, figure: Figure) -> Vec<(f64, f64)> {
    let of_split = records.iter().filter(|record| record.split == split);
    of_split.filter_map(|record| Some((record.step as f64, figure(record)?))).collect()
}

/// Curves of the splits of every run.
fn by_split(runs: &[NamedRun<'_>], figure: Figure) -> Vec<Curve> {
    let mut curves = Vec::new();
    for (i, (name, records)) in runs.iter().enumerate() {
        let several = runs.len() > 1;
        let train = figures(records, SplitName::Train, figure);
        let validation = figures(records, SplitName::Validation, figure);
        let noisy = train.len() >= NOISY;
        let named = |split: &str| if several { format!("{name}, {split}") } else { split.to_owned() };
        let thin = if several && !validation.is_empty() { Stroke::Thin } else { Stroke::Strong };
        if noisy && !several {
            curves.push(Curve { name: String::new(), points: train.clone(), color: i, stroke: Stroke::Faint });
        }
        let (train, split) = if noisy { (points::smoothed(&train), "train (smoothed)") } else { (train, "train") };
        curves.push(Curve { name: named(split), points: train, color: i, stroke: thin });
        let color = if several { i } else { 1 };
        curves.push(Curve { name: named("validation"), points: validation, color, stroke: Stroke::Strong });
        if !several {
            let test = figures(records, SplitName::Test, figure);
            curves.push(Curve { name: named("test"), points: test, color: 2, stroke: Stroke::Strong });
        }
    }
    curves.retain(|curve| !curve.points.is_empty());
    curves
}

/// Curves of what training alone has.
fn training(runs: &[NamedRun<'_>], figure: Figure) -> Vec<Curve> {
    let name = |name: &str| if runs.len() > 1 { name.to_owned() } else { String::new() };
    let curve = |(i, run): (usize, &NamedRun<'_>)| Curve {
        name: name(run.0),
        points: figures(run.1, SplitName::Train, figure),
        color: i,
        stroke: Stroke::Thin,
    };
    runs.iter().enumerate().map(curve).filter(|curve| !curve.points.is_empty()).collect()
}

/// Curves of the layers with the largest shares of the gradient norm, of one run. A record names its largest alone: where a layer is
/// not among them, its curve has a gap.
fn shares(runs: &[NamedRun<'_>]) -> Vec<Curve> {
    let [(_, records)] = runs else { return Vec::new() };
    let recorded: Vec<_> = records.iter().filter_map(|r| Some((r.step as f64, r.norm_share.as_ref()?))).collect();
    let mut sums: Vec<(&str, f64)> = Vec::new();
    for (name, share) in recorded.iter().flat_map(|(_, shares)| &shares.0) {
        match sums.iter_mut().find(|(known, _)| known == name) {
            Some((_, sum)) => *sum += share,
            None => sums.push((name, *share)),
        }
    }
    sums.sort_by(|a, b| b.1.total_cmp(&a.1));
    let curve = |(color, (name, _)): (usize, &(&str, f64))| Curve {
        name: (*name).to_owned(),
        points: recorded.iter().map(|(step, s)| (*step, s.of(name).map_or(f64::NAN, |share| 100.0 * share))).collect(),
        color,
        stroke: Stroke::Thin,
    };
    sums.iter().take(LAYERS).enumerate().map(curve).collect()
}

/// Steps at whose record more steps had been skipped than at the one before.
fn skipped(records: &[Record]) -> Vec<f64> {
    let mut before = 0;
    let mut marks = Vec::new();
    for record in records.iter().filter(|r| r.split == SplitName::Train) {
        if record.skipped > before {
            marks.push(record.step as f64);
        }
        before = record.skipped;
    }
    marks
}

/// The chart of a schedule: `rates[step]`.
pub fn schedule_chart(name: &str, rates: &[f64]) -> Chart {
    let points = rates.iter().enumerate().map(|(step, &rate)| (step as f64, rate)).collect();
    let curve = Curve { name: name.to_owned(), points, color: 0, stroke: Stroke::Strong };
    Chart::over_steps("Learning rate", vec![curve])
}

/// Charts side by side as an SVG picture. With `themed`, text takes the colour and the font of the page around it, and the
/// picture fills the width it is given.
///
/// # Errors
/// What the drawing library reports.
pub fn svg(charts: &[Chart], themed: bool) -> Result<String> {
    picture(draw::page_size(charts)?, themed, |area| draw::page(area, charts))
}

/// What `draw` draws as an SVG picture of so many pixels.
pub(crate) fn picture(
    (width, height): (u32, u32),
    themed: bool,
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<()>,
) -> Result<String> {
    draw::fonts();
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
    if !themed {
        area.fill(&WHITE).map_err(failed)?;
    }
    draw(&area)?;
    area.present().map_err(failed)?;
    drop(area);
    let drawn = format!("width=\"{width}\" height=\"{height}\"");
    if themed {
        let text = text.replacen(&drawn, "width=\"100%\" role=\"img\"", 1);
        return Ok(text.replace("#000000", "currentColor").replace("font-family=\"sans-serif\" ", ""));
    }
    let shown = format!("width=\"{}\" height=\"{}\"", width / draw::SCALE, height / draw::SCALE);
    Ok(text.replacen(&drawn, &shown, 1))
}

/// Charts side by side as a PNG picture, two pixels a unit.
///
/// # Errors
/// What the drawing library reports.
pub fn png(charts: &[Chart]) -> Result<Vec<u8>> {
    let (width, height) = draw::page_size(charts)?;
    let mut pixels = vec![0u8; width as usize * height as usize * 3];
    let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    draw::page(&area, charts)?;
    area.present().map_err(failed)?;
    drop(area);
    let mut bytes = std::io::Cursor::new(Vec::new());
    let (color, format) = (image::ExtendedColorType::Rgb8, image::ImageFormat::Png);
    image::write_buffer_with_format(&mut bytes, &pixels, width, height, color, format).map_err(failed)?;
    Ok(bytes.into_inner())
}

/// Writes charts to a file, SVG or PNG by its ending.
///
/// # Errors
/// Another ending, nothing to draw, or what the operating system refuses.
pub fn write(charts: &[Chart], path: &Path) -> Result<()> {
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if !["svg", "png"].contains(&ending.as_str()) {
        let problem = format!("found the ending {ending:?}, expected .svg or .png");
        return Err(Error::config(path.display().to_string(), problem));
    }
    if charts.is_empty() {
        return Err(Error::data(path, "not written: found no figure to draw, expected a run with records"));
    }
    let bytes = if ending == "svg" { svg(charts, false)?.into_bytes() } else { png(charts)? };
    write_whole(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let curve = Curve { name: "a".into(), points, color: 0, stroke: Stroke::Strong };
        Chart { logarithmic: true, line: Some((1.0, "bound".into())), ..Chart::over_steps("loss", vec![curve]) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_figures_can_be_drawn(points in prop::collection::vec((prop::num::f64::ANY, prop::num::f64::ANY), 0..40)) {
            let text = svg(&[chart(points.clone())], true).unwrap();
            prop_assert!(text.starts_with("<svg"));
            let steps = points.iter().enumerate().map(|(i, p)| (i as f64, p.1)).collect();
            prop_assert!(svg(&[chart(steps), chart(points)], false).unwrap().ends_with("</svg>\n"));
        }
    }

    #[test]
    fn nothing_or_one_point_can_be_drawn_as_a_bitmap() {
        for points in [vec![], vec![(5.0, 2.0)], vec![(0.0, f64::NAN)], vec![(0.0, 0.0), (1.0, 0.0)]] {
            assert!(png(&[chart(points)]).unwrap().starts_with(b"\x89PNG"));
        }
    }

    #[test]
    fn a_figure_without_neighbours_is_as_thin_as_its_curve_and_one_alone_is_seen() {
        let dots = |points: &[f64], stroke| {
            let points = points.iter().enumerate().map(|(i, y)| (i as f64, *y)).collect();
            let curve = Curve { name: "a".into(), points, color: 0, stroke };
            let text = svg(&[Chart::over_steps("loss", vec![curve])], false).unwrap();
            let radius = |part: &str| part.split_once('"').unwrap().0.parse::<i32>().unwrap();
            text.split(" r=\"").skip(1).map(radius).collect::<Vec<_>>()
        };
        let gaps = [1.0, 2.0, f64::NAN, 3.0, f64::NAN, 2.0];
        let (thin, strong) = (dots(&gaps, Stroke::Thin), dots(&gaps, Stroke::Strong));
        assert_eq!((thin.len(), strong.len()), (2, 2));
        assert!(thin.iter().zip(&strong).all(|(thin, strong)| 4 * thin == *strong), "{thin:?} {strong:?}");
        assert_eq!(dots(&[1.0], Stroke::Thin), strong[..1]);
    }

    #[test]
    fn another_ending_is_refused() {
        let wrong = write(&[chart(vec![(0.0, 1.0)])], Path::new("x.gif")).unwrap_err().to_string();
        assert!(wrong.contains(".svg or .png"), "{wrong}");
    }
}
