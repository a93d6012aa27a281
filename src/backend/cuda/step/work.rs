//! What the recording of a step holds, queued in its order.

use super::super::pinned::{Piece, report};
use super::super::team::Team;
use super::super::update::{EarlyNorm, Outcome};
use super::super::{Cuda, Storage, recording};
use super::{Report, Slot, UPDATE_PARAMS};
use crate::backend::ops::METRICS;
use crate::backend::step::{Pass, Turn, UpdateWork};
use crate::backend::{Alone, Arena, Memory, PassOfStep};
use crate::error::Result;
use crate::optim::UpdatePlan;

/// What one recording holds.
pub(super) struct Parts<'p, 'w, S: Storage> {
    pub pass: &'p mut Option<Pass<'w, Cuda<S>>>,
    pub turn: &'p mut Option<Turn<'w, Cuda<S>>>,
    pub update: &'p mut Option<UpdateWork<'w, Cuda<S>>>,
}

/// Where what work found stands on the device, and how much of it.
#[derive(Default)]
struct Left {
    metrics: Option<u64>,
    outcome: Option<u64>,
    squares: (u64, usize),
}

impl<S: Storage> Parts<'_, '_, S> {
    /// Queues everything of the work that is the same each time.
    pub fn queue(self, backend: &Cuda<S>, slot: &Slot, team: Option<&Team>, arena: &mut Arena<Cuda<S>>) -> Result<()> {
        let device = backend.device();
        if self.update.is_some() {
            backend.scale_divisor(arena)?;
        }
        // With the gradients of a whole step, and no one launch for all of the update, the norm is gathered behind the backward.
        let early = match (&self.pass, &self.turn, &self.update) {
            (Some(pass), None, Some(UpdateWork { plan, .. })) if backend.gathers_early(arena, plan)? => {
                Some((*plan, EarlyNorm::new(pass.ops, &arena.ranges, plan, backend.early_elements()?)?))
            }
            _ => None,
        };
        let mut left = Left::default();
        if let Some(pass) = self.pass {
            left.metrics = queue_pass(backend, arena, pass, self.turn.as_mut(), early.as_ref())?;
        }
        if let (Some(turn), Some(team)) = (self.turn.as_mut(), team) {
            team.take(device, left.metrics, turn.pass)?;
            turn.exchange.end(backend, arena, turn.pass)?;
            if turn.pass.ends_step {
                turn.exchange.gather(team.tell(device, slot.told.bytes())?)?;
            }
        }
        if let Some(update) = self.update {
            queue_update(backend, arena, update, self.turn.as_mut(), early.is_some(), &mut left)?;
        }
        let mut pieces = Vec::with_capacity(4);
        if let (Some(Turn { exchange, pass: PassOfStep { ends_step: true, .. }, .. }), Some(team), Some(to)) =
            (self.turn, team, &slot.team)
        {
            exchange.join()?;
            pieces.push(Piece { from: team.address(), to, offset: 0, bytes: team.bytes() });
        }
        let Left { metrics, outcome, squares } = left;
        let mut piece = |from, offset, bytes| pieces.push(Piece { from, to: &slot.report, offset, bytes });
        if let Some(metrics) = metrics {
            piece(metrics, std::mem::offset_of!(Report, metrics), size_of::<[f32; METRICS]>());
        }
        if let Some(outcome) = outcome {
            piece(outcome, std::mem::offset_of!(Report, outcome), size_of::<Outcome>());
            // The plan has as many tensors as the arena.
            piece(squares.0, size_of::<Report>(), squares.1);
        }
        report(device, &pieces)
    }
}

/// Queues forward and backward, and tells the exchange of it. Gives where the metrics are left.
fn queue_pass<S: Storage>(
    backend: &Cuda<S>,
    arena: &mut Arena<Cuda<S>>,
    pass: &mut Pass<'_, Cuda<S>>,
    mut turn: Option<&mut Turn<'_, Cuda<S>>>,
    early: Option<&(&UpdatePlan, EarlyNorm)>,
) -> Result<Option<u64>> {
    let params = backend.device().step_state() + UPDATE_PARAMS;
    if let Some(turn) = &mut turn {
        turn.begin(backend, arena)?;
    }
    let mut memory = Memory { arena, activations: &mut *pass.activations };
    for (index, op) in pass.ops.iter().enumerate() {
        recording::one(backend, op.as_ref(), &mut memory, &pass.context)?;
        match &mut turn {
            Some(turn) if turn.follows() => turn.after_op(backend, memory.arena, index)?,
            _ => {}
        }
        if let Some((plan, early)) = early
            && let Some(tensors) = early.tensors_after(index)
        {
            let (prepared, arrays) = backend.arrays(memory.arena, plan)?;
            prepared.queue_norm_range(&arrays, prepared.pieces_of(&tensors), params)?;
        }
    }
    Ok(pass.metrics.map(|act| pass.activations.values.address_of(pass.activations.range(act).start)))
}

/// Queues the update and what follows it; `gathered`: whether its norm is. Of an arena that is shared out it is that of what this
/// process holds, and others then get the parameters that they keep.
fn queue_update<S: Storage>(
    backend: &Cuda<S>,
    arena: &mut Arena<Cuda<S>>,
    update: &mut UpdateWork<'_, Cuda<S>>,
    mut turn: Option<&mut Turn<'_, Cuda<S>>>,
    gathered: bool,
    left: &mut Left,
) -> Result<()> {
    let UpdateWork { plan, params, average } = update;
    let address = backend.device().step_state() + UPDATE_PARAMS;
    let shared_out = arena.held.is_some();
    let (prepared, arrays) = backend.arrays(arena, plan)?;
    match turn.as_mut() {
        _ if gathered => prepared.queue_gathered(&arrays, params.zero_gradients, address, &mut Alone)?,
        Some(turn) if shared_out => prepared.queue_together(&arrays, params.zero_gradients, address, turn.exchange)?,
        turn => {
            // One launch fills the device: what exchanges beside it would hold places that its blocks wait for.
            if let (Some(turn), Some(_)) = (turn, prepared.persistent_blocks(&arrays)?) {
                turn.exchange.join()?;
            }
            prepared.queue(&arrays, params.zero_gradients, address)?;
        }
    }
    let outcome = prepared.outcome_address();
    let (first, tensors) = prepared.tensor_squares();
    if let Some(turn) = turn.filter(|_| shared_out) {
        turn.exchange.spread(backend, arena)?;
    }
    if let Some((decay, average)) = average {
        backend.queue_average(average, arena, *decay, outcome)?;
    }
    backend.adapt_loss_scale(arena, outcome)?;
    (left.outcome, left.squares) = (Some(outcome), (first, tensors * size_of::<f64>()));
    Ok(())
}
