//! Layer normalization and root-mean-square normalization.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{rows_in_piece, sum, vectorize};
use crate::backend::ops::{LayerNorm, LayerNormBackward, LayerNormForward, RmsNormBackward, RmsNormForward};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

/// Rows whose weight gradients are summed before the sums are added up, in their order.
const GROUP: usize = 64;

/// `gradient = sum of the partials, in order`, or `+=`.
fn add_partials<R: Real>(gradient: &mut [R], partials: &[Vec<R>], part: usize, overwrite: bool) {
    let width = gradient.len();
    if overwrite {
        gradient.fill(R::zero());
    }
    for partial in partials {
        gradient.iter_mut().zip(&partial[part * width..]).for_each(|(g, &p)| *g += p);
    }
}

impl<R: Real> LayerNorm for Cpu<R> {
    fn layer_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &LayerNormForward,
        _: &StepContext,
    ) -> Result<()> {
        let width = args.width.max(1);
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let ranges = [args.x, args.y, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let [x, y, mean, std] = disjoint(&mut activations.values, ranges, "layer norm")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let bias = args.bias.map(|bias| &arena.parameters[arena.range(bias)]);
        let rows = rows_in_piece(width);
        let inverse = R::from_f64(1.0 / width as f64);
        let epsilon = R::from_f64(args.epsilon);
        let statistics = mean.par_chunks_mut(rows).zip(std.par_chunks_mut(rows));
        y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).zip(statistics).for_each(
            |((y, x), (mean, std))| {
                vectorize(
                    #[inline(always)]
                    || {
                        let lines = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                        for ((y, x), (mean, std)) in lines.zip(mean.iter_mut().zip(std)) {
                            let m = sum(
                                x.len(),
                                #[inline(always)]
                                |i| x[i],
                            ) * inverse;
                            let variance = sum(
                                x.len(),
                                #[inline(always)]
                                |i| (x[i] - m) * (x[i] - m),
                            ) * inverse;
                            let s = R::one() / (variance + epsilon).sqrt();
                            for i in 0..width {
                                y[i] = (x[i] - m) * s * weight[i];
                            }
                            if let Some(bias) = bias {
                                y.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
                            }
                            (*mean, *std) = (m, s);
                        }
                    },
                );
            },
        );
        Ok(())
    }

    fn layer_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &LayerNormBackward,
        step: &StepContext,
    ) -> Result<()> {
        let width = args.width.max(1);
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let dx_range = args.dx.map_or(0..0, |dx| activations.range(dx));
        let [x, dy, mean, std] = [args.x, args.dy, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let [x, dy, mean, std, dx] = disjoint(&mut activations.values, [x, dy, mean, std, dx_range], "layer norm")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let inverse = R::from_f64(1.0 / width as f64);
        let group = |index: usize, mut dx: Option<&mut [R]>| {
            let rows = index * GROUP..((index + 1) * GROUP).min(args.rows);
            let mut partial = vec![R::zero(); 2 * width];
            vectorize(
                #[inline(always)]
                || {
                    let (dweight, dbias) = partial.split_at_mut(width);
                    for (local, row) in rows.enumerate() {
                        let x = &x[row * width..(row + 1) * width];
                        let dy = &dy[row * width..(row + 1) * width];
                        let (m, s) = (mean[row], std[row]);
                        for i in 0..width {
                            dweight[i] = dy[i].mul_add((x[i] - m) * s, dweight[i]);
                            dbias[i] += dy[i];
                        }
                        if let Some(dx) = &mut dx {
                            let dx = &mut dx[local * width..(local + 1) * width];
                            let a = sum(
                                width,
                                #[inline(always)]
                                |i| dy[i] * weight[i],
                            ) * inverse;
                            let b = sum(
                                width,
                                #[inline(always)]
                                |i| dy[i] * weight[i] * ((x[i] - m) * s),
                            ) * inverse;
                            for i in 0..width {
                                dx[i] = s * (dy[i] * weight[i] - a - (x[i] - m) * s * b);
                            }
                        }
                    }
                },
            );
            partial
        };
        let partials: Vec<Vec<R>> = if args.dx.is_some() {
            dx.par_chunks_mut(GROUP * width).enumerate().map(|(i, dx)| group(i, Some(dx))).collect()
        } else {
            (0..args.rows.div_ceil(GROUP)).into_par_iter().map(|i| group(i, None)).collect()
        };
        let range = arena.range(args.dweight.param);
        add_partials(&mut arena.gradients[range], &partials, 0, step.overwrites(args.dweight));
        if let Some(dbias) = args.dbias {
            let range = arena.range(dbias.param);
            add_partials(&mut arena.gradients[range], &partials, 1, step.overwrites(dbias));
        }
        Ok(())
    }

    fn rms_norm_forward(&self, memory: &mut Memory<'_, Self>, args: &RmsNormForward, _: &StepContext) -> Result<()> {
        let width = args.width.max(1);
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let ranges = [args.x, args.y, args.reciprocal_rms].map(|act| activations.range(act));
        let [x, y, rms] = disjoint(&mut activations.values, ranges, "rms norm")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let rows = rows_in_piece(width);
        let inverse = R::from_f64(1.0 / width as f64);
        let epsilon = R::from_f64(args.epsilon);
        let pieces = y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width));
        pieces.zip(rms.par_chunks_mut(rows)).for_each(|((y, x), rms)| {
            vectorize(
                #[inline(always)]
                || {
                    for ((y, x), rms) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rms) {
                        let squares = sum(
                            width,
                            #[inline(always)]
                            |i| x[i] * x[i],
                        ) * inverse;
                        let s = R::one() / (squares + epsilon).sqrt();
                        for i in 0..width {
                            y[i] = x[i] * s * weight[i];
                        }
                        *rms = s;
                    }
                },
            );
        });
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &RmsNormBackward,
        step: &StepContext,
    ) -> Result<()> {
        let width = args.width.max(1);
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let dx_range = args.dx.map_or(0..0, |dx| activations.range(dx));
        let [x, dy, rms] = [args.x, args.dy, args.reciprocal_rms].map(|act| activations.range(act));
        let [x, dy, rms, dx] = disjoint(&mut activations.values, [x, dy, rms, dx_range], "rms norm")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let inverse = R::from_f64(1.0 / width as f64);
        let group = |index: usize, mut dx: Option<&mut [R]>| {
            let rows = index * GROUP..((index + 1) * GROUP).min(args.rows);
            let mut dweight = vec![R::zero(); width];
            vectorize(
                #[inline(always)]
                || {
                    for (local, row) in rows.enumerate() {
                        let x = &x[row * width..(row + 1) * width];
                        let dy = &dy[row * width..(row + 1) * width];
                        let s = rms[row];
                        for i in 0..width {
                            dweight[i] = dy[i].mul_add(x[i] * s, dweight[i]);
                        }
                        if let Some(dx) = &mut dx {
                            let dx = &mut dx[local * width..(local + 1) * width];
                            let b = sum(
                                width,
                                #[inline(always)]
                                |i| dy[i] * weight[i] * (x[i] * s),
                            ) * inverse;
                            for i in 0..width {
                                dx[i] = s * (dy[i] * weight[i] - x[i] * s * b);
                            }
                        }
                    }
                },
            );
            dweight
        };
        let partials: Vec<Vec<R>> = if args.dx.is_some() {
            dx.par_chunks_mut(GROUP * width).enumerate().map(|(i, dx)| group(i, Some(dx))).collect()
        } else {
            (0..args.rows.div_ceil(GROUP)).into_par_iter().map(|i| group(i, None)).collect()
        };
        let range = arena.range(args.dweight.param);
        add_partials(&mut arena.gradients[range], &partials, 0, step.overwrites(args.dweight));
        Ok(())
    }
}
