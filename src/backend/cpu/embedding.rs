//! Tables of vectors.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::rows_in_piece;
use crate::backend::ops::{Embedding, EmbeddingBackward, EmbeddingForward, PositionBackward, PositionForward};
use crate::backend::{Arena, Grad, Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

/// The gradient of a table of positions: `dweight[t] = sum over samples of dy[sample, t]`, samples in order.
fn add_positions<R: Real>(arena: &mut Arena<Cpu<R>>, grad: Grad, dy: &[R], [time, width]: [usize; 2], overwrite: bool) {
    let range = arena.gradient_range(grad.param);
    let table = &mut arena.gradients[range];
    if overwrite {
        table.fill(R::zero());
    }
    table[..time * width].par_chunks_mut(width).enumerate().for_each(|(t, row)| {
        for sample in dy.chunks_exact(time * width) {
            row.iter_mut().zip(&sample[t * width..(t + 1) * width]).for_each(|(g, &d)| *g += d);
        }
    });
}

impl<R: Real> Embedding for Cpu<R> {
    fn embedding_forward(&self, memory: &mut Memory<'_, Self>, args: &EmbeddingForward, _: &StepContext) -> Result<()> {
        let EmbeddingForward { time, width, vocabulary, .. } = *args;
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let tokens = &activations.indices[activations.index_range(args.tokens)];
        if let Some(row) = tokens.iter().position(|&t| t < 0 || t as usize >= vocabulary) {
            return Err(Error::shape(
                "embedding",
                format!("tokens from 0 to {}", vocabulary.saturating_sub(1)),
                format!("token {} at sample {}, position {}", tokens[row], row / time.max(1), row % time.max(1)),
            ));
        }
        let y_range = activations.ranges[args.y.0 as usize].clone();
        let y = &mut activations.values[y_range];
        let weight = &arena.parameters[arena.range(args.weight)];
        let positions = args.positions.map(|p| &arena.parameters[arena.range(p)]);
        let rows = rows_in_piece(width);
        y.par_chunks_mut(rows * width).zip(tokens.par_chunks(rows)).enumerate().for_each(|(piece, (y, tokens))| {
            for (i, (y, &token)) in y.chunks_exact_mut(width).zip(tokens).enumerate() {
                let vector = &weight[token as usize * width..][..width];
                match positions {
                    Some(positions) => {
                        let t = (piece * rows + i) % time;
                        let position = &positions[t * width..(t + 1) * width];
                        y.iter_mut().zip(vector).zip(position).for_each(|((y, &v), &p)| *y = v + p);
                    }
                    None => y.copy_from_slice(vector),
                }
            }
        });
        Ok(())
    }

    fn embedding_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &EmbeddingBackward,
        step: &StepContext,
    ) -> Result<()> {
        let EmbeddingBackward { time, width, .. } = *args;
        let (arena, activations) = (&mut *memory.arena, &*memory.activations);
        let tokens = &activations.indices[activations.index_range(args.tokens)];
        let dy = &activations.values[activations.range(args.dy)];
        if let Some(dpositions) = args.dpositions {
            add_positions(arena, dpositions, dy, [time, width], step.overwrites(dpositions));
        }
        let range = arena.gradient_range(args.dweight.param);
        let table = &mut arena.gradients[range];
        if step.overwrites(args.dweight) {
            table.fill(R::zero());
        }
        // Rows in order: each token's sum has the same order whatever the number of threads.
        for (&token, d) in tokens.iter().zip(dy.chunks_exact(width)) {
            table[token as usize * width..][..width].iter_mut().zip(d).for_each(|(g, &d)| *g += d);
        }
        Ok(())
    }

    fn position_forward(&self, memory: &mut Memory<'_, Self>, args: &PositionForward, _: &StepContext) -> Result<()> {
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "positions")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let sample = args.time * args.width;
        y.par_chunks_mut(sample).zip(x.par_chunks(sample)).for_each(|(y, x)| {
            y.iter_mut().zip(x).zip(weight).for_each(|((y, &x), &w)| *y = x + w);
        });
        Ok(())
    }

    fn position_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &PositionBackward,
        step: &StepContext,
    ) -> Result<()> {
        let (arena, activations) = (&mut *memory.arena, &*memory.activations);
        let dy = &activations.values[activations.range(args.dy)];
        add_positions(arena, args.dweight, dy, [args.time, args.width], step.overwrites(args.dweight));
        Ok(())
    }
}
