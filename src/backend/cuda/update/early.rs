//! The norm of gradients that backward has finished, gathered while they are in the second-level cache.
//!
//! cuBLASLt writes weight gradients in f32 itself, and none of its epilogues sums squares, so no kernel of ours writes them last
//! and could sum as it writes. What saves the second reading from memory is the order: as soon as the last operation that writes
//! some tensors' gradients is queued, so is the norm's part of them ([`Cuda::gather_norm`]), which then reads from cache. A sum over
//! a piece does not depend on when it is taken: the bits are those of the norm taken at the end.
//!
//! It holds for the last micro-batch of a step alone, and before an all-reduce not at all.

use std::ops::Range;

use super::Prepared;
use crate::backend::cuda::{Cuda, Storage};
use crate::backend::{Alone, Arena, Backend, Op, Use};
use crate::error::{Error, Result};
use crate::optim::{StepOutcome, StepParams, UpdatePlan};

/// After which operation of a program the norm of which tensors is gathered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlyNorm {
    /// Index of the operation, and the tensors by their number in the plan. In the program's order; all tensors once.
    pub after: Vec<(usize, Range<usize>)>,
}

impl EarlyNorm {
    /// The order for a program: a range of tensors is gathered once it is finished and holds `elements` values or more, and what
    /// is left after the last operation. The arena is laid out in the order that backward finishes it, so ranges are long.
    ///
    /// # Errors
    /// A program that writes the gradient of a parameter that the plan does not have.
    pub fn new<B: Backend>(
        program: &[Box<dyn Op<B>>],
        ranges: &[Range<usize>],
        plan: &UpdatePlan,
        elements: usize,
    ) -> Result<Self> {
        let mut last_write = vec![0; plan.tensors.len()];
        for (index, op) in program.iter().enumerate() {
            let mut unknown = None;
            op.uses(&mut |used| {
                let Use::Gradient(grad) = used else { return };
                let range = ranges.get(grad.param.0 as usize);
                let found = |range: &Range<usize>| {
                    plan.tensors.iter().position(|t| t.offset == range.start && t.len == range.len())
                };
                match range.and_then(found) {
                    Some(tensor) => last_write[tensor] = index,
                    None => unknown = Some(grad.param),
                }
            });
            if let Some(param) = unknown {
                return Err(Error::shape("gather_norm", "gradients of the plan's tensors", format!("{param:?}")));
            }
        }
        let mut early = EarlyNorm::default();
        let (mut gathered, mut finished) = (0, 0);
        for op in 0..program.len() {
            let last = op + 1 == program.len();
            while finished < plan.tensors.len() && (last || last_write[finished] <= op) {
                finished += 1;
            }
            let waiting: usize = plan.tensors[gathered..finished].iter().map(|tensor| tensor.len).sum();
            if gathered < finished && (last || waiting >= elements) {
                early.after.push((op, gathered..finished));
                gathered = finished;
            }
        }
        Ok(early)
    }

    /// The tensors to gather after an operation.
    pub fn tensors_after(&self, op: usize) -> Option<Range<usize>> {
        self.after.binary_search_by_key(&op, |&(op, _)| op).ok().map(|at| self.after[at].1.clone())
    }
}

impl Prepared {
    /// The pieces of some tensors.
    pub(in crate::backend::cuda) fn pieces_of(&self, tensors: &Range<usize>) -> Range<usize> {
        let pieces = |number: usize| self.first_pieces.get(number).map_or(self.pieces.len(), |&first| first as usize);
        pieces(tensors.start)..pieces(tensors.end)
    }
}

impl<S: Storage> Cuda<S> {
    /// Of how many values on it pays to gather a part of the norm: a quarter of the second-level cache.
    ///
    /// # Errors
    /// A device that failed.
    pub fn early_elements(&self) -> Result<usize> {
        Ok(self.device().cache_bytes()? / 4 / size_of::<f32>())
    }

    /// Whether parts of the norm are better gathered early: not where the whole update is one launch.
    ///
    /// # Errors
    /// An arena that does not fit the plan, or a device that failed.
    pub fn gathers_early(&self, arena: &mut Arena<Self>, plan: &UpdatePlan) -> Result<bool> {
        let (prepared, arrays) = self.arrays(arena, plan)?;
        Ok(prepared.persistent_blocks(&arrays)?.is_none())
    }

    /// Writes what the update of this step is told, in the order of the stream: before the first [`Cuda::gather_norm`].
    ///
    /// # Errors
    /// An arena that does not fit the plan, or a device that failed.
    pub fn begin_update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<()> {
        self.arrays(arena, plan)?.0.prepare(step)
    }

    /// Queues the norm's part of some tensors, by their numbers in the plan, whose gradients are final once what is queued is done.
    ///
    /// # Errors
    /// An arena or tensors that do not fit the plan, or a device that failed.
    pub fn gather_norm(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, tensors: Range<usize>) -> Result<()> {
        if tensors.start > tensors.end || tensors.end > plan.tensors.len() {
            let expected = format!("some of {} tensors", plan.tensors.len());
            return Err(Error::shape("gather_norm", expected, format!("{tensors:?}")));
        }
        let (prepared, arrays) = self.arrays(arena, plan)?;
        prepared.queue_norm_range(&arrays, prepared.pieces_of(&tensors), prepared.params.address_of(0))
    }

    /// The update once the norm of every tensor was gathered: as [`crate::backend::ops::Update::update`], with the same bits.
    ///
    /// # Errors
    /// An arena that does not fit the plan, or a device that failed.
    pub fn finish_update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome> {
        let (prepared, arrays) = self.arrays(arena, plan)?;
        let params = prepared.params.address_of(0);
        prepared.queue_gathered(&arrays, step.zero_gradients, params, &mut Alone)?;
        prepared.outcome()
    }
}
