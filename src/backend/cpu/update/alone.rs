//! The update of parameters that are kept in bf16 alone: computed in f32, rounded stochastically.

use half::bf16;
use rayon::prelude::*;

use super::{PIECE, update};
use crate::error::Result;
use crate::optim::{StepOutcome, StepParams, UpdatePlan, round_stochastically};
use crate::random::{Philox, Purpose};

/// As [`update`] of the parameters in f32, each result then rounded to bf16 by the word at its place in the arena, in the stream
/// of this update's number: what the device does, to the bit. `seed` is that of the run.
///
/// # Errors
/// As [`update`].
pub fn update_bf16(
    parameters: &mut [bf16],
    gradients: &mut [f32],
    slots: &mut [&mut [f32]],
    plan: &UpdatePlan,
    step: &StepParams,
    seed: u64,
) -> Result<StepOutcome> {
    let mut wide: Vec<f32> = parameters.par_iter().map(|p| p.to_f32()).collect();
    let outcome = update(&mut wide, gradients, slots, plan, step)?;
    if !outcome.skipped {
        let words = Philox::new(seed, Purpose::Rounding, step.step as u32);
        parameters.par_chunks_mut(PIECE).zip(wide.par_chunks(PIECE)).enumerate().for_each(|(piece, (to, from))| {
            let mut drawn = vec![0; from.len()];
            words.words((piece * PIECE) as u64, &mut drawn);
            for ((to, &from), word) in to.iter_mut().zip(from).zip(drawn) {
                *to = round_stochastically(from, word);
            }
        });
    }
    Ok(outcome)
}
