//! report.html: one self-contained page about a run.

use std::path::Path;

use super::files::write_whole;
use super::metrics::{Record, SplitName, read_metrics};
use super::plot::{charts, svg};
use super::progress::{duration, rounded};
use super::run::{Event, Observer};
use super::summary::{Scores, Summary};
use crate::error::{Error, Result};
use crate::text::{self, grouped};

/// Writes report.html at the end of a run.
#[derive(Debug)]
pub struct Report {
    folder: std::path::PathBuf,
    /// Bound of the norm clip, drawn into the chart of gradient norms.
    pub clip: Option<f64>,
}

impl Report {
    /// Writes once the run has ended.
    pub fn new(clip: Option<f64>) -> Self {
        Report { folder: std::path::PathBuf::new(), clip }
    }
}

impl Observer for Report {
    fn event(&mut self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::Started(started) => {
                started.folder.clone_into(&mut self.folder);
                Ok(())
            }
            Event::Finished(_) => write(&self.folder, self.clip),
            Event::Record(_) | Event::Checkpoint(_) | Event::Note(_) => Ok(()),
        }
    }
}

/// Writes report.html of the run in `folder`, from its config.toml, metrics.jsonl and summary.json.
///
/// # Errors
/// A file of these that cannot be read, or what the operating system refuses.
pub fn write(folder: &Path, clip: Option<f64>) -> Result<()> {
    let records = read_metrics(&folder.join("metrics.jsonl"))?;
    let summary = Summary::read(&folder.join("summary.json"))?;
    let file = folder.join("config.toml");
    let config = std::fs::read_to_string(&file).map_err(|e| Error::io("read", &file, e))?;
    let name = folder.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned());
    let page = page(&name, &summary, &records, &config, clip)?;
    write_whole(&folder.join("report.html"), page.as_bytes())
}

/// Text as it must stand in HTML.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn figure(name: &str, value: &str) -> String {
    format!("<div class=figure><b>{}</b><span>{}</span></div>", escaped(value), escaped(name))
}

fn percent(accuracy: f64) -> String {
    format!("{:.2} %", 100.0 * accuracy)
}

fn score_row(name: &str, scores: Option<Scores>) -> String {
    let Some(Scores { loss, accuracy }) = scores else { return String::new() };
    let loss = loss.map_or_else(|| "not finite".to_owned(), text::loss);
    let accuracy = accuracy.map_or_else(|| "–".to_owned(), percent);
    format!("<tr><th>{}</th><td>{loss}</td><td>{accuracy}</td></tr>", escaped(name))
}

fn page(name: &str, summary: &Summary, records: &[Record], config: &str, clip: Option<f64>) -> Result<String> {
    let shown = [("test", summary.last.test), ("validation", summary.last.validation), ("train", summary.last.train)];
    let mut figures = String::new();
    if let Some((split, Scores { loss, accuracy })) = shown.into_iter().find_map(|(n, s)| Some((n, s?))) {
        if let Some(accuracy) = accuracy {
            figures += &figure(&format!("{split} accuracy"), &percent(accuracy));
        }
        if let Some(loss) = loss {
            figures += &figure(&format!("{split} loss"), &text::loss(loss));
        }
    }
    figures += &figure("parameters", &grouped(summary.parameters as u64));
    figures += &figure("steps", &grouped(summary.steps));
    figures += &figure("time", &duration(summary.seconds));
    figures += &figure("steps a second", &rounded(summary.steps_per_s));
    let best = summary.best;
    let mut rows = score_row("train", summary.last.train)
        + &score_row("validation", summary.last.validation)
        + &score_row("test", summary.last.test);
    if best.step != summary.last.step {
        rows += &score_row(&format!("best (step {}), validation", grouped(best.step)), best.validation);
        rows += &score_row(&format!("best (step {}), test", grouped(best.step)), best.test);
    }
    let memory = summary.peak_memory_bytes.map_or_else(|| "not known".to_owned(), |b| format!("{} MiB", b >> 20));
    let training = || records.iter().filter(|r| r.split == SplitName::Train);
    let mean = |figures: Vec<f64>, none: &str| {
        if figures.is_empty() { none.to_owned() } else { percent(figures.iter().sum::<f64>() / figures.len() as f64) }
    };
    let clipped = mean(training().filter_map(|r| r.clipped).collect(), "no norm clip");
    let clamped = mean(training().filter_map(|r| r.clamped).collect(), "no value clip");
    let shadow = training().filter_map(|r| r.shadow_ulp).reduce(f64::max);
    let facts = [
        ("device", summary.device.clone()),
        ("peak memory", memory),
        ("steps skipped", summary.skipped_steps.to_string()),
        ("steps clipped", clipped),
        ("values clamped", clamped),
        ("updates replayed", shadow.map_or_else(|| "none".to_owned(), |ulp| format!("off by {ulp} ulp at most"))),
        ("Warpstep", summary.version.clone()),
    ];
    let facts: String =
        facts.iter().map(|(n, v)| format!("<tr><th>{}</th><td>{}</td></tr>", escaped(n), escaped(v))).collect();
    let charts = charts(&[(name, records)], clip);
    let mut pictures = String::new();
    for chart in &charts {
        pictures += &format!("<figure>{}</figure>", svg(std::slice::from_ref(chart), true)?);
    }
    Ok(format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width, initial-scale=1\"><title>{title}</title>\n<style>{STYLE}</style>\
         </head>\n<body><main>\n<h1>{title}</h1>\n<section class=figures>{figures}</section>\n\
          <section class=charts>{pictures}<figure class=tables>\
         <table><thead><tr><th>split</th><td>loss</td><td>accuracy</td></tr></thead><tbody>{rows}</tbody></table>\
         <table><tbody>{facts}</tbody></table></figure></section>\n<h2>Configuration</h2>\n<pre>{config}</pre>\n\
         </main></body></html>\n",
        title = escaped(name),
        config = escaped(config.trim()),
    ))
}

/// How our pages look, in light and in dark.
pub(crate) const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; margin: 8px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 8px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.figure { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; display: flex; flex-direction: column; }
.figure b { font-size: 24px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
.figure span { opacity: .7; font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px; margin: 12px 0; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 6px; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; align-content: space-evenly; gap: 16px 40px; padding: 18px; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 500; padding: 5px 20px 5px 0; }
td { padding: 5px 20px 5px 0; font-variant-numeric: tabular-nums; }
thead { opacity: .7; }
tbody tr { border-top: 1px solid var(--line); }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 13px; }
@media (prefers-color-scheme: dark) {
body { background: #16181c; color: #e4e6ea; }
svg [stroke='#0072B2'] { stroke: #4ba3e3; }
svg [fill='#0072B2'] { fill: #4ba3e3; }
svg [stroke='#D55E00'] { stroke: #f5853f; }
svg [fill='#D55E00'] { fill: #f5853f; }
svg [stroke='#C81E3C'] { stroke: #ff5c77; }
}
@media print { main { max-width: none; } figure { break-inside: avoid; } }
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::summary::SplitScores;

    #[test]
    fn the_page_asks_for_nothing_from_elsewhere_and_escapes_what_it_shows() {
        let summary = Summary {
            last: SplitScores::default(),
            best: SplitScores::default(),
            steps: 10,
            seconds: 1.0,
            steps_per_s: 10.0,
            device: "CPU <1>".into(),
            parameters: 12_345,
            skipped_steps: 0,
            not_finite_from: None,
            peak_memory_bytes: None,
            version: "0".into(),
        };
        let text = page("a<b", &summary, &[], "x = \"</pre><script>alert(1)</script>\"", None).unwrap();
        assert!(!text.contains("<script>"));
        assert!(text.contains("&lt;script&gt;") && text.contains("a&lt;b") && text.contains("12,345"));
        for outside in ["http://", "https://", "src=", "href=", "@import", "url("] {
            assert!(!text.replace("http://www.w3.org/2000/svg", "").contains(outside), "{outside}");
        }
    }
}
