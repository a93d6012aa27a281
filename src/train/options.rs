//! What a run is asked to do, apart from data, model and optimizer.

use crate::error::{Error, Result};

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// This many updates.
    Steps(u64),
    /// This many passes over the training split; the last batch of a pass that is not full is left out.
    Epochs(f64),
}

impl Length {
    /// Updates, where a pass over the training split takes so many; one at least.
    pub fn in_steps(self, steps_per_epoch: f64) -> u64 {
        match self {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => ((epochs * steps_per_epoch).round() as u64).max(1),
        }
    }
}

/// When something happens again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cadence {
    /// After every so many steps.
    Steps(u64),
    /// After every so many passes over the training split.
    Epochs(f64),
    /// At the end only.
    Never,
}

impl Cadence {
    /// The cadence in steps; none for [`Cadence::Never`].
    pub fn in_steps(self, steps_per_epoch: f64) -> Option<u64> {
        match self {
            Cadence::Steps(steps) => Some(steps.max(1)),
            Cadence::Epochs(epochs) => Some(((epochs * steps_per_epoch).round() as u64).max(1)),
            Cadence::Never => None,
        }
    }
}

/// Which figure tells the best checkpoint, and when to stop early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The loss, the smaller the better.
    Loss,
    /// The share of right predictions, the larger the better.
    Accuracy,
}

/// When training stops before its length because it no longer helps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStopping {
    /// Evaluations without an improvement until it stops.
    pub patience: u32,
    /// What counts as an improvement.
    pub min_delta: f64,
}

/// Options of the trainer. The run file's key stands in the text of each field.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// `run.seed`: the key of every random number of the run.
    pub seed: u64,
    /// `run.steps` or `run.epochs`.
    pub length: Length,
    /// `data.batch_size`: samples of a micro-batch.
    pub batch_size: usize,
    /// `optimizer.accumulate`: micro-batches an update.
    pub accumulate: u32,
    /// `run.log_every_steps`: steps between two records of the training loss.
    pub log_every_steps: u64,
    /// `evaluate.every_steps` or `evaluate.every_epochs`.
    pub evaluate: Cadence,
    /// `evaluate.batches`: batches of an evaluation during training at most; the evaluation at the end takes all.
    pub evaluate_batches: Option<usize>,
    /// `evaluate.best`: which validation figure tells the best checkpoint.
    pub best: Metric,
    /// `checkpoint.every_steps` or `checkpoint.every_epochs`. One is always written at the end.
    pub checkpoint: Cadence,
    /// `checkpoint.keep`: how many of the newest checkpoints stay; the best stays besides.
    pub keep: usize,
    /// `[early_stopping]`.
    pub early_stopping: Option<EarlyStopping>,
    /// `optimizer.ema`: decay of an exponential moving average of the weights, by which the model is then evaluated.
    pub ema: Option<f64>,
    /// `run.max_skipped_steps`: skipped steps in a row after which the run fails.
    pub max_skipped_steps: u64,
    /// `run.shadow_every_steps`: steps between two updates of which a sample is replayed by the plain rule ([`super::shadow`]).
    pub shadow_every_steps: Option<u64>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        TrainOptions {
            seed: 1337,
            length: Length::Epochs(1.0),
            batch_size: 32,
            accumulate: 1,
            log_every_steps: 10,
            evaluate: Cadence::Epochs(1.0),
            evaluate_batches: None,
            best: Metric::Loss,
            checkpoint: Cadence::Steps(1000),
            keep: 3,
            early_stopping: None,
            ema: None,
            max_skipped_steps: 50,
            shadow_every_steps: None,
        }
    }
}

impl TrainOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// The run file's key, what was found, what was expected.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key: &str, found: String, expected: &str| {
            Err(Error::config(key, format!("found {found}, expected {expected}")))
        };
        // Of a run file, 0 is no cadence.
        let cadence = |section: &str, cadence: Cadence| match cadence {
            Cadence::Steps(0) => wrong(&format!("{section}.every_steps"), "0".into(), "1 or more"),
            Cadence::Epochs(epochs) if !(epochs > 0.0 && epochs.is_finite()) => wrong(
                &format!("{section}.every_epochs"),
                epochs.to_string(),
                "a number above 0, or 0 for the end alone",
            ),
            _ => Ok(()),
        };
        match self.length {
            Length::Epochs(epochs) if !(epochs > 0.0 && epochs.is_finite()) => {
                return wrong("run.epochs", epochs.to_string(), "a number above 0");
            }
            Length::Steps(0) => return wrong("run.steps", "0".into(), "1 or more"),
            Length::Steps(_) | Length::Epochs(_) => {}
        }
        if self.batch_size == 0 {
            return wrong("data.batch_size", "0".into(), "1 or more");
        }
        if self.accumulate == 0 {
            return wrong("optimizer.accumulate", "0".into(), "1 or more");
        }
        if self.log_every_steps == 0 {
            return wrong("run.log_every_steps", "0".into(), "1 or more");
        }
        if self.shadow_every_steps == Some(0) {
            return wrong("run.shadow_every_steps", "0".into(), "1 or more");
        }
        if self.keep == 0 {
            return wrong("checkpoint.keep", "0".into(), "1 or more");
        }
        if self.evaluate_batches == Some(0) {
            return wrong("evaluate.batches", "0".into(), "1 or more");
        }
        if let Some(decay) = self.ema
            && !(0.0..1.0).contains(&decay)
        {
            return wrong("optimizer.ema", decay.to_string(), "a number from 0 to below 1");
        }
        cadence("evaluate", self.evaluate)?;
        cadence("checkpoint", self.checkpoint)
    }
}
