//! The training step: micro-batches through the program, then one update.

use std::collections::HashMap;

use crate::backend::ops::{METRICS, Update};
use crate::backend::{Activations, Arena, Backend, Memory, StepContext};
use crate::data::{Batch, Inputs, Targets};
use crate::error::{Error, Result};
use crate::model::{Input, Mode, Model, Program, Value};
use crate::optim::{OptimizerOptions, StepOutcome, StepParams, UpdatePlan};
use crate::real::Element;

/// Sums of a loss and of right predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Sum of losses.
    pub loss: f64,
    /// What the sum is over: targets that count, or values.
    pub counted: f64,
    /// Right predictions.
    pub right: f64,
}

impl LossSums {
    /// The mean loss; not a number where nothing was counted.
    pub fn mean(&self) -> f64 {
        self.loss / self.counted
    }

    /// The share of right predictions.
    pub fn accuracy(&self) -> f64 {
        self.right / self.counted
    }

    /// Adds the sums of more samples.
    pub fn add(&mut self, other: LossSums) {
        self.loss += other.loss;
        self.counted += other.counted;
        self.right += other.right;
    }
}

/// Where a run stands, in counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps done, skipped ones counted.
    pub step: u64,
    /// Micro-batches seen.
    pub micro_step: u64,
    /// Updates applied.
    pub applied: u64,
    /// Steps skipped.
    pub skipped: u64,
}

/// A program and the memory of its activations.
struct Planned<B: Backend> {
    program: Program<B>,
    activations: Activations<B>,
}

/// A model in training: parameters, optimizer slots, and the planned programs.
pub struct Trainer<B: Backend + Update> {
    backend: B,
    model: Model<B>,
    input: Input,
    seed: u64,
    accumulate: u32,
    arena: Arena<B>,
    plan: UpdatePlan,
    training: Planned<B>,
    evaluations: HashMap<usize, Planned<B>>,
    average: Option<(f64, B::Buffer<B::Real>)>,
    counters: Counters,
}

/// What a [`Trainer`] is made of.
pub struct TrainerParts<'a, B: Backend> {
    /// The device.
    pub backend: B,
    /// The network and its loss.
    pub model: Model<B>,
    /// What a sample's input is.
    pub input: Input,
    /// Samples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches an update.
    pub accumulate: u32,
    /// Rule, clip, decay, groups.
    pub optimizer: &'a OptimizerOptions,
    /// Decay of the average of weights.
    pub ema: Option<f64>,
    /// Key of every random number.
    pub seed: u64,
}

impl<B: Backend + Update> Trainer<B> {
    /// Plans the training program, allocates all memory and sets the initial values.
    ///
    /// # Errors
    /// Shapes that do not fit, options that do not validate, or not enough memory.
    pub fn new(parts: TrainerParts<'_, B>) -> Result<Self> {
        let TrainerParts { backend, mut model, input, batch_size, accumulate, optimizer, ema, seed } = parts;
        let program = model.plan(&input, batch_size, Mode::Training)?;
        let activations = program.activations(&backend)?;
        let (layout, _) = model.parameters().layout()?;
        if !optimizer.master && ema.is_some() {
            return Err(Error::config("optimizer.ema", "needs parameters in f32, which master = false does not keep"));
        }
        let rounding = (!optimizer.master).then_some(seed);
        let plan = UpdatePlan { rounding, ..UpdatePlan::new(optimizer, &layout)? };
        let arena = model.arena_with(&backend, seed, plan.slots.len(), optimizer.master)?;
        let mut trainer = Trainer {
            average: None,
            backend,
            model,
            input,
            seed,
            accumulate: accumulate.max(1),
            arena,
            plan,
            training: Planned { program, activations },
            evaluations: HashMap::new(),
            counters: Counters::default(),
        };
        if let Some(decay) = ema {
            trainer.average = Some((decay, trainer.copy_of_parameters()?));
        }
        Ok(trainer)
    }

    fn copy_of_parameters(&self) -> Result<B::Buffer<B::Real>> {
        let mut values = vec![B::Real::from_f64(0.0); self.arena.layout.padded_len()];
        self.backend.download(&self.arena.parameters, 0, &mut values)?;
        let mut copy = self.backend.allocate(values.len())?;
        self.backend.upload(&mut copy, 0, &values)?;
        Ok(copy)
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The training program: shapes, memory, cost.
    pub fn program(&self) -> &Program<B> {
        &self.training.program
    }

    /// Parameters, gradients, slots.
    pub fn arena(&self) -> &Arena<B> {
        &self.arena
    }

    /// As [`Trainer::arena`], to write into.
    pub fn arena_mut(&mut self) -> &mut Arena<B> {
        &mut self.arena
    }

    /// The average of weights, where there is one.
    pub fn average(&self) -> Option<&B::Buffer<B::Real>> {
        self.average.as_ref().map(|(_, buffer)| buffer)
    }

    /// As [`Trainer::average`], with the device, to write into.
    pub fn average_mut(&mut self) -> Option<(&B, &mut B::Buffer<B::Real>)> {
        self.average.as_mut().map(|(_, buffer)| (&self.backend, buffer))
    }

    /// Makes the average of weights, where there is one, that of the present parameters alone.
    ///
    /// # Errors
    /// A device that failed.
    pub fn restart_average(&mut self) -> Result<()> {
        if let Some((decay, _)) = self.average {
            self.average = Some((decay, self.copy_of_parameters()?));
        }
        Ok(())
    }

    /// Forgets the average of weights: evaluations then take the parameters themselves.
    pub fn drop_average(&mut self) {
        self.average = None;
    }

    /// The device and the arena, to write into.
    pub fn parts_mut(&mut self) -> (&B, &mut Arena<B>) {
        (&self.backend, &mut self.arena)
    }

    /// The plan of the update.
    pub fn update_plan(&self) -> &UpdatePlan {
        &self.plan
    }

    /// Where it stands.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Sets where it stands, after a checkpoint was read.
    pub fn set_counters(&mut self, counters: Counters) {
        self.counters = counters;
    }

    /// Forward and backward of one micro-batch. Gradients are overwritten by the first of a step, added to by the others.
    ///
    /// # Errors
    /// A batch of another shape than planned, targets out of range, or a device that failed.
    pub fn micro_batch(&mut self, batch: &Batch) -> Result<LossSums> {
        let step = StepContext {
            seed: self.seed,
            micro_step: self.counters.micro_step,
            accumulate: !self.counters.micro_step.is_multiple_of(u64::from(self.accumulate)),
        };
        let sums = run(&self.backend, &mut self.arena, &mut self.training, batch, &step)?;
        self.counters.micro_step += 1;
        Ok(sums)
    }

    /// What the next update is told.
    pub fn step_params(&self, learning_rate: f64) -> StepParams {
        StepParams {
            learning_rate,
            step: self.counters.applied + 1,
            divisor: f64::from(self.accumulate),
            zero_gradients: false,
        }
    }

    /// The update of the gradients that the micro-batches left, and the average after it.
    ///
    /// # Errors
    /// A device that failed.
    pub fn update(&mut self, learning_rate: f64) -> Result<StepOutcome> {
        let step = self.step_params(learning_rate);
        let outcome = self.backend.update(&mut self.arena, &self.plan, &step)?;
        self.counters.step += 1;
        if outcome.skipped {
            self.counters.skipped += 1;
        } else {
            self.counters.applied += 1;
            if let Some((decay, average)) = &mut self.average {
                self.backend.average(average, &self.arena.parameters, *decay)?;
            }
        }
        Ok(outcome)
    }

    /// Loss and right predictions over batches, by the average of weights where there is one.
    ///
    /// # Errors
    /// As [`Trainer::micro_batch`], and what the batches' source reports.
    pub fn evaluate(&mut self, batches: impl Iterator<Item = Result<Batch>>) -> Result<LossSums> {
        self.with_average(|trainer| {
            let mut total = LossSums::default();
            for batch in batches {
                let batch = batch?;
                let planned = match trainer.evaluations.entry(batch.samples) {
                    std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::hash_map::Entry::Vacant(entry) => {
                        let program = trainer.model.plan(&trainer.input, batch.samples, Mode::Evaluation)?;
                        let activations = program.activations(&trainer.backend)?;
                        entry.insert(Planned { program, activations })
                    }
                };
                let step = StepContext { seed: trainer.seed, ..StepContext::default() };
                total.add(run(&trainer.backend, &mut trainer.arena, planned, &batch, &step)?);
            }
            Ok(total)
        })
    }

    /// Runs `f` with the average of weights, where there is one, in the place of the parameters.
    fn with_average<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.swap_average()?;
        let result = f(self);
        self.swap_average()?;
        result
    }

    fn swap_average(&mut self) -> Result<()> {
        let Some((_, average)) = &mut self.average else { return Ok(()) };
        std::mem::swap(average, &mut self.arena.parameters);
        self.backend.parameters_changed(&mut self.arena)
    }
}

/// Copies a batch into a program's inputs, runs it, and reads the sums of its loss.
fn run<B: Backend>(
    backend: &B,
    arena: &mut Arena<B>,
    planned: &mut Planned<B>,
    batch: &Batch,
    step: &StepContext,
) -> Result<LossSums> {
    let Planned { program, activations } = planned;
    match &batch.inputs {
        Inputs::Real(values) => write_real(backend, activations, program.input, values, "input")?,
        Inputs::Tokens(values) => write_indices(backend, activations, program.input, values, "input")?,
    }
    if let Some(target) = program.target {
        match (&batch.targets, target) {
            (Targets::Real(values), _) => write_real(backend, activations, target, values, "target")?,
            (Targets::Index(values), Value::Tokens(_)) => {
                write_indices(backend, activations, target, values, "target")?;
            }
            // Classes 0 and 1 as targets of a real output: logistic regression.
            (Targets::Index(classes), Value::Real(_)) => {
                let values: Vec<f32> = classes.iter().map(|&class| class as f32).collect();
                write_real(backend, activations, target, &values, "target")?;
            }
        }
    }
    let mut memory = Memory { arena, activations };
    backend.run(&program.ops, &mut memory, step)?;
    let mut metrics = [B::Real::from_f64(0.0); METRICS];
    if let Some(act) = program.metrics {
        backend.read_statistic(activations, act, &mut metrics)?;
    }
    let [_, loss, counted, right] = metrics.map(Element::f64);
    Ok(LossSums { loss, counted, right })
}

fn write_real<B: Backend>(
    backend: &B,
    activations: &mut Activations<B>,
    to: Value,
    values: &[f32],
    what: &str,
) -> Result<()> {
    let Value::Real(act) = to else {
        return Err(Error::shape(what, "whole numbers", "real values"));
    };
    let range = activations.range(act);
    check_len(what, range.len(), values.len())?;
    let values: Vec<B::Storage> = values.iter().map(|&v| B::Storage::from_f32(v)).collect();
    backend.upload(&mut activations.values, range.start, &values)
}

fn write_indices<B: Backend>(
    backend: &B,
    activations: &mut Activations<B>,
    to: Value,
    values: &[i32],
    what: &str,
) -> Result<()> {
    let Value::Tokens(indices) = to else {
        return Err(Error::shape(what, "real values", "whole numbers"));
    };
    let range = activations.index_range(indices);
    check_len(what, range.len(), values.len())?;
    backend.upload(&mut activations.indices, range.start, values)
}

fn check_len(what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::shape(format!("batch {what}"), format!("{expected} values"), found.to_string()))
}
