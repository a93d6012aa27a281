//! What a run is made of, how it begins and ends, and what it tells those who watch.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::metrics::Record;
use super::options::{Length, TrainOptions};
use super::summary::Summary;
use crate::backend::Backend;
use crate::data::options::{Resident, Sampling};
use crate::data::{Dataset, Prefetch, Sampler, SamplerOptions, Splits};
use crate::error::Result;
use crate::model::Model;
use crate::optim::{OptimizerOptions, Schedule};
use crate::parallel::watch::Watch;
use crate::parallel::{Collective, ParallelOptions};

/// The updates of a run over this training split, for which its schedule is checked, and how many of them a pass over it takes.
///
/// # Errors
/// As [`Sampler::new`]; a schedule that is longer than the run.
pub fn steps_of(
    train: &dyn Dataset,
    sampler: SamplerOptions,
    length: Length,
    (schedule, peak): (&Schedule, f64),
) -> Result<(u64, f64)> {
    let accumulate = f64::from(sampler.accumulate);
    let steps_per_epoch = Sampler::new(train, sampler)?.batches_per_epoch() as f64 / accumulate;
    let steps = length.in_steps(steps_per_epoch);
    schedule.validate(steps, peak)?;
    Ok((steps, steps_per_epoch))
}

/// Everything that a run needs, typed and checked.
pub struct Run<B: Backend> {
    /// The device.
    pub backend: B,
    /// The network and its loss.
    pub model: Model<B>,
    /// What the trainer is asked to do.
    pub options: TrainOptions,
    /// Rule, clip, decay, groups.
    pub optimizer: OptimizerOptions,
    /// The learning rate over the steps.
    pub schedule: Schedule,
    /// The data.
    pub splits: Splits,
    /// The order of training samples.
    pub sampling: Sampling,
    /// Whether the last batch of a pass is left out when it is not full.
    pub drop_last: bool,
    /// How far ahead batches are read.
    pub prefetch: Prefetch,
    /// Whether the device keeps the training split.
    pub resident: Resident,
    /// The processes that train, and how: in each of them everything here is the same, but for the device.
    pub collective: Arc<dyn Collective>,
    /// The watch over the others, which is told of the run's progress; none over one process alone.
    pub watch: Option<Arc<Watch>>,
    /// How the run is spread over them.
    pub parallel: ParallelOptions,
    /// The run folder, which every process can read.
    pub folder: PathBuf,
    /// The run file with every default filled in: `config.toml`.
    pub config: String,
    /// The part of it that decides the numbers: a resume must have the same.
    pub identity: String,
    /// What turns a user's file into an input, as JSON: `preprocess.json`.
    pub preprocess: String,
    /// What the data were read from, for errors.
    pub source: String,
    /// `model.weights`: a safetensors file that gives the initial weights, where not those of the model's own initialization.
    pub weights: Option<PathBuf>,
    /// How to begin.
    pub start: Start,
    /// Set to a signal's number to make the run write a checkpoint and end after the present step.
    pub interrupt: Arc<AtomicUsize>,
    /// Ends the run after this many micro-batches without writing anything, as if it were killed.
    pub abandon_at: Option<u64>,
}

/// How a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In a folder that holds no run.
    New,
    /// In a folder whose run is removed first.
    Overwrite,
    /// From the folder's latest checkpoint; from the start where there is none yet.
    Resume,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps were done.
    Completed,
    /// It no longer improved.
    StoppedEarly,
    /// A signal, by its number. A checkpoint was written.
    Interrupted(i32),
    /// As [`Run::abandon_at`] said.
    Abandoned,
}

/// What a run tells those who watch it.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// It begins.
    Started(Started<'a>),
    /// A line of metrics.jsonl was written.
    Record(&'a Record),
    /// A checkpoint was written.
    Checkpoint(&'a Path),
    /// Something that the user should know.
    Note(&'a str),
    /// summary.json was written.
    Finished(&'a Summary),
}

/// Facts that hold for a whole run.
#[derive(Clone, Copy, Debug)]
pub struct Started<'a> {
    /// The run folder.
    pub folder: &'a Path,
    /// The device.
    pub device: &'a str,
    /// Number of parameters.
    pub parameters: usize,
    /// Samples of the training split.
    pub samples: usize,
    /// Step it begins at.
    pub first_step: u64,
    /// Step it ends at.
    pub steps: u64,
    /// Steps of a pass over the training split.
    pub steps_per_epoch: f64,
}

/// Somebody who watches a run.
pub trait Observer {
    /// Is told of an event.
    ///
    /// # Errors
    /// What the observer cannot write.
    fn event(&mut self, event: &Event<'_>) -> Result<()>;
}

/// What is left of a run when it ends.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How.
    pub end: End,
    /// The contents of summary.json; none for a run that was interrupted or abandoned.
    pub summary: Option<Summary>,
}
