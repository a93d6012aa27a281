//! A planned program: operations in order, and a place for every activation.

use std::ops::Range;

use super::layer::Value;
use super::parameters::ParamTable;
use super::planner::Row;
use crate::backend::{Act, Activations, Backend, InputSlot, Op, Use, Workspace};
use crate::error::Result;
use crate::plan::{Lifetime, MemoryPlan};

/// What an operation must move and compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpCost {
    /// The operation's name.
    pub name: &'static str,
    /// Bytes of all that it names, each once, as it is stored: what it must move if caches hold nothing between operations and
    /// everything within one. What it adds to or turns in place counts twice, of what it touches a part alone that part: rows of a
    /// table for tokens that are all different, since tokens are not known. Scratch does not count.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
}

/// Everything that runs for one batch, planned once for its shape.
pub struct Program<B: Backend> {
    /// The operations: forward, loss, backward.
    pub ops: Vec<Box<dyn Op<B>>>,
    /// How many of them are forward and loss.
    pub forward_ops: usize,
    /// Where each activation lies.
    pub values: MemoryPlan,
    /// When each activation is alive.
    pub value_lifetimes: Vec<Lifetime>,
    /// Where each index tensor lies.
    pub indices: MemoryPlan,
    /// When each index tensor is alive.
    pub index_lifetimes: Vec<Lifetime>,
    /// Where the batch's inputs go.
    pub input: Value,
    /// Where the batch's targets go; none for inference.
    pub target: Option<Value>,
    /// The loss's metrics ([`crate::backend::ops::METRICS`] values); none for inference.
    pub metrics: Option<Act>,
    /// The model's output.
    pub output: Act,
    /// Shape of the output, samples first.
    pub output_shape: Vec<usize>,
    /// The model's table.
    pub rows: Vec<Row>,
    /// Floating-point operations that recompute what was computed before.
    pub repeated_flops: u64,
}

/// Bytes of a program's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivationBytes {
    /// Room for batches: inputs and targets.
    pub inputs: usize,
    /// What is computed of them.
    pub others: usize,
}

impl ActivationBytes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.inputs + self.others
    }
}

/// Where a program's activations lie.
struct Room {
    ranges: Vec<Range<usize>>,
    index_ranges: Vec<Range<usize>>,
    slots: Vec<InputSlot>,
    /// Elements in all.
    values: usize,
    /// Whole numbers in all.
    indices: usize,
}

impl<B: Backend> Program<B> {
    /// Memory for the activations, with room for one batch.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn activations(&self, backend: &B) -> Result<Activations<B>> {
        self.activations_with_slots(backend, 1)
    }

    /// Memory for the activations, with room for so many batches.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn activations_with_slots(&self, backend: &B, slots: usize) -> Result<Activations<B>> {
        let Room { ranges, index_ranges, slots, values, indices } = self.room(slots);
        Ok(Activations {
            ranges,
            index_ranges,
            values: backend.allocate(values)?,
            indices: backend.allocate(indices)?,
            slots,
            recording: B::Recording::default(),
        })
    }

    /// Where everything lies, with room for so many batches.
    fn room(&self, slots: usize) -> Room {
        let ranges = |plan: &MemoryPlan, lives: &[Lifetime]| -> Vec<Range<usize>> {
            plan.offsets.iter().zip(lives).map(|(&offset, life)| offset..offset + life.len).collect()
        };
        let (planned, planned_indices) =
            (ranges(&self.values, &self.value_lifetimes), ranges(&self.indices, &self.index_lifetimes));
        let (mut values, mut indices) = (self.values.peak, self.indices.peak);
        let place = |end: &mut usize, planned: &Range<usize>, slot: usize| {
            if slot == 0 {
                return planned.clone();
            }
            let start = end.next_multiple_of(MemoryPlan::ALIGNMENT);
            *end = start + planned.len();
            start..*end
        };
        let slots = (0..slots).map(|slot| {
            let mut inputs = InputSlot::default();
            for value in [Some(self.input), self.target].into_iter().flatten() {
                match value {
                    Value::Real(act) => {
                        let range = place(&mut values, &planned[act.0 as usize], slot);
                        inputs.values.push((act, range));
                    }
                    Value::Tokens(tokens) => {
                        let range = place(&mut indices, &planned_indices[tokens.0 as usize], slot);
                        inputs.indices.push((tokens, range));
                    }
                }
            }
            inputs
        });
        let slots = slots.collect();
        Room { ranges: planned, index_ranges: planned_indices, slots, values, indices }
    }

    /// Bytes of [`Program::activations_with_slots`]: those of inputs and targets, and all else. No device is asked.
    pub fn activation_parts(&self, slots: usize) -> ActivationBytes {
        let Room { slots, values, indices, .. } = self.room(slots);
        let (storage, index) = (size_of::<B::Storage>(), size_of::<i32>());
        let of_slot = |slot: &InputSlot| {
            let values: usize = slot.values.iter().map(|(_, range)| range.len()).sum();
            let indices: usize = slot.indices.iter().map(|(_, range)| range.len()).sum();
            values * storage + indices * index
        };
        let inputs = slots.iter().map(of_slot).sum();
        ActivationBytes { inputs, others: values * storage + indices * index - inputs }
    }

    /// What its operations take of the device's memory besides what they name, one after the other.
    ///
    /// # Errors
    /// As [`Backend::workspace`].
    pub fn workspace(&self, device: Option<&B>) -> Result<Workspace> {
        self.ops.iter().try_fold(Workspace::default(), |most, op| Ok(most.or(B::workspace(&**op, device)?)))
    }

    /// The operation at which most bytes of activations are alive: its position, and the bytes. None of an empty program.
    pub fn fullest(&self) -> Option<(usize, usize)> {
        let mut changes = vec![0isize; self.ops.len() + 1];
        for (lives, element) in
            [(&self.value_lifetimes, size_of::<B::Storage>()), (&self.index_lifetimes, size_of::<i32>())]
        {
            for life in lives.iter().filter(|life| life.len > 0) {
                let bytes = (life.len.next_multiple_of(MemoryPlan::ALIGNMENT) * element) as isize;
                changes[life.first.min(self.ops.len())] += bytes;
                changes[(life.last + 1).min(self.ops.len())] -= bytes;
            }
        }
        let mut alive = 0;
        let sums = changes[..self.ops.len()].iter().map(|change| {
            alive += change;
            alive.unsigned_abs()
        });
        // The first of those that are equal.
        sums.enumerate().max_by_key(|&(position, bytes)| (bytes, std::cmp::Reverse(position)))
    }

    /// Floating-point operations that the model asks for: those of one run, without what is computed again to save memory, be it
    /// by a block or within an operation.
    pub fn model_flops(&self) -> u64 {
        let repeated: u64 = self.ops.iter().map(|op| op.repeated_flops()).sum();
        self.flops().saturating_sub(self.repeated_flops + repeated)
    }

    /// Floating-point operations of one run.
    pub fn flops(&self) -> u64 {
        self.ops.iter().map(|op| op.flops()).sum()
    }

    /// What each operation must move and compute, in their order. `parameters` are those of the program's model.
    ///
    /// # Errors
    /// What [`ParamTable::layout`] reports.
    pub fn costs(&self, parameters: &ParamTable) -> Result<Vec<OpCost>> {
        let (_, ranges) = parameters.layout()?;
        let states = parameters.state_layout()?;
        let [storage, real] = [size_of::<B::Storage>(), size_of::<B::Real>()];
        let size = |op: &dyn Op<B>, used: Use| {
            let (values, element) = match used {
                Use::Activation(act) => (self.value_lifetimes[act.0 as usize].len, storage),
                Use::Indices(indices) => (self.index_lifetimes[indices.0 as usize].len, size_of::<i32>()),
                Use::Parameter(param) => (ranges[param.0 as usize].len(), storage),
                // What is added to is read as well.
                Use::Gradient(grad) => (ranges[grad.param.0 as usize].len() * if grad.first { 1 } else { 2 }, real),
                Use::State(state) => (states.entries()[state.0 as usize].range().len(), real),
            };
            op.moved(used).unwrap_or(values) * element
        };
        let cost = |op: &dyn Op<B>| {
            let mut named: Vec<Use> = Vec::new();
            op.uses(&mut |used| {
                if !named.contains(&used) {
                    named.push(used);
                }
            });
            let bytes = named.into_iter().map(|used| size(op, used) as u64).sum();
            OpCost { name: op.name(), bytes, flops: op.flops() }
        };
        Ok(self.ops.iter().map(|op| cost(&**op)).collect())
    }
}
