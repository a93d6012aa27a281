//! The proof that a run that is stopped and resumed ends with the same bits as one that never stopped.

use std::path::Path;

use super::checkpoint::{self, Which};
use super::looping::train;
use super::options::Cadence;
use super::run::{End, Run, Start};
use super::tensors;
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::error::{Error, Result};

/// One tensor of the two runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compared {
    /// File and name.
    pub name: String,
    /// Hash in the run that never stopped.
    pub whole: String,
    /// Hash in the run that was stopped and resumed.
    pub resumed: String,
}

/// What [`verify_resume`] found.
#[derive(Clone, Debug)]
pub struct Verification {
    /// Updates of each run.
    pub steps: u64,
    /// Micro-batch at which the second run was ended, as if killed.
    pub stopped_at_micro_batch: u64,
    /// Step of the checkpoint it went on from.
    pub resumed_from_step: u64,
    /// Every tensor of model, optimizer and average.
    pub tensors: Vec<Compared>,
}

impl Verification {
    /// Whether all tensors have the same bits.
    pub fn holds(&self) -> bool {
        self.tensors.iter().all(|t| t.whole == t.resumed)
    }
}

/// Trains `steps` steps twice in `folder`: once whole; once stopped in the middle of an accumulation (of a step, where
/// there is none) after two thirds, then resumed. `make` makes the run, told its folder, how it starts, and how many steps.
///
/// # Errors
/// What a run reports.
pub fn verify_resume<B: Backend<Real = f32> + Update>(
    folder: &Path,
    steps: u64,
    mut make: impl FnMut(&Path, Start) -> Result<Run<B>>,
) -> Result<Verification> {
    let every = (steps / 3).max(1);
    let mut prepared = |name: &str, start: Start| -> Result<Run<B>> {
        let mut run = make(&folder.join(name), start)?;
        run.options.checkpoint = Cadence::Steps(every);
        run.options.evaluate = Cadence::Never;
        run.options.early_stopping = None;
        Ok(run)
    };
    train(prepared("whole", Start::Overwrite)?, &mut [])?;
    let mut stopped = prepared("stopped", Start::Overwrite)?;
    let accumulate = u64::from(stopped.options.accumulate);
    let stop = (steps * 2 / 3).max(1) * accumulate + accumulate / 2;
    stopped.abandon_at = Some(stop.min(steps * accumulate - 1));
    let stopped_at_micro_batch = stopped.abandon_at.unwrap_or(stop);
    if train(stopped, &mut [])?.end != End::Abandoned {
        return Err(Error::Training("the run ended before it could be stopped: give it 2 steps or more".into()));
    }
    let checkpoints = |name: &str| folder.join(name).join("checkpoints");
    let latest = checkpoint::find(&checkpoints("stopped"), Which::Latest)?;
    let resumed_from_step = latest.map(|path| checkpoint::read_state(&path)).transpose()?.map_or(0, |s| s.step);
    train(prepared("stopped", Start::Resume)?, &mut [])?;

    let end = |name: &str| -> Result<_> {
        checkpoint::find(&checkpoints(name), Which::Latest)?
            .ok_or_else(|| Error::checkpoint(checkpoints(name), "holds no checkpoint after the run"))
    };
    let (whole, resumed) = (end("whole")?, end("stopped")?);
    let mut compared = Vec::new();
    for file in ["model.safetensors", "optimizer.safetensors", "ema.safetensors"] {
        if !whole.join(file).is_file() {
            continue;
        }
        let (a, b) = (tensors::read(&whole.join(file))?, tensors::read(&resumed.join(file))?);
        for (name, tensor) in &a {
            compared.push(Compared {
                name: format!("{file}: {name}"),
                whole: tensors::hash(tensor).to_hex().to_string(),
                resumed: b.get(name).map_or_else(|| "missing".to_owned(), |t| tensors::hash(t).to_hex().to_string()),
            });
        }
    }
    Ok(Verification { steps, stopped_at_micro_batch, resumed_from_step, tensors: compared })
}
