//! A part of a training step as it is queued: what goes in, and what comes out later.
//!
//! A device that works on its own takes [`Work`] without waiting for what came before, and tells by [`Finished`], in order, what
//! each found. The CPU does at once what it is given ([`at_once`]).

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;

use super::ops::{METRICS, Update};
use super::{Act, Activations, Arena, Backend, Exchange, Indices, Memory, Op, PassOfStep, StepContext};
use crate::data::{InputSpec, Picked, TargetSpec};
use crate::error::{Error, Result};
use crate::optim::{StepOutcome, StepParams, UpdatePlan};
use crate::plan::Window;
use crate::real::Element;

/// A part of a step: forward and backward of a micro-batch, an update, or one after the other.
pub struct Work<'a, B: Backend> {
    /// Parameters, gradients, slots.
    pub arena: &'a mut Arena<B>,
    /// Forward and backward.
    pub pass: Option<Pass<'a, B>>,
    /// What becomes of its gradients before the update, where they are not all.
    pub turn: Option<Turn<'a, B>>,
    /// The update after it.
    pub update: Option<UpdateWork<'a, B>>,
}

/// A pass whose gradients are a part of a step's, or whose parameters come from other processes.
pub struct Turn<'a, B: Backend> {
    /// What is done to them.
    pub exchange: &'a mut dyn Exchange<B>,
    /// Which pass it is.
    pub pass: PassOfStep,
    /// The program's window of parameters, where it sees them through one.
    pub window: Option<&'a Window>,
    /// What this process found in the step so far. Metrics are added where the host has them before the step goes on.
    pub found: &'a mut Found,
}

/// What a process found in the passes of a step, and tells all others with its gradients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Whether it raised its flag.
    pub flag: bool,
    /// Samples of its passes.
    pub samples: u64,
    /// Metrics of its passes, in their order.
    pub metrics: Vec<[f64; METRICS]>,
}

impl<B: Backend> Turn<'_, B> {
    /// A pass is about to run: brings what its first operation needs.
    pub(super) fn begin(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        self.bring(backend, arena, 0)?;
        self.exchange.begin(backend, arena, self.pass)
    }

    /// Whether operations are run one by one.
    pub(super) fn follows(&self) -> bool {
        self.window.is_some() || self.exchange.follows(self.pass)
    }

    /// An operation has run, or is queued: tells the exchange where that follows, and brings what the next one needs.
    pub(super) fn after_op(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        if self.exchange.follows(self.pass) {
            self.exchange.after_op(backend, arena, op)?;
        }
        self.bring(backend, arena, op + 1)
    }

    fn bring(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        self.window.map_or(Ok(()), |window| self.exchange.bring(backend, arena, window, op))
    }

    /// Takes the metrics of the pass, which has ended; at the end of the step, gives what every process found, in the order of
    /// ranks, through the host.
    ///
    /// # Errors
    /// A process that failed.
    pub(super) fn finish(&mut self, metrics: Option<[f64; METRICS]>) -> Result<Vec<Found>> {
        let Turn { exchange, pass, found, .. } = self;
        found.metrics.push(metrics.unwrap_or_default());
        if !pass.ends_step {
            return Ok(Vec::new());
        }
        let (rank, world) = exchange.place();
        let mut own = vec![f64::from(u8::from(found.flag)), found.samples as f64];
        own.extend(found.metrics.as_flattened());
        let mut all = vec![0f64; own.len() * world];
        all[rank * own.len()..(rank + 1) * own.len()].copy_from_slice(&own);
        exchange.gather(all.as_mut_slice().into())?;
        let of_process = |numbers: &[f64]| Found {
            flag: numbers[0] != 0.0,
            samples: numbers[1] as u64,
            metrics: numbers[2..].as_chunks().0.to_vec(),
        };
        Ok(all.chunks(own.len()).map(of_process).collect())
    }
}

/// Forward and backward of a micro-batch.
pub struct Pass<'a, B: Backend> {
    /// The program.
    pub ops: &'a [Box<dyn Op<B>>],
    /// The memory of its activations.
    pub activations: &'a mut Activations<B>,
    /// Inputs and targets.
    pub feed: Feed<'a>,
    /// Where the program leaves its metrics.
    pub metrics: Option<Act>,
    /// Seed, position, accumulation.
    pub context: StepContext,
}

/// What a pass computes with.
pub enum Feed<'a> {
    /// Values for its inputs and targets.
    Values(Vec<Fill<'a>>),
    /// Samples of a table.
    Rows(Gather<'a>),
}

/// Samples of a table, and where a program has room for them.
#[derive(Clone, Copy)]
pub struct Gather<'a> {
    /// The samples.
    pub picked: &'a Picked,
    /// Room for their inputs.
    pub input: Room,
    /// Room for their targets, where the program takes any. Classes go into room for real values as numbers.
    pub target: Option<Room>,
}

/// Room for one side of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Real values.
    Real(Act),
    /// Whole numbers.
    Whole(Indices),
}

impl Room {
    /// Its elements, of the activations' values or indices.
    pub fn range<B: Backend>(self, activations: &Activations<B>) -> Range<usize> {
        match self {
            Room::Real(act) => activations.range(act),
            Room::Whole(indices) => activations.index_range(indices),
        }
    }
}

impl Gather<'_> {
    /// Fails unless the samples fit into the room for them.
    ///
    /// # Errors
    /// Samples of another kind or number.
    pub(super) fn check<B: Backend>(&self, activations: &Activations<B>) -> Result<()> {
        let (table, samples) = (self.picked.table(), self.picked.samples());
        let [inputs, targets] = table.each();
        match (table.input(), self.input) {
            (InputSpec::Real { .. }, Room::Real(_)) | (InputSpec::Tokens { .. }, Room::Whole(_)) => {}
            (InputSpec::Real { .. }, Room::Whole(_)) => {
                return Err(Error::shape("input", "whole numbers", "real values"));
            }
            (InputSpec::Tokens { .. }, Room::Real(_)) => {
                return Err(Error::shape("input", "real values", "whole numbers"));
            }
        }
        check_len("batch", self.input.range(activations).len(), samples * inputs)?;
        let Some(room) = self.target else { return Ok(()) };
        if let (TargetSpec::Real { .. }, Room::Whole(_)) = (table.target(), room) {
            return Err(Error::shape("target", "whole numbers", "real values"));
        }
        check_len("batch", room.range(activations).len(), samples * targets)
    }
}

/// Values for an input or a target.
pub enum Fill<'a> {
    /// Real values, in f32.
    Real(Act, Cow<'a, [f32]>),
    /// Whole numbers.
    Indices(Indices, &'a [i32]),
}

/// The update of a step.
pub struct UpdateWork<'a, B: Backend> {
    /// Groups, tensors, clip.
    pub plan: &'a UpdatePlan,
    /// Learning rate, number and divisor. The number counts where nothing is queued before; else the device, which knows what it
    /// skipped, goes on from its own count.
    pub params: StepParams,
    /// The average of weights that follows the update, and its decay.
    pub average: Option<(f64, &'a mut B::Buffer<B::Real>)>,
}

/// What a part of a step found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finished {
    /// The program's metrics, where it ran and has any.
    pub metrics: Option<[f64; METRICS]>,
    /// What every process found in the step that this ended, in the order of ranks; empty where none had a turn.
    pub processes: Vec<Found>,
    /// What the update found, where there was one.
    pub outcome: Option<StepOutcome>,
    /// The sum of squares of each tensor's gradients at that update ([`Update::norm_squares`]); else empty.
    pub norm_squares: Vec<f64>,
}

/// The dynamic loss scale of a training that stores activations in f16, where small gradients would vanish.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LossScale {
    /// What gradients are multiplied by on their way: a power of 2.
    pub scale: f32,
    /// Steps without a skip since it last changed.
    pub good_steps: u32,
}

impl LossScale {
    /// Where it starts, as PyTorch's `GradScaler` does.
    pub const INITIAL: LossScale = LossScale { scale: 65_536.0, good_steps: 0 };
}

/// Fails unless `found` values fit into the room for an input.
///
/// # Errors
/// Another number.
pub(super) fn check_len(what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::shape(what, format!("{expected} values"), found.to_string()))
}

impl<B: Backend> Pass<'_, B> {
    /// Writes the batch, by the backend's plain copies or as it gathers.
    fn fill(&mut self, backend: &B) -> Result<()> {
        let activations = &mut *self.activations;
        let fills = match &self.feed {
            Feed::Values(fills) => fills,
            Feed::Rows(gather) => return backend.gather(activations, gather),
        };
        for fill in fills {
            match fill {
                Fill::Real(act, values) => {
                    let range = activations.range(*act);
                    check_len("batch", range.len(), values.len())?;
                    let values: Vec<B::Storage> = values.iter().map(|&v| B::Storage::from_f32(v)).collect();
                    backend.upload(&mut activations.values, range.start, &values)?;
                }
                Fill::Indices(indices, values) => {
                    let range = activations.index_range(*indices);
                    check_len("batch", range.len(), values.len())?;
                    backend.upload(&mut activations.indices, range.start, values)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the batch, runs the program, and reads its metrics when that is done.
    ///
    /// # Errors
    /// A batch of another shape, or what an operation reports.
    pub fn run(self, backend: &B, arena: &mut Arena<B>) -> Result<Option<[f64; METRICS]>> {
        self.run_in_turn(backend, arena, None)
    }

    /// As [`Pass::run`], and tells an exchange of it.
    ///
    /// # Errors
    /// As [`Pass::run`], and what the exchange reports.
    pub fn run_in_turn(
        mut self,
        backend: &B,
        arena: &mut Arena<B>,
        turn: Option<&mut Turn<'_, B>>,
    ) -> Result<Option<[f64; METRICS]>> {
        self.fill(backend)?;
        let (ops, context) = (self.ops, self.context);
        let mut memory = Memory { arena, activations: &mut *self.activations };
        match turn {
            None => backend.run(ops, &mut memory, &context)?,
            Some(turn) => {
                turn.begin(backend, memory.arena)?;
                if turn.follows() {
                    let after = &mut |memory: &mut Memory<'_, B>, op| turn.after_op(backend, memory.arena, op);
                    backend.run_each(ops, &mut memory, &context, after)?;
                } else {
                    backend.run(ops, &mut memory, &context)?;
                }
                turn.exchange.end(backend, memory.arena, turn.pass)?;
            }
        }
        self.read_metrics(backend)
    }

    /// As [`Pass::run`], of a program that sees its parameters through a window.
    ///
    /// # Errors
    /// As [`Pass::run`], and what the exchange reports.
    pub fn run_through(
        mut self,
        backend: &B,
        arena: &mut Arena<B>,
        exchange: &mut dyn Exchange<B>,
        window: &Window,
    ) -> Result<Option<[f64; METRICS]>> {
        self.fill(backend)?;
        let (ops, context) = (self.ops, self.context);
        let mut memory = Memory { arena, activations: &mut *self.activations };
        exchange.bring(backend, memory.arena, window, 0)?;
        let after = &mut |memory: &mut Memory<'_, B>, op| exchange.bring(backend, memory.arena, window, op + 1);
        backend.run_each(ops, &mut memory, &context, after)?;
        self.read_metrics(backend)
    }

    fn read_metrics(&self, backend: &B) -> Result<Option<[f64; METRICS]>> {
        let Some(act) = self.metrics else { return Ok(None) };
        let mut metrics = [B::Real::default(); METRICS];
        backend.read_statistic(self.activations, act, &mut metrics)?;
        Ok(Some(metrics.map(Element::f64)))
    }
}

/// Does the work and waits for it.
///
/// # Errors
/// A batch of another shape, or what the device reports.
pub fn at_once<B: Update>(backend: &B, finished: &mut VecDeque<Finished>, work: Work<'_, B>) -> Result<()> {
    let Work { arena, pass, mut turn, update } = work;
    let metrics = match pass {
        Some(pass) => pass.run_in_turn(backend, arena, turn.as_mut())?,
        None => None,
    };
    let processes = turn.as_mut().map_or(Ok(Vec::new()), |turn| turn.finish(metrics))?;
    let outcome = match update {
        Some(UpdateWork { plan, params, average }) => {
            let outcome = match &mut turn {
                Some(Turn { exchange, .. }) if arena.held.is_some() => {
                    let outcome = backend.update_held(arena, plan, &params, *exchange)?;
                    if !outcome.skipped {
                        exchange.spread(backend, arena)?;
                    }
                    outcome
                }
                _ => backend.update(arena, plan, &params)?,
            };
            if let (false, Some((decay, average))) = (outcome.skipped, average) {
                backend.average_arena(average, arena, decay)?;
            }
            Some(outcome)
        }
        None => None,
    };
    let norm_squares = if outcome.is_some() { backend.norm_squares(arena)? } else { Vec::new() };
    finished.push_back(Finished { metrics, processes, outcome, norm_squares });
    Ok(())
}
