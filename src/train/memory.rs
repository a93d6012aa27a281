//! What a run takes of its device's memory, told before any of it is allocated.
//!
//! All of it is planned: activations by the lifetimes of a program, parameters and what goes with them by the arena's layout. The
//! plan depends on the device's kind and on what it stores, not on a device: none need be there.

use crate::backend::ops::Update;
use crate::backend::{Backend, Op, Param, Use, stores_what_it_computes_in};
use crate::data::{Splits, Table};
use crate::error::{Error, Result};
use crate::model::{ActivationBytes, Input, Mode, Model, ParamTable, Program};
use crate::optim::{OptimizerOptions, UpdatePlan};
use crate::parallel::{Footprint, Shard, Sharding, ShardingOptions, buckets};
use crate::plan::Share;
use crate::real::Element;

/// What a run asks for.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// What a sample's input is.
    pub input: Input,
    /// Samples of a pass: of a micro-batch, or of this process's part of it.
    pub batch_size: usize,
    /// Samples of the batch that ends a pass over the data, where it is not full and trained on.
    pub left: Option<usize>,
    /// Samples of the batches of evaluations, each number once.
    pub evaluations: Vec<usize>,
    /// Rule, clip, groups; whether parameters of 16 bits have a master.
    pub optimizer: &'a OptimizerOptions,
    /// Whether there is an average of weights.
    pub average: bool,
    /// The process's share of the batch and of the memory, where several train together, or one by parts of a batch.
    pub share: Option<(Share, ShardingOptions)>,
}

/// Numbers of samples that evaluations of these splits take at a time, each once, where a pass of training takes `batch_size`.
pub fn evaluated(splits: &Splits, batch_size: usize) -> Vec<usize> {
    let mut found = Vec::new();
    for split in [&splits.validation, &splits.test].into_iter().flatten().filter(|split| !split.is_empty()) {
        let size = batch_size.min(split.len());
        found.extend([size, split.len() % size].into_iter().filter(|&samples| samples > 0));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// A problem with the batch that ends a pass over the data, of `left` samples, by the key that asks for it.
pub(super) fn of_the_last_batch(left: usize, problem: &Error) -> Error {
    Error::config("data.drop_last", format!("with false, what is left for the last batch is {left}: {problem}"))
}

/// A part of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it holds.
    pub name: &'static str,
    /// In what: `f32`, `2 slots in f32`.
    pub of: String,
    /// Its bytes.
    pub bytes: usize,
}

/// The operation at which most activations are alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fullest {
    /// Its number in the program, from 1.
    pub number: usize,
    /// Its name, and, where it has one, its parameter's.
    pub name: String,
    /// Bytes alive.
    pub bytes: usize,
}

/// The memory of a run, part by part.
#[derive(Clone, Debug)]
pub struct RunMemory {
    /// The parts that are there.
    pub parts: Vec<Part>,
    /// Where the training program is fullest.
    pub fullest: Option<Fullest>,
}

impl RunMemory {
    /// Bytes in all.
    pub fn total(&self) -> usize {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// With a data set that the device keeps.
    #[must_use]
    pub fn with_table<B: Backend>(mut self, table: &Table) -> Self {
        let bytes = B::table_room(table);
        if bytes > 0 {
            self.parts.push(Part { name: "data set", of: B::Storage::NAME.to_owned(), bytes });
        }
        self
    }

    /// Plans the programs of a run, and sums its memory up: the training program, and the memory.
    ///
    /// # Errors
    /// Shapes that do not fit, or options that do not validate.
    pub fn plan<B: Update>(model: &mut Model<B>, wanted: &Wanted<'_>) -> Result<(Program<B>, Self)> {
        Self::plan_on(model, wanted, None)
    }

    /// As [`RunMemory::plan`], where a device is there to be asked what its libraries take.
    ///
    /// # Errors
    /// As [`RunMemory::plan`], a library that is missing, or a device that failed.
    pub fn plan_on<B: Update>(
        model: &mut Model<B>,
        wanted: &Wanted<'_>,
        device: Option<&B>,
    ) -> Result<(Program<B>, Self)> {
        let program = model.plan(&wanted.input, wanted.batch_size, Mode::Training)?;
        let (layout, ranges) = model.parameters().layout()?;
        let plan = UpdatePlan::new(wanted.optimizer, &layout)?;
        let shared_out = wanted.share.filter(|(_, options)| options.shard != Shard::None && options.world > 1);
        let sharding =
            shared_out.map(|(_, options)| Sharding::new(options, &program.ops, &layout, &ranges, &plan)).transpose()?;
        let own = sharding.as_ref().map_or(0..layout.padded_len(), Sharding::own);
        let mut workspace = program.workspace(device)?.or(B::update_workspace(&plan, &own));
        let (mut evaluation, mut window) = (0, sharding.as_ref().and_then(|s| s.parameters.clone()));
        for &samples in &wanted.evaluations {
            let program = model.plan(&wanted.input, samples, Mode::Evaluation)?;
            evaluation += program.activation_parts(1).total();
            workspace = workspace.or(program.workspace(device)?);
            let other = sharding.as_ref().and_then(|sharding| sharding.window(&program.ops));
            window = [window, other].into_iter().flatten().max_by_key(|window| window.len);
        }
        let (real, storage) = ((B::Real::NAME, size_of::<B::Real>()), (B::Storage::NAME, size_of::<B::Storage>()));
        let one_type = stores_what_it_computes_in::<B>();
        let len = layout.padded_len();
        let part =
            |name, (of, element): (&str, usize), len: usize| Part { name, of: of.to_owned(), bytes: len * element };
        let bytes = |name, of: String, bytes| Part { name, of, bytes };
        let copy = if wanted.optimizer.master { "copy of parameters" } else { "parameters" };
        let slots = plan.slots.len();
        let ActivationBytes { mut inputs, mut others } = program.activation_parts(B::INPUT_SLOTS);
        if let Some(left) = wanted.left {
            let smaller = model.plan(&wanted.input, left, Mode::Training);
            let smaller = smaller.map_err(|e| of_the_last_batch(left, &e))?;
            workspace = workspace.or(smaller.workspace(device)?);
            let smaller = smaller.activation_parts(B::INPUT_SLOTS);
            inputs += smaller.inputs;
            others += smaller.others;
        }
        let batches = if B::INPUT_SLOTS == 1 { "1 batch".to_owned() } else { format!("{} batches", B::INPUT_SLOTS) };
        let state = model.parameters().state_layout()?;
        let held = match wanted.share {
            None => Footprint::alone(len),
            Some((share, options)) => {
                let buckets = buckets(&program.ops, &ranges, &layout, options.bucket)?;
                let lens = [len, state.padded_len()];
                Footprint::new((share, options), &buckets, lens, sharding.as_ref(), window.as_ref(), B::QUEUES_SUMS)
            }
        };
        let scratch = match workspace.is_bound {
            true => "of operations, in turn; at most, as convolutions take what cuDNN asks for on the device",
            false => "of operations, in turn",
        };
        // Of what is kept in another type besides, a process keeps what it updates.
        let masters = if one_type { held.parameters } else { held.updated };
        let parts = [
            part("parameters", real, if wanted.optimizer.master { masters } else { 0 }),
            part("window of parameters", storage, held.parameter_window),
            part(copy, storage, if one_type { 0 } else { held.parameters }),
            part("gradients", real, held.gradients),
            part("window of gradients", real, held.gradient_window),
            part("sums of parts", real, held.sums),
            part("buckets on their way", real, held.on_their_way),
            bytes("optimizer slots", format!("{}, {}", real.0, plan.slots.join(", ")), slots * held.updated * real.1),
            part("average of weights", real, if wanted.average { held.updated } else { 0 }),
            part("running statistics", real, state.padded_len()),
            bytes("tables of the update", String::new(), B::table_bytes(&plan, &own)),
            bytes("activations", storage.0.to_owned(), others),
            bytes("inputs and targets", batches, inputs),
            bytes("evaluation", storage.0.to_owned(), evaluation),
            bytes("scratch", scratch.to_owned(), workspace.scratch),
            bytes("libraries", "for products".to_owned(), workspace.libraries),
        ];
        let fullest = program.fullest().map(|(position, bytes)| {
            let op = program.ops[position].as_ref();
            Fullest { number: position + 1, name: name_of(op, model.parameters()), bytes }
        });
        Ok((program, RunMemory { parts: parts.into_iter().filter(|part| part.bytes > 0).collect(), fullest }))
    }
}

/// What an operation is called, and the first parameter that it reads or makes the gradient of.
fn name_of<B: Backend>(op: &dyn Op<B>, parameters: &ParamTable) -> String {
    let mut found: Option<Param> = None;
    op.uses(&mut |used| match used {
        Use::Parameter(param) => found = found.or(Some(param)),
        Use::Gradient(grad) => found = found.or(Some(grad.param)),
        Use::Activation(_) | Use::Indices(_) | Use::State(_) => {}
    });
    match found.and_then(|param| parameters.specs().nth(param.0 as usize)) {
        Some(spec) => format!("{} of {}", op.name(), spec.name),
        None => op.name().to_owned(),
    }
}
