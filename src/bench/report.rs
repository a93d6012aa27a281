//! A benchmark's page: one HTML file that asks for nothing from elsewhere.

use std::path::Path;

use super::results::{Figure, PeerFigure, Results};
use super::table as text;
use crate::error::Result;
use crate::text::grouped;
use crate::train::files::write_whole;
use crate::train::report::{STYLE, escaped};

mod bars;
mod canvas;
mod roofline;

/// Writes the page to `path`.
///
/// # Errors
/// What the drawing library reports, or what the operating system refuses.
pub fn write(results: &Results, path: &Path) -> Result<()> {
    write_whole(path, page(results)?.as_bytes())
}

/// The page.
///
/// # Errors
/// What the drawing library reports.
pub fn page(results: &Results) -> Result<String> {
    let title = escaped(&format!("warpstep bench: {}", results.machine.device));
    let mut sections = String::new();
    let peers = bars::against_peers(&results.peers)?;
    let told = "How many times as fast as each peer Warpstep does the same work, taken in turn: the ratio's median, its quartiles \
                as whiskers. Right of the line, Warpstep is faster.";
    sections += &section("Against peers", told, peers, &peer_table(&results.peers));
    let points = roofline::points(&results.figures);
    let roofs = roofline::roofs(results, &points);
    let told = "Each figure that has bytes and operations, beneath what this run has measured of the memory and of products, \
                those of each precision for itself. Hollow points are refused figures.";
    sections += &section("Roofline", told, roofline::drawn(&points, &roofs)?, &point_table(&points, &roofs));
    let told = "Each figure's speed as a share of what its floor allows, quartiles as whiskers. Hollow bars are refused figures.";
    sections += &section("Against the floor", told, bars::against_floor(&results.figures)?, "");
    Ok(format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width, initial-scale=1\"><title>{title}</title>\n<style>{STYLE}{MORE}</style>\
         </head>\n<body><main>\n<h1>{title}</h1>\n{head}\n{sections}<h2>All figures</h2>\n{all}\n</main></body></html>\n",
        head = head(results),
        all = figure_tables(&results.figures),
    ))
}

/// A picture with its heading and what belongs below; nothing where there is no picture.
fn section(title: &str, told: &str, picture: Option<String>, below: &str) -> String {
    let Some(picture) = picture else { return String::new() };
    format!("<h2>{title}</h2>\n<p>{}</p>\n<figure>{picture}</figure>\n{below}\n", escaped(told))
}

/// Device, versions, command, facts, and what may have changed the figures.
fn head(results: &Results) -> String {
    let Results { format, version, command, date, machine, .. } = results;
    let given = [
        ("device", machine.device.clone()),
        ("Warpstep", format!("{version} (format {format})")),
        ("command", command.clone()),
        ("date", date.clone()),
    ];
    let given = given.into_iter().map(|(name, value)| (name.to_owned(), value));
    let facts = given.chain(machine.facts.iter().map(|(name, value)| (name.clone(), value.clone())));
    let notes = machine.notes.iter().map(|note| ("note".to_owned(), note.clone()));
    let rows = facts
        .chain(notes)
        .map(|(name, value)| format!("<tr><th>{}</th><td>{}</td></tr>", escaped(&name), escaped(&value)));
    format!("<figure class=wide><table class=facts><tbody>{}</tbody></table></figure>", rows.collect::<String>())
}

fn table(head: &[&str], rows: &str) -> String {
    let (first, rest) = head.split_first().unwrap_or((&"", &[]));
    let rest: String = rest.iter().map(|name| format!("<td>{name}</td>")).collect();
    format!(
        "<figure class=wide><table><thead><tr><th>{first}</th>{rest}</tr></thead><tbody>{rows}</tbody></table></figure>\n"
    )
}

/// A row, and below it why its figure is refused.
fn row(name: &str, cells: &[String], refused: Option<&str>) -> String {
    let class = if refused.is_some() { " class=refused" } else { "" };
    let told: String = cells.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
    let mut row = format!("<tr{class}><th>{}</th>{told}</tr>", escaped(name));
    if let Some(refused) = refused {
        row += &format!("<tr class=why><td colspan={}>refused: {}</td></tr>", cells.len() + 1, escaped(refused));
    }
    row
}

fn peer_table(peers: &[PeerFigure]) -> String {
    let rows: String = peers
        .iter()
        .map(|figure| {
            let PeerFigure { peer, version, work, theirs, ours, ratio, refused } = figure;
            let done = ratio.count > 0;
            let time = |seconds: f64| if done { text::seconds(seconds) } else { String::new() };
            let ratios = format!("{:.2} ({:.2} to {:.2})", ratio.median, ratio.lower_quartile, ratio.upper_quartile);
            let shapes = if !work.inputs.is_empty() {
                format!(
                    "{} parameters, {:?}, {}, {}",
                    grouped(work.parameters),
                    work.inputs,
                    work.precision,
                    work.update
                )
            } else {
                String::new()
            };
            let ratios = if done { format!("{ratios}, {} turns", ratio.count) } else { String::new() };
            let cells = [peer.clone(), version.clone(), time(theirs.median), time(ours.median), ratios, shapes];
            row(&work.title(), &cells, refused.as_deref())
        })
        .collect();
    table(&["work", "peer", "version", "theirs", "ours", "times as fast", "of"], &rows)
}

fn point_table(points: &[roofline::Point<'_>], roofs: &roofline::Roofs) -> String {
    let rows: String = points
        .iter()
        .enumerate()
        .map(|(i, point)| {
            let share =
                roofs.over(point).map_or_else(String::new, |roof| format!("{:.0} %", 100.0 * point.speed / roof));
            let name = format!("{}/{}", point.figure.suite, point.figure.name);
            let cells = [name, format!("{:.3}", point.intensity), si(point.speed, "FLOP/s"), share];
            row(&(i + 1).to_string(), &cells, None)
        })
        .collect();
    table(&["", "figure", "operations a byte", "speed", "of the roof"], &rows)
}

/// A table a suite.
fn figure_tables(figures: &[Figure]) -> String {
    let mut suites: Vec<&str> = Vec::new();
    for figure in figures {
        if !suites.contains(&figure.suite.as_str()) {
            suites.push(&figure.suite);
        }
    }
    let of_suite = |suite: &str| -> String {
        let rows: String = figures.iter().filter(|figure| figure.suite == suite).map(figure_row).collect();
        let head = [
            "figure",
            "median",
            "quartiles",
            "runs",
            "rate",
            "memory speed",
            "arithmetic",
            "of the floor",
            "memory taken",
        ];
        format!("<h3>{}</h3>\n{}", escaped(suite), table(&head, &rows))
    };
    suites.into_iter().map(of_suite).collect()
}

fn figure_row(figure: &Figure) -> String {
    let Figure { name, seconds, amount, bytes, flops, floor, refused, parts, memory_bytes, .. } = figure;
    if seconds.count == 0 {
        return row(name, &vec![String::new(); 8], Some(refused.as_deref().unwrap_or("no time was taken")));
    }
    let a_second = |count: &Option<f64>, unit| count.map_or_else(String::new, |count| si(count / seconds.median, unit));
    let rate = match amount.1.as_str() {
        "" | "byte" | "flop" => String::new(),
        unit => si(amount.0 / seconds.median, &format!("{unit}s/s")),
    };
    let cells = [
        text::seconds(seconds.median),
        format!("{} to {}", text::seconds(seconds.lower_quartile), text::seconds(seconds.upper_quartile)),
        seconds.count.to_string(),
        rate,
        a_second(bytes, "B/s"),
        a_second(flops, "FLOP/s"),
        floor.as_ref().map_or_else(String::new, |floor| format!("{:.0} %", 100.0 * floor.seconds / seconds.median)),
        memory_bytes.map_or_else(String::new, |bytes| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))),
    ];
    let mut text = row(name, &cells, refused.as_deref());
    let shares: Vec<String> = parts.iter().map(|(part, share)| format!("{part} {:.0} %", 100.0 * share)).collect();
    let told = floor.iter().map(|floor| {
        let doubt = floor.doubt.iter().map(|why| format!(", not to be quoted: {why}"));
        format!("floor: {}{}", floor.what, doubt.collect::<String>())
    });
    let told: Vec<String> = told.chain((!shares.is_empty()).then(|| shares.join(", "))).collect();
    if !told.is_empty() {
        text += &format!("<tr class=why><td colspan=9>{}</td></tr>", escaped(&told.join("; ")));
    }
    text
}

/// A number with the prefix that suits it: `21.3 GB/s`, `284 k samples/s`.
fn si(value: f64, unit: &str) -> String {
    let prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (each, prefix) = prefixes.into_iter().find(|(each, _)| value >= *each).unwrap_or((1.0, ""));
    let value = value / each;
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    // Words take their prefix apart.
    let gap = if unit.starts_with(char::is_lowercase) && !prefix.is_empty() { " " } else { "" };
    format!("{value:.decimals$} {prefix}{gap}{unit}")
}

const MORE: &str = "
h3 { font-size: 15px; margin: 20px 0 6px; }
p { opacity: .8; max-width: 76ch; margin: 4px 0 10px; }
figure.wide { overflow-x: auto; padding: 6px 14px; margin-top: 12px; }
figure.wide table { font-size: 13px; width: 100%; }
figure.wide td, figure.wide th { padding: 4px 14px 4px 0; white-space: nowrap; }
table.facts td { white-space: normal; overflow-wrap: anywhere; width: 100%; }
tr.refused { opacity: .55; }
tbody tr.why { border-top: 0; }
tr.why td { opacity: .7; font-size: 12px; padding-top: 0; white-space: normal; }
@media (prefers-color-scheme: dark) {
svg [fill='#009E73'] { fill: #2fc79a; }
}
";
