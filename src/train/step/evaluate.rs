//! Evaluation and prediction by a trainer: by the average of weights where there is one; evaluation in turns with others where
//! parameters pass between processes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::{LossSums, Planned, Trainer, pass};
use crate::backend::ops::Update;
use crate::backend::step::Pass;
use crate::backend::{Backend, Held, StepContext, stores_what_it_computes_in};
use crate::data::{Batch, Inputs};
use crate::error::{Error, Result};
use crate::host;
use crate::model::Mode;
use crate::train::infer;

/// What a process does while others evaluate.
pub enum Evaluation {
    /// It evaluates too.
    Batch(Batch),
    /// It passes parameters on, for batches of so many samples.
    PassOn {
        /// Samples of the others' batches.
        samples: usize,
    },
}

impl<B: Backend + Update> Trainer<B> {
    /// Plans evaluations by batches of each of these numbers of samples and takes their memory, which is done as they come otherwise: a
    /// run that does not fit then ends before it begins.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn plan_evaluations(&mut self, samples: &[usize]) -> Result<()> {
        samples.iter().try_for_each(|&samples| {
            let planned = self.evaluation(samples)?;
            self.evaluations.insert(samples, planned);
            Ok(())
        })
    }

    /// Loss and right predictions of each batch, by the average of weights where there is one.
    ///
    /// # Errors
    /// As [`Trainer::queue`], and what the batches' source reports.
    pub fn evaluate(&mut self, batches: impl Iterator<Item = Result<Batch>>) -> Result<Vec<LossSums>> {
        self.evaluate_together(batches.map(|batch| batch.map(Evaluation::Batch)))
    }

    /// As [`Trainer::evaluate`], in turns that all processes take at the same time, since parameters pass between them. A process
    /// that has no batch in a turn passes on what the others need.
    ///
    /// # Errors
    /// As [`Trainer::evaluate`].
    pub fn evaluate_together(&mut self, turns: impl Iterator<Item = Result<Evaluation>>) -> Result<Vec<LossSums>> {
        self.with_average(|trainer| {
            let mut sums = Vec::new();
            for turn in turns {
                match turn? {
                    Evaluation::Batch(batch) => sums.push(trainer.evaluate_batch(&batch)?),
                    Evaluation::PassOn { samples } => trainer.pass_on(samples)?,
                }
            }
            Ok(sums)
        })
    }

    /// The model's outputs for `samples` samples, and their shape, samples first: dropout is off, batch norm goes by what it keeps, and
    /// weights are their average where there is one.
    ///
    /// # Errors
    /// Inputs that do not fit, parameters of which this process keeps a part alone, or a device that failed.
    pub fn predict(&mut self, inputs: &Inputs, samples: usize) -> Result<(Vec<f32>, Vec<usize>)> {
        if self.training.window.is_some() {
            return Err(Error::shape("predict", "a process that keeps all parameters", "one that keeps a part"));
        }
        let mut planned = match self.predictions.remove(&samples) {
            Some(planned) => planned,
            None => {
                let program = self.model.plan(&self.input, samples, Mode::Inference)?;
                let activations = program.activations(&self.backend)?;
                Planned { program, activations, window: None }
            }
        };
        let Planned { program, activations, .. } = &mut planned;
        let found = self.with_average(|trainer| {
            infer::outputs(&trainer.backend, &mut trainer.arena, (program, activations), inputs)
        });
        self.predictions.insert(samples, planned);
        found
    }

    fn evaluate_batch(&mut self, batch: &Batch) -> Result<LossSums> {
        let (mut planned, step) =
            (self.evaluation(batch.samples)?, StepContext { seed: self.seed, ..Default::default() });
        let Planned { program, activations, window } = &mut planned;
        let run = |pass: Pass<'_, B>| match (&mut self.exchange, window) {
            (Some(exchange), Some(window)) => pass.run_through(&self.backend, &mut self.arena, &mut **exchange, window),
            _ => pass.run(&self.backend, &mut self.arena),
        };
        let metrics = pass(program, activations, batch.into(), step).and_then(run);
        self.evaluations.insert(batch.samples, planned);
        Ok(LossSums::new(metrics?))
    }

    /// Gives others the parameters that they need for a batch of so many samples.
    fn pass_on(&mut self, samples: usize) -> Result<()> {
        let planned = self.evaluation(samples)?;
        if let (Some(exchange), Some(window)) = (&mut self.exchange, &planned.window) {
            for op in 0..=window.gathers.last().map_or(0, |gather| gather.needed) {
                exchange.bring(&self.backend, &mut self.arena, window, op)?;
            }
        }
        self.evaluations.insert(samples, planned);
        Ok(())
    }

    /// The program for batches of so many samples, taken out or planned, and room in the arena's window for what it needs.
    fn evaluation(&mut self, samples: usize) -> Result<Planned<B>> {
        if let Some(planned) = self.evaluations.remove(&samples) {
            return Ok(planned);
        }
        let program = self.model.plan(&self.input, samples, Mode::Evaluation)?;
        self.backend.reserve(&program.workspace(Some(&self.backend))?)?;
        let activations = program.activations(&self.backend)?;
        let window = self.sharding.as_ref().and_then(|sharding| sharding.window(&program.ops));
        let needed = window.as_ref().map_or(0, |window| window.len);
        let has = self.training.window.iter().chain(self.evaluations.values().filter_map(|p| p.window.as_ref()));
        if needed > has.map(|window| window.len).max().unwrap_or(0) {
            if stores_what_it_computes_in::<B>() {
                self.arena.parameters = self.backend.allocate(needed)?;
            } else {
                self.arena.stored = self.backend.allocate(needed)?;
            }
        }
        Ok(Planned { program, activations, window })
    }

    /// Runs `f` with the average of weights, where there is one, in the place of the parameters.
    fn with_average<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.swap_average()?;
        let result = catch_unwind(AssertUnwindSafe(|| f(self)));
        // After a panic the others of several processes take no part in this: none of them goes on.
        let back = if result.is_ok() || self.exchange.is_none() { self.swap_average() } else { Ok(()) };
        let result = result.unwrap_or_else(|panic| resume_unwind(panic));
        back.and(result)
    }

    fn swap_average(&mut self) -> Result<()> {
        let Some((_, average)) = &mut self.average else { return Ok(()) };
        match &mut self.arena.held {
            None => std::mem::swap(average, &mut self.arena.parameters),
            Some(Held { parameters: Some(parameters), .. }) => std::mem::swap(average, parameters),
            Some(Held { elements, .. }) => {
                let mut values = [host::zeros(elements.len())?, host::zeros(elements.len())?];
                self.backend.download(average, 0, &mut values[0])?;
                self.backend.download(&self.arena.parameters, elements.start, &mut values[1])?;
                self.backend.upload(&mut self.arena.parameters, elements.start, &values[0])?;
                self.backend.upload(average, 0, &values[1])?;
            }
        }
        self.backend.parameters_changed(&mut self.arena)?;
        match &mut self.exchange {
            Some(exchange) if self.arena.held.is_some() => exchange.spread(&self.backend, &mut self.arena),
            _ => Ok(()),
        }
    }
}
