//! What a run shows while it goes: a live line on a terminal, plain lines into a pipe, JSON lines where asked.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::metrics::{Record, SplitName};
use super::run::{Event, Observer, Started};
use super::summary::{Scores, Summary};
use crate::error::{Error, Result};
use crate::text::{self, grouped};

/// How a run is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// A live line on a terminal, plain lines otherwise.
    Auto,
    /// One JSON object a line on standard output.
    Json,
    /// Nothing but errors.
    Quiet,
    /// Plain lines into `logs/rank-N.log` in the run folder: what a process with this rank shows, where another speaks for all.
    Log(usize),
}

/// Shows a run.
pub struct Progress {
    show: Show,
    folder: PathBuf,
    /// Where lines go, if not to standard output.
    log: Option<File>,
    bar: Option<ProgressBar>,
    first_step: u64,
    steps: u64,
    steps_per_epoch: f64,
    began: Instant,
    last_line: Option<Instant>,
}

/// Time between two plain lines at least.
const QUIET: Duration = Duration::from_secs(2);

impl Progress {
    /// Shows a run in this way.
    pub fn new(show: Show) -> Self {
        Progress {
            show,
            folder: PathBuf::new(),
            log: None,
            bar: None,
            first_step: 0,
            steps: 0,
            steps_per_epoch: 1.0,
            began: Instant::now(),
            last_line: None,
        }
    }

    fn line(&self, text: &str) -> Result<()> {
        match (&self.bar, &self.log) {
            (Some(bar), _) => {
                bar.println(text);
                Ok(())
            }
            (None, Some(log)) => {
                let mut log: &File = log;
                writeln!(log, "{text}").map_err(|e| Error::io("write to", log_file(&self.folder, self.show), e))
            }
            (None, None) => print_line(text),
        }
    }

    fn start(&mut self, started: &Started<'_>) -> Result<()> {
        started.folder.clone_into(&mut self.folder);
        self.first_step = started.first_step;
        self.steps = started.steps;
        self.steps_per_epoch = started.steps_per_epoch;
        self.began = Instant::now();
        let Started { folder, device, parameters, samples, first_step, steps, .. } = *started;
        if let Show::Log(_) = self.show {
            let path = log_file(folder, self.show);
            let opened = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            let opened = opened.and_then(|()| OpenOptions::new().create(true).append(true).open(&path));
            self.log = Some(opened.map_err(|e| Error::io("open", &path, e))?);
        }
        self.line(&format!(
            "{} parameters on {device}; {} training samples, {:.1} steps an epoch",
            grouped(parameters as u64),
            grouped(samples as u64),
            self.steps_per_epoch
        ))?;
        let from = if first_step > 0 { format!(" from step {}", grouped(first_step)) } else { String::new() };
        self.line(&format!("{} steps{from} into {}", grouped(steps), folder.display()))?;
        // A terminal that cannot go back in its line gets the lines that a pipe gets.
        let goes_back = std::env::var_os("TERM").is_none_or(|name| name != "dumb");
        if self.log.is_none() && goes_back && std::io::stdout().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stdout());
            // The message is cut where the terminal is too narrow for it, so what matters most stands first.
            if let Ok(style) = ProgressStyle::with_template("{bar:10.cyan/blue} {wide_msg}") {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_position(first_step);
            self.bar = Some(bar);
        }
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<()> {
        if record.split != SplitName::Train {
            return self.line(&evaluation_line(record));
        }
        let done = record.step.saturating_sub(self.first_step).max(1) as f64;
        let left = self.steps.saturating_sub(record.step) as f64 * self.began.elapsed().as_secs_f64() / done;
        let speed = match (record.samples_per_s, record.tokens_per_s) {
            (_, Some(tokens)) => format!("{} tokens/s", rounded(tokens)),
            (Some(samples), None) => format!("{} samples/s", rounded(samples)),
            (None, None) => String::new(),
        };
        let used = record.mfu.map_or_else(String::new, |mfu| format!("  mfu {:.1} %", 100.0 * mfu));
        let rate = record.lr.map_or_else(String::new, |lr| format!("  lr {lr:.2e}"));
        let skipped = if record.skipped > 0 { format!("  skipped {}", record.skipped) } else { String::new() };
        // How often a clip acts: of the steps for a norm clip, of the values for a clip by value.
        let acted = [("clipped", record.clipped), ("clamped", record.clamped)];
        let acted: String = (acted.iter())
            .filter_map(|&(name, share)| share.map(|share| format!("  {name} {:.0} %", 100.0 * share)))
            .collect();
        let text = format!(
            "{}/{}  loss {}  {} left  {speed}{used}{rate}{acted}{skipped}",
            record.step,
            self.steps,
            text::loss(record.loss),
            duration(left)
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(record.step);
                bar.set_message(text);
                Ok(())
            }
            None => {
                let due = self.last_line.is_none_or(|last| last.elapsed() >= QUIET) || record.step == self.steps;
                if !due {
                    return Ok(());
                }
                self.last_line = Some(Instant::now());
                self.line(&format!("step {text}"))
            }
        }
    }

    fn finish(&mut self, summary: &Summary) -> Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let mut text = format!("done: {} steps in {}", grouped(summary.steps), duration(summary.seconds));
        let mut add = |name: &str, scores: Option<Scores>| {
            if let Some(Scores { loss, accuracy }) = scores {
                let loss = loss.map_or_else(|| "not finite".to_owned(), text::loss);
                let accuracy = accuracy.map_or_else(String::new, |a| format!(", accuracy {:.2} %", 100.0 * a));
                text += &format!("\n  {name:<11} loss {loss}{accuracy}");
            }
        };
        add("train", summary.last.train);
        add("validation", summary.last.validation);
        add("test", summary.last.test);
        if summary.best.step != summary.last.step {
            add(&format!("best (step {}), validation", summary.best.step), summary.best.validation);
            add("best, test", summary.best.test);
        }
        if let Some(bytes) = summary.peak_memory_bytes {
            text += &format!("\n  peak memory {} MiB", bytes >> 20);
        }
        text += &format!("\n  run folder  {}", self.folder.display());
        self.line(&text)
    }
}

/// The log of a process of this rank.
fn log_file(folder: &Path, show: Show) -> PathBuf {
    let rank = if let Show::Log(rank) = show { rank } else { 0 };
    folder.join("logs").join(format!("rank-{rank}.log"))
}

/// A run that was interrupted or failed leaves its live line: it goes, so that what is said next has a line of its own.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn event(&mut self, event: &Event<'_>) -> Result<()> {
        match (self.show, event) {
            (Show::Quiet, _) => Ok(()),
            (Show::Json, Event::Record(record)) => print_json(record),
            (Show::Json, Event::Finished(summary)) => print_json(summary),
            (Show::Json, _) => Ok(()),
            (Show::Auto | Show::Log(_), Event::Started(started)) => self.start(started),
            (Show::Auto | Show::Log(_), Event::Record(record)) => self.record(record),
            (Show::Auto | Show::Log(_), Event::Note(text)) => self.line(text),
            (Show::Auto, Event::Checkpoint(_)) => Ok(()),
            (Show::Log(_), Event::Checkpoint(path)) => self.line(&format!("checkpoint {}", path.display())),
            (Show::Auto | Show::Log(_), Event::Finished(summary)) => self.finish(summary),
        }
    }
}

fn evaluation_line(record: &Record) -> String {
    let split = match record.split {
        SplitName::Train => "train",
        SplitName::Validation => "validation",
        SplitName::Test => "test",
    };
    let accuracy = record.accuracy.map_or_else(String::new, |a| format!("  accuracy {:.2} %", 100.0 * a));
    let loss = text::loss(record.loss);
    format!("step {} (epoch {:.2})  {split}  loss {loss}{accuracy}", record.step, record.epoch)
}

/// Writes a line to standard output. A reader that has gone is no error: the run goes on.
fn print_line(text: &str) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("write to", "standard output", e)),
        _ => Ok(()),
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::io("write to", "standard output", e.into()))?;
    print_line(&text)
}

/// `12,345` from a hundred on, `3.1` below.
pub fn rounded(value: f64) -> String {
    if value >= 99.95 { grouped(value.round() as u64) } else { format!("{value:.1}") }
}

/// Seconds as `1 h 02 min`, `3 min 04 s` or `5.6 s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    if whole >= 3600 {
        format!("{} h {:02} min", whole / 3600, whole / 60 % 60)
    } else if whole >= 60 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{:.1} s", seconds.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([4.56, 184.4, 12_345.6, -1.0].map(duration), ["4.6 s", "3 min 04 s", "3 h 25 min", "0.0 s"]);
        assert_eq!([3.0625, 99.96, 99.94, 52_000.4].map(rounded), ["3.1", "100", "99.9", "52,000"]);
    }
}
