//! summary.json: how a run went, in one object.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::write_whole;
use crate::error::{Error, Result};

/// Loss and accuracy of one split.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Mean loss; null when it is no finite number.
    pub loss: Option<f64>,
    /// Share of right predictions, where predictions can be right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

impl Scores {
    /// Of a mean loss, which may be no finite number.
    pub(super) fn new(loss: f64, accuracy: Option<f64>) -> Self {
        Scores { loss: Some(loss).filter(|loss| loss.is_finite()), accuracy }
    }
}

/// Scores by split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitScores {
    /// The step they were taken at.
    #[serde(default)]
    pub step: u64,
    /// Of the training split, as seen while training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<Scores>,
    /// Of the validation split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Scores>,
    /// Of the test split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Scores>,
}

/// The contents of summary.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// At the end.
    #[serde(rename = "final")]
    pub last: SplitScores,
    /// Where the validation split was best.
    pub best: SplitScores,
    /// Updates done.
    pub steps: u64,
    /// Seconds of training, evaluations and checkpoints included.
    pub seconds: f64,
    /// Updates a second, evaluations and checkpoints not counted.
    pub steps_per_s: f64,
    /// What it ran on.
    pub device: String,
    /// Number of parameters.
    pub parameters: usize,
    /// Steps skipped for gradients that were not finite.
    pub skipped_steps: u64,
    /// First of the steps up to the end whose training losses were all not finite; none where the last one's was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_finite_from: Option<u64>,
    /// Peak resident size of the process; none where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// Version of Warpstep.
    pub version: String,
}

/// What to do about losses that are not finite.
const DIVERGED: &str = "lower optimizer.learning_rate, set optimizer.clip = { global_norm = 1.0 }, look for extreme values in the data, or, \
                        with run.precision = \"f16\", take \"bf16\"";

impl Summary {
    /// Why the run failed though it came to its end; none where its model is one to use. Losses that were not finite for a while
    /// are no failure.
    pub fn failure(&self) -> Option<String> {
        if self.steps > 0 && self.skipped_steps == self.steps {
            return Some(format!(
                "the gradients of all {} steps were not finite, so that none changed the model: lower optimizer.learning_rate, look for \
                 extreme values in the data, or, with run.precision = \"f16\", give more steps, as its loss scale halves with each",
                self.steps
            ));
        }
        let evaluated = [("validation", self.last.validation), ("test", self.last.test)];
        let not_finite = |scores: Option<Scores>| scores.is_some_and(|scores| scores.loss.is_none());
        let found = match self.not_finite_from {
            Some(first) if first == self.steps => {
                format!("the training loss of the last step, {first}, was not finite")
            }
            Some(first) => {
                format!("the training loss was not finite from step {first} on, to the end at step {}", self.steps)
            }
            None => {
                let (split, _) = evaluated.into_iter().find(|(_, scores)| not_finite(*scores))?;
                format!("the {split} loss after the last step, {}, was not finite", self.steps)
            }
        };
        let best = match self.best {
            SplitScores { step, validation: Some(_), .. } if step < self.steps => {
                format!("; the best checkpoint, of step {step}, stays")
            }
            _ => String::new(),
        };
        Some(format!("{found}: {DIVERGED}{best}"))
    }

    /// Writes it to `path`, whole or not at all.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_whole(path, &self.text())
    }

    /// It as JSON.
    pub(super) fn text(&self) -> Vec<u8> {
        // Numbers, texts and lists of them always are.
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Reads it from `path`.
    ///
    /// # Errors
    /// A file that cannot be read or is no summary.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        Self::parse(path, &text)
    }

    /// The same of a text that was read from `path`.
    pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        serde_json::from_slice(text).map_err(|e| Error::data(path, format!("expected a summary: {e}")))
    }
}

/// Peak resident size of this process in bytes (`VmHWM` of Linux); none elsewhere.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
