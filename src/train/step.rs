//! The training step: micro-batches through the program, then one update.

mod evaluate;

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

pub use self::evaluate::Evaluation;
use super::metrics::number_or_nan;
use crate::backend::ops::{METRICS, Update};
use crate::backend::step::{Feed, Fill, Finished, Found, Gather, LossScale, Pass, Room, Turn, UpdateWork, Work};
use crate::backend::{Activations, Arena, Backend, Exchange, PassOfStep, StepContext};
use crate::data::{Batch, Given, Inputs, Targets};
use crate::error::{Error, Result};
use crate::model::{Input, Mode, Model, Program, Value};
use crate::optim::{OptimizerOptions, StepOutcome, StepParams, UpdatePlan};
use crate::parallel::{Sharding, ShardingOptions};
use crate::plan::{Share, Window};

/// Sums of a loss and of right predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LossSums {
    /// Sum of losses.
    #[serde(deserialize_with = "number_or_nan")]
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

    fn new(metrics: Option<[f64; METRICS]>) -> Self {
        let [_, loss, counted, right] = metrics.unwrap_or_default();
        LossSums { loss, counted, right }
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

/// What a step found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Mean of its micro-batches' mean losses.
    pub loss: f64,
    /// Sums over its micro-batches.
    pub sums: LossSums,
    /// Its samples, those of all processes.
    pub samples: u64,
    /// Whether a process raised its flag ([`Trainer::raise_flag`]) before it queued the step's update.
    pub flag: bool,
    /// What its update found.
    pub outcome: StepOutcome,
    /// The sum of squares of each tensor's gradients, as the update's norm was summed.
    pub norm_squares: Vec<f64>,
}

/// A program and the memory of its activations.
struct Planned<B: Backend> {
    program: Program<B>,
    activations: Activations<B>,
    /// What it sees parameters through, where this process does not keep all.
    window: Option<Window>,
}

/// A model in training: parameters, optimizer slots, and the planned programs.
pub struct Trainer<B: Backend + Update> {
    /// Steps in flight, which name the memory below and go before it.
    queue: B::Queue,
    backend: B,
    model: Model<B>,
    input: Input,
    seed: u64,
    accumulate: u32,
    share: Share,
    exchange: Option<Box<dyn Exchange<B>>>,
    sharding: Option<Sharding>,
    arena: Arena<B>,
    plan: UpdatePlan,
    /// For batches of the planned size.
    training: Planned<B>,
    batch_size: usize,
    /// For smaller ones, by their samples: what is left at the end of a pass over the data.
    smaller: HashMap<usize, Planned<B>>,
    evaluations: HashMap<usize, Planned<B>>,
    predictions: HashMap<usize, Planned<B>>,
    average: Option<(f64, B::Buffer<B::Real>)>,
    /// What is finished.
    counters: Counters,
    /// Micro-batches and steps that were queued, finished ones counted.
    queued: Counters,
    /// Passes of the step that is being queued.
    passes: u64,
    /// Samples of each pass in the queue.
    samples: VecDeque<usize>,
    /// Whether this process raised its flag.
    flag: bool,
    /// The flag as each step in the queue was told it.
    flags: VecDeque<bool>,
    /// What this process found in the step that is being queued.
    found: Found,
    /// What the passes of the oldest unfinished step found.
    begun: Begun,
}

/// What the passes of a step found so far, in this process.
#[derive(Default)]
struct Begun {
    passes: Vec<LossSums>,
    samples: u64,
}

/// What a [`Trainer`] is made of.
pub struct TrainerParts<'a, B: Backend> {
    /// The device.
    pub backend: B,
    /// The network and its loss.
    pub model: Model<B>,
    /// What a sample's input is.
    pub input: Input,
    /// Samples of a pass: of a micro-batch, or of this process's part of it.
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
        Self::sharded(parts, None)
    }

    /// As [`Trainer::new`], as one of several processes that share memory out, where there are such. It trains once it was given what
    /// they exchange it by ([`Trainer::sharing`]).
    ///
    /// # Errors
    /// As [`Trainer::new`], or a device or parameters that cannot be shared out.
    pub fn sharded(parts: TrainerParts<'_, B>, sharding: Option<ShardingOptions>) -> Result<Self> {
        let TrainerParts { backend, mut model, input, batch_size, accumulate, optimizer, ema, seed } = parts;
        let program = model.plan(&input, batch_size, Mode::Training)?;
        let activations = program.activations_with_slots(&backend, B::INPUT_SLOTS)?;
        let (layout, ranges) = model.parameters().layout()?;
        if let Some(decay) = ema.filter(|decay| !(0.0..1.0).contains(decay)) {
            return Err(Error::config("optimizer.ema", format!("found {decay}, expected a number from 0 to below 1")));
        }
        if !optimizer.master && ema.is_some() {
            return Err(Error::config("optimizer.ema", "needs parameters in f32, which master = false does not keep"));
        }
        let rounding = (!optimizer.master).then_some(seed);
        let plan = UpdatePlan { rounding, ..UpdatePlan::new(optimizer, &layout)? };
        let sharding =
            sharding.map(|options| Sharding::new(options, &program.ops, &layout, &ranges, &plan)).transpose()?;
        let mut arena = match &sharding {
            None => model.arena_with(&backend, seed, plan.slots.len(), optimizer.master)?,
            Some(sharding) => {
                can_be_shared_out(optimizer)?;
                model.parameters().arena_held(&backend, seed, plan.slots.len(), &sharding.hold())?
            }
        };
        let workspace = program.workspace(Some(&backend))?;
        backend.reserve(&workspace.or(B::update_workspace(&plan, &arena.own_elements())))?;
        backend.set_loss_scale(&mut arena, LossScale::INITIAL)?;
        let mut trainer = Trainer {
            queue: B::Queue::default(),
            average: None,
            backend,
            model,
            input,
            seed,
            accumulate: accumulate.max(1),
            arena,
            plan,
            training: Planned { program, activations, window: sharding.as_ref().and_then(|s| s.parameters.clone()) },
            sharding,
            batch_size,
            smaller: HashMap::new(),
            evaluations: HashMap::new(),
            predictions: HashMap::new(),
            share: Share::default(),
            exchange: None,
            counters: Counters::default(),
            queued: Counters::default(),
            passes: 0,
            samples: VecDeque::new(),
            flag: false,
            flags: VecDeque::new(),
            found: Found::default(),
            begun: Begun::default(),
        };
        if let Some(decay) = ema {
            trainer.average = Some((decay, trainer.copy_of_parameters()?));
        }
        Ok(trainer)
    }

    /// Trains as one of several processes, or part by part of a batch: passes are those of `share`, and `exchange` makes their
    /// gradients those of the whole batch.
    #[must_use]
    pub fn sharing(self, share: Share, exchange: Box<dyn Exchange<B>>) -> Self {
        Trainer { share, exchange: Some(exchange), ..self }
    }

    /// Passes that this process makes in a step.
    pub fn passes_per_step(&self) -> u64 {
        self.share.passes(self.accumulate)
    }

    /// Tells all processes, in the report of the step whose update is queued next, that this one wants to end.
    pub fn raise_flag(&mut self) {
        self.flag = true;
    }

    /// How memory is shared out over processes, where it is.
    pub fn sharding(&self) -> Option<&Sharding> {
        self.sharding.as_ref()
    }

    /// The parameters that this process updates.
    fn copy_of_parameters(&self) -> Result<B::Buffer<B::Real>> {
        let (parameters, elements) = self.arena.own_parameters();
        let mut copy = self.backend.allocate(elements.len())?;
        self.backend.copy_part(&mut copy, 0, parameters, elements)?;
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

    /// What is finished.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What was queued, finished or not: steps and micro-batches.
    pub fn queued(&self) -> Counters {
        self.queued
    }

    /// Sets where it stands, at the end of a step: after a checkpoint was read.
    pub fn set_counters(&mut self, counters: Counters) {
        self.passes = 0;
        self.counters = counters;
        self.queued = counters;
    }

    /// The dynamic loss scale, where the device needs one.
    ///
    /// # Errors
    /// A device that failed.
    pub fn loss_scale(&self) -> Result<Option<LossScale>> {
        self.backend.loss_scale(&self.arena)
    }

    /// One whole step: forward and backward of each pass, of values or of samples of a table, then the update. Waits for its end. A
    /// step that is an error has updated nothing and does not count; what batch norm keeps has seen the batches before the wrong one.
    ///
    /// # Errors
    /// Another number of batches than passes in a step, a batch of another shape than planned, or a device that failed.
    pub fn step<'a, T>(&mut self, batches: &'a [T], learning_rate: f64) -> Result<StepReport>
    where
        &'a T: Into<Given<'a>>,
    {
        let passes = self.passes_per_step();
        if batches.len() as u64 != passes || self.queued != self.counters_of_finished_steps() {
            let expected = format!("{passes} micro-batches, and no other step begun");
            return Err(Error::shape("step", expected, batches.len().to_string()));
        }
        let queued = batches
            .iter()
            .enumerate()
            .try_for_each(|(index, batch)| self.queue(batch, (index + 1 == batches.len()).then_some(learning_rate)));
        if queued.is_err() {
            self.forget_begun();
        }
        queued?;
        self.finished(true)?.ok_or_else(|| Error::Training("the step that was queued did not end".into()))
    }

    /// Forgets the passes of a step that is not ended, as if none had been queued: the next overwrite their gradients.
    fn forget_begun(&mut self) {
        // What a device says that failed comes second to why the step is not ended.
        while let Ok(Some(_)) = self.backend.finished(&mut self.queue, true) {}
        self.samples.clear();
        self.begun = Begun::default();
        self.passes = 0;
        self.queued = self.counters_of_finished_steps();
    }

    /// Plans the training program for batches of fewer samples than most have, which is done as they come otherwise.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn plan_smaller(&mut self, samples: usize) -> Result<()> {
        if !self.smaller.contains_key(&samples) {
            let program = self.model.plan(&self.input, samples, Mode::Training)?;
            self.backend.reserve(&program.workspace(Some(&self.backend))?)?;
            let activations = program.activations_with_slots(&self.backend, B::INPUT_SLOTS)?;
            self.smaller.insert(samples, Planned { program, activations, window: None });
        }
        Ok(())
    }

    fn counters_of_finished_steps(&self) -> Counters {
        Counters { applied: self.queued.applied, skipped: self.queued.skipped, ..self.counters }
    }

    /// Queues forward and backward of a pass, and, given its learning rate, the update that ends the step. The first micro-batch of
    /// a step (of each part) overwrites gradients, the others add to them. A batch may be smaller than planned, where memory is not
    /// shared out; its gradients are those of its own mean loss. What it finds comes by [`Trainer::finished`].
    ///
    /// # Errors
    /// A batch of another shape than planned, an update before the last pass of its step, or a device that failed.
    pub fn queue<'a>(&mut self, batch: impl Into<Given<'a>>, learning_rate: Option<f64>) -> Result<()> {
        let batch = batch.into();
        let ends_step = self.passes + 1 == self.passes_per_step();
        if learning_rate.is_some() != ends_step {
            let expected = format!("an update after pass {} of a step", self.passes_per_step());
            return Err(Error::shape("queue", expected, format!("pass {}", self.passes + 1)));
        }
        let of = self.share.pass(self.passes, self.accumulate);
        let context = StepContext {
            seed: self.seed,
            micro_step: self.queued.step * u64::from(self.accumulate) + of.within,
            part: of.part as u64,
            accumulate: of.within > 0 && !self.exchange.as_ref().is_some_and(|exchange| exchange.overwrites()),
        };
        let last = of.within + 1 == u64::from(self.accumulate);
        let samples = batch.samples();
        if !(1..=self.batch_size).contains(&samples) {
            let expected = format!("a batch of 1 to {} samples", self.batch_size);
            return Err(Error::shape("queue", expected, samples.to_string()));
        }
        let planned = if samples < self.batch_size && self.sharding.is_none() {
            self.plan_smaller(samples)?;
            self.smaller.get_mut(&samples).unwrap_or(&mut self.training)
        } else {
            &mut self.training
        };
        let Planned { program, activations, window } = planned;
        let work = pass(program, activations, batch, context)?;
        let divisor = f64::from(self.accumulate) * self.share.of as f64;
        let params = learning_rate.map(|rate| step_params(rate, self.counters, divisor));
        let update = params.map(|params| UpdateWork {
            plan: &self.plan,
            params,
            average: self.average.as_mut().map(|(decay, average)| (*decay, average)),
        });
        let pass = PassOfStep {
            number: self.passes as usize,
            passes: self.share.passes(self.accumulate) as usize,
            part: of.index,
            first: of.within == 0,
            last,
            ends_step,
        };
        if pass.number == 0 {
            self.found = Found::default();
        }
        self.found.flag = self.flag;
        self.found.samples += samples as u64;
        let (found, window) = (&mut self.found, window.as_ref());
        let turn = self.exchange.as_deref_mut().map(|exchange| Turn { exchange, pass, window, found });
        self.backend.submit(&mut self.queue, Work { arena: &mut self.arena, pass: Some(work), turn, update })?;
        self.samples.push_back(samples);
        self.passes = if ends_step { 0 } else { self.passes + 1 };
        // Micro-batches count once, whatever the number of their parts.
        self.queued.micro_step += u64::from(of.index == 0);
        if ends_step {
            self.queued.step += 1;
            self.flags.push_back(self.flag);
        }
        Ok(())
    }

    /// What the update after everything that is finished is told, the loss scale in its divisor.
    ///
    /// # Errors
    /// A device that failed.
    pub fn step_params(&self, learning_rate: f64) -> Result<StepParams> {
        let divisor = f64::from(self.accumulate) * self.share.of as f64;
        let params = step_params(learning_rate, self.counters, divisor);
        let scale = self.loss_scale()?.map_or(1.0, |loss_scale| f64::from(loss_scale.scale));
        Ok(StepParams { divisor: params.divisor * scale, ..params })
    }

    /// What the oldest step found that nobody has taken yet: none where it is not done, and, with `wait`, where none is left.
    ///
    /// # Errors
    /// A device that failed.
    pub fn finished(&mut self, wait: bool) -> Result<Option<StepReport>> {
        while let Some(Finished { metrics, processes, outcome, norm_squares }) =
            self.backend.finished(&mut self.queue, wait)?
        {
            if let Some(samples) = self.samples.pop_front() {
                let made = self.begun.passes.len() as u64;
                self.counters.micro_step += u64::from(made < u64::from(self.accumulate));
                self.begun.passes.push(LossSums::new(metrics));
                self.begun.samples += samples as u64;
            }
            if let Some(outcome) = outcome {
                self.counters.step += 1;
                self.counters.applied += u64::from(!outcome.skipped);
                self.counters.skipped += u64::from(outcome.skipped);
                let begun = std::mem::take(&mut self.begun);
                return Ok(Some(StepReport { outcome, norm_squares, ..self.of_all(begun, &processes) }));
            }
        }
        Ok(None)
    }

    /// What the passes of a step found in all processes, in the order of parts.
    fn of_all(&mut self, begun: Begun, processes: &[Found]) -> StepReport {
        let flag = self.flags.pop_front().unwrap_or_default();
        let Begun { passes, samples } = begun;
        let (passes, samples, flag) = if processes.is_empty() {
            (passes, samples, flag)
        } else {
            // As many passes as a process makes of parts that lie side by side.
            let turns = if self.share.stride > 1 { self.share.count } else { 1 };
            let each = passes.len() / turns;
            let of_turn =
                |turn: usize| processes.iter().flat_map(move |process| &process.metrics[turn * each..][..each]);
            (
                (0..turns).flat_map(of_turn).map(|&metrics| LossSums::new(Some(metrics))).collect(),
                processes.iter().map(|process| process.samples).sum(),
                processes.iter().any(|process| process.flag),
            )
        };
        let mut report = StepReport { samples, flag, ..StepReport::default() };
        for sums in &passes {
            report.loss += sums.mean() / passes.len() as f64;
            report.sums.add(*sums);
        }
        report
    }
}

/// Fails where what is asked of the optimizer leaves nothing to share out.
///
/// # Errors
/// The run file's key, and why.
pub fn can_be_shared_out(optimizer: &OptimizerOptions) -> Result<()> {
    if !optimizer.master {
        let problem = "found false with parallel.shard, which shares out parameters in f32; expected true";
        return Err(Error::config("optimizer.master", problem));
    }
    Ok(())
}

/// What the update after `counters` is told.
fn step_params(learning_rate: f64, counters: Counters, divisor: f64) -> StepParams {
    StepParams { learning_rate, step: counters.applied + 1, divisor, zero_gradients: false }
}

/// The run of a program over a batch.
fn pass<'a, B: Backend>(
    program: &'a Program<B>,
    activations: &'a mut Activations<B>,
    batch: Given<'a>,
    context: StepContext,
) -> Result<Pass<'a, B>> {
    let feed = match batch {
        Given::Values(batch) => Feed::Values(fills(program, batch)?),
        Given::Picked(picked) => {
            Feed::Rows(Gather { picked, input: program.input.into(), target: program.target.map(Room::from) })
        }
    };
    Ok(Pass { ops: &program.ops, activations, feed, metrics: program.metrics, context })
}

/// A batch's values, and where they go.
fn fills<'a, B: Backend>(program: &Program<B>, batch: &'a Batch) -> Result<Vec<Fill<'a>>> {
    let mut fills = vec![match (&batch.inputs, program.input) {
        (Inputs::Real(values), Value::Real(act)) => Fill::Real(act, Cow::Borrowed(values)),
        (Inputs::Tokens(values), Value::Tokens(indices)) => Fill::Indices(indices, values),
        (Inputs::Real(_), Value::Tokens(_)) => return Err(Error::shape("input", "whole numbers", "real values")),
        (Inputs::Tokens(_), Value::Real(_)) => return Err(Error::shape("input", "real values", "whole numbers")),
    }];
    if let Some(target) = program.target {
        fills.push(match (&batch.targets, target) {
            (Targets::Real(values), Value::Real(act)) => Fill::Real(act, Cow::Borrowed(values)),
            (Targets::Index(values), Value::Tokens(indices)) => Fill::Indices(indices, values),
            // Classes 0 and 1 as targets of a real output: logistic regression.
            (Targets::Index(classes), Value::Real(act)) => {
                Fill::Real(act, classes.iter().map(|&class| class as f32).collect())
            }
            (Targets::Real(_), Value::Tokens(_)) => return Err(Error::shape("target", "whole numbers", "real values")),
        });
    }
    Ok(fills)
}
