//! Two results side by side: what got faster or slower by more than their noise.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::peers::difference;
use super::results::{FORMAT, Figure, Machine, PeerFigure, Results, Spread};
use super::table::seconds;
use crate::error::{Error, Result};

/// A change that is smaller is never told: two processes on the same machine differ as much.
const LEAST: f64 = 0.01;

/// How a figure changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Takes longer, beyond the noise.
    Slower,
    /// Takes less, beyond the noise.
    Faster,
    /// Cannot be compared: refused, or other work.
    Unlike,
    /// The quartiles of the two overlap, or they are within 1 %.
    Same,
}

/// A figure that both results hold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Suite and name; `peers`, the work, its precision and the peer's name for a ratio.
    pub name: String,
    /// How it changed.
    pub verdict: Verdict,
    /// Seconds before; a ratio for peers.
    pub before: Spread,
    /// Seconds after; a ratio for peers.
    pub after: Spread,
    /// The time after over the time before, less 1: above 0, it got slower.
    pub change: f64,
    /// Why it cannot be compared.
    pub why: Option<String>,
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Figures of both, the slower ones first, by how much they changed.
    pub changes: Vec<Change>,
    /// Figures that only the earlier results hold.
    pub only_before: Vec<String>,
    /// Figures that only the later results hold.
    pub only_after: Vec<String>,
    /// Figures that may be quoted of the earlier results, and are missing or refused in the later ones.
    pub lost: Vec<String>,
    /// What else differs: machine, device, versions.
    pub notes: Vec<String>,
}

/// Reads results from a file that `warpstep bench --json` wrote.
///
/// # Errors
/// A file that cannot be read, or that holds something else.
pub fn read(path: &Path) -> Result<Results> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let wrong = |e: serde_json::Error| {
        Error::data(path, format!("{e}; expected results as `warpstep bench --json` prints them"))
    };
    let value: serde_json::Value = serde_json::from_str(&text).map_err(wrong)?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format != u64::from(FORMAT) => Err(Error::data(
            path,
            format!("format: found {format}, expected {FORMAT}; take the results again with this version"),
        )),
        _ => serde_json::from_value(value).map_err(wrong),
    }
}

/// Compares two results.
pub fn compare(before: &Results, after: &Results) -> Comparison {
    let (old, new) = (entries(before), entries(after));
    let missing_in = |from: &BTreeMap<String, Entry<'_>>, other: &BTreeMap<String, Entry<'_>>| {
        from.keys().filter(|name| !other.contains_key(*name)).cloned().collect()
    };
    let mut changes: Vec<Change> =
        old.iter().filter_map(|(name, old)| Some(changed(name, old, new.get(name)?))).collect();
    let is_good = |entry: &Entry<'_>| entry.refused().is_none() && untimed(entry).is_none();
    let lost = old.iter().filter(|(name, old)| is_good(old) && !new.get(*name).is_some_and(is_good));
    let lost = lost.map(|(name, _)| name.clone()).collect();
    changes.sort_by(|a, b| a.verdict.cmp(&b.verdict).then(b.change.abs().total_cmp(&a.change.abs())));
    Comparison {
        changes,
        only_before: missing_in(&old, &new),
        only_after: missing_in(&new, &old),
        lost,
        notes: notes(before, after),
    }
}

/// What can stand on either side.
enum Entry<'a> {
    Figure(&'a Figure),
    Peer(&'a PeerFigure),
}

impl Entry<'_> {
    fn spread(&self) -> Spread {
        match self {
            Entry::Figure(figure) => figure.seconds,
            Entry::Peer(peer) => peer.ratio,
        }
    }

    fn refused(&self) -> Option<&String> {
        match self {
            Entry::Figure(figure) => figure.refused.as_ref(),
            Entry::Peer(peer) => peer.refused.as_ref(),
        }
    }
}

fn entries(results: &Results) -> BTreeMap<String, Entry<'_>> {
    let figures = results.figures.iter().map(|f| (format!("{}/{}", f.suite, f.name), Entry::Figure(f)));
    let peers = results.peers.iter().map(|p| (format!("peers/{} against {}", p.work.title(), p.peer), Entry::Peer(p)));
    figures.chain(peers).collect()
}

fn changed(name: &str, old: &Entry<'_>, new: &Entry<'_>) -> Change {
    let (before, after) = (old.spread(), new.spread());
    // A ratio is their time over ours: where it falls, we got slower.
    let (slower, change) = match new {
        Entry::Figure(_) => (after.lower_quartile > before.upper_quartile, after.median / before.median - 1.0),
        Entry::Peer(_) => (after.upper_quartile < before.lower_quartile, before.median / after.median - 1.0),
    };
    let apart = after.lower_quartile > before.upper_quartile || after.upper_quartile < before.lower_quartile;
    let why = unlike(old, new);
    let verdict = match (&why, apart && change.abs() >= LEAST, slower) {
        (Some(_), _, _) => Verdict::Unlike,
        (None, false, _) => Verdict::Same,
        (None, true, true) => Verdict::Slower,
        (None, true, false) => Verdict::Faster,
    };
    let change = if change.is_finite() { change } else { 0.0 };
    Change { name: name.to_owned(), verdict, before, after, change, why }
}

/// That a figure has no time.
fn untimed(entry: &Entry<'_>) -> Option<String> {
    let Spread { count, median, .. } = entry.spread();
    (count == 0 || median.is_nan() || median <= 0.0).then(|| "no time was taken".to_owned())
}

/// Why two figures of one name cannot be compared.
fn unlike(old: &Entry<'_>, new: &Entry<'_>) -> Option<String> {
    let told = |side: &str, reason: &String| format!("refused {side}: {reason}");
    if let Some(why) = old.refused().map(|r| told("before", r)).or_else(|| new.refused().map(|r| told("after", r))) {
        return Some(why);
    }
    if let Some(why) = untimed(old).or_else(|| untimed(new)) {
        return Some(why);
    }
    match (old, new) {
        (Entry::Figure(old), Entry::Figure(new)) => {
            if old.amount != new.amount {
                let text = |amount: &(f64, String)| format!("{} {}", amount.0, amount.1);
                return Some(format!("another amount: {} before, {} after", text(&old.amount), text(&new.amount)));
            }
            old.work.as_ref().zip(new.work.as_ref()).and_then(|(old, new)| difference(old, new, ["before", "after"]))
        }
        (Entry::Peer(old), Entry::Peer(new)) => difference(&old.work, &new.work, ["before", "after"]),
        _ => Some("a figure on one side, a peer on the other".to_owned()),
    }
}

fn notes(before: &Results, after: &Results) -> Vec<String> {
    let mut notes = Vec::new();
    let (old, new) = (&before.machine, &after.machine);
    if old.device != new.device {
        notes.push(format!(
            "another device: {} before, {} after; the times compare devices, not versions",
            old.device, new.device
        ));
    }
    let names: BTreeSet<&String> = old.facts.keys().chain(new.facts.keys()).collect();
    for name in names {
        let fact = |machine: &Machine| machine.facts.get(name).map_or_else(|| "not told".to_owned(), Clone::clone);
        if old.facts.get(name) != new.facts.get(name) {
            notes.push(format!("{name}: {} before, {} after", fact(old), fact(new)));
        }
    }
    if before.version != after.version {
        notes.push(format!("Warpstep {} before, {} after", before.version, after.version));
    }
    for (side, machine) in [("before", old), ("after", new)] {
        notes.extend(machine.notes.iter().map(|note| format!("{side}: {note}")));
    }
    for peer in &after.peers {
        let same = before.peers.iter().find(|p| p.peer == peer.peer && p.work.title() == peer.work.title());
        if let Some(old) =
            same.filter(|old| old.version != peer.version && !old.version.is_empty() && !peer.version.is_empty())
        {
            notes.push(format!("{}: {} before, {} after", peer.peer, old.version, peer.version));
        }
    }
    notes.dedup();
    notes
}

impl Comparison {
    /// Figures that got slower by more than `percent`, beyond the noise.
    pub fn slower_than(&self, percent: f64) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |c| c.verdict == Verdict::Slower && 100.0 * c.change > percent)
    }

    /// Writes it as a table.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        let rows: Vec<[String; 5]> = self.changes.iter().map(Change::row).collect();
        let head = ["", "figure", "before", "after", "time"].map(str::to_owned);
        let mut widths = [0; 5];
        for row in rows.iter().chain([&head]) {
            for (width, text) in widths.iter_mut().zip(row) {
                *width = (*width).max(text.chars().count());
            }
        }
        let [verdict, name, before, after, change] = widths;
        let mut line = |row: &[String; 5], why: &str| {
            let [a, b, c, d, e] = row;
            let text = format!("{a:<verdict$}  {b:<name$}  {c:>before$}  {d:>after$}  {e:>change$}{why}");
            writeln!(to, "{}", text.trim_end())
        };
        if !rows.is_empty() {
            line(&head, "")?;
        }
        for (row, change) in rows.iter().zip(&self.changes) {
            line(row, &change.why.as_ref().map_or_else(String::new, |why| format!("  {why}")))?;
        }
        for (side, names) in [("before", &self.only_before), ("after", &self.only_after)] {
            if !names.is_empty() {
                writeln!(to, "only {side}: {}", names.join(", "))?;
            }
        }
        for note in &self.notes {
            writeln!(to, "note: {note}")?;
        }
        let count = |verdict| self.changes.iter().filter(|c| c.verdict == verdict).count();
        writeln!(
            to,
            "{} slower, {} faster, {} within the noise, {} not to be compared",
            count(Verdict::Slower),
            count(Verdict::Faster),
            count(Verdict::Same),
            count(Verdict::Unlike)
        )
    }
}

impl Change {
    fn row(&self) -> [String; 5] {
        let verdict = match self.verdict {
            Verdict::Slower => "slower",
            Verdict::Faster => "faster",
            Verdict::Unlike => "unlike",
            Verdict::Same => "same",
        };
        let value = |spread: &Spread| match self.name.starts_with("peers/") {
            _ if spread.count == 0 => "–".to_owned(),
            true => format!("{:.2}x", spread.median),
            false => seconds(spread.median),
        };
        let change =
            if self.verdict == Verdict::Unlike { String::new() } else { format!("{:+.1} %", 100.0 * self.change) };
        [verdict.to_owned(), self.name.clone(), value(&self.before), value(&self.after), change]
    }
}
