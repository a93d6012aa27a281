//! Dropout.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{PIECE, vectorize};
use crate::backend::ops::{Dropout, DropoutApply};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::random::{Philox, Purpose, to_unit};
use crate::real::Real;

/// First position in a dropout stream of a part of `len` values of a micro-batch.
pub(super) fn first_position(step: &StepContext, len: usize) -> u64 {
    (step.micro_step << 40) + step.part * len as u64
}

impl<R: Real> Dropout for Cpu<R> {
    fn dropout(&self, memory: &mut Memory<'_, Self>, args: &DropoutApply, step: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "dropout")?;
        let stream = Philox::new(step.seed, Purpose::Dropout, args.stream);
        let probability = args.probability as f32;
        let scale = R::from_f64(1.0 / (1.0 - args.probability));
        let first = first_position(step, x.len());
        y.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).enumerate().for_each(|(piece, (y, x))| {
            const PART: usize = 64;
            let start = first + (piece * PIECE) as u64;
            vectorize(
                #[inline(always)]
                || {
                    let mut words = [0; PART];
                    for (part, (y, x)) in y.chunks_mut(PART).zip(x.chunks(PART)).enumerate() {
                        stream.words(start + (part * PART) as u64, &mut words);
                        for ((y, &x), &word) in y.iter_mut().zip(x).zip(&words) {
                            *y = if to_unit(word) < probability { R::zero() } else { x * scale };
                        }
                    }
                },
            );
        });
        Ok(())
    }
}
