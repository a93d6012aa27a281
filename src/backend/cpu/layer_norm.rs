//! Layer normalization and root-mean-square normalization, with the sum before and the residual's gradient after them.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{dot, rows_in_piece, sum_of, two_sums, vectorize};
use crate::backend::ops::{LayerNorm, LayerNormBackward, LayerNormForward, RmsNormBackward, RmsNormForward, RowSum};
use crate::backend::{Act, Activations, Memory, StepContext, disjoint};
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
    vectorize(
        #[inline(always)]
        || {
            for partial in partials {
                gradient.iter_mut().zip(&partial[part * width..]).for_each(|(g, &p)| *g += p);
            }
        },
    );
}

/// The elements of what a sum names; none without one.
fn sum_ranges<R: Real>(activations: &Activations<Cpu<R>>, sum: Option<RowSum>) -> [Range<usize>; 2] {
    sum.map_or([0..0, 0..0], |RowSum { other, sum }| [activations.range(other), activations.range(sum)])
}

/// The elements of an activation; none without one.
fn range_of<R: Real>(activations: &Activations<Cpu<R>>, act: Option<Act>) -> Range<usize> {
    act.map_or(0..0, |act| activations.range(act))
}

/// Runs `norm` on pieces of `piece` values: of y, of what is normalized, and their statistics. That is x, or where there are
/// `[other, sum]`, x + other, which a piece leaves in `sum` first.
fn in_pieces<R: Real, S: IndexedParallelIterator>(
    [y, x]: [&mut [R]; 2],
    sum: Option<[&mut [R]; 2]>,
    statistics: S,
    piece: usize,
    norm: impl Fn(&mut [R], &[R], S::Item) + Sync,
) {
    let pieces = y.par_chunks_mut(piece).zip(x.par_chunks(piece)).zip(statistics);
    let Some([other, sum]) = sum else {
        pieces.for_each(|((y, x), statistics)| {
            vectorize(
                #[inline(always)]
                || norm(y, x, statistics),
            );
        });
        return;
    };
    let sums = sum.par_chunks_mut(piece).zip(other.par_chunks(piece));
    pieces.zip(sums).for_each(|(((y, x), statistics), (sum, other))| {
        vectorize(
            #[inline(always)]
            || {
                sum.iter_mut().zip(x).zip(other).for_each(|((sum, &x), &other)| *sum = x + other);
                norm(y, sum, statistics);
            },
        );
    });
}

/// Mean and `1 / sqrt(variance + epsilon)` of a row.
#[inline(always)]
fn row_statistics<R: Real>(x: &[R], inverse: R, epsilon: R) -> (R, R) {
    let total = sum_of(
        x,
        #[inline(always)]
        |x| x,
    );
    let mean = total * inverse;
    let squares = sum_of(
        x,
        #[inline(always)]
        |x| (x - mean) * (x - mean),
    );
    (mean, R::one() / (squares * inverse + epsilon).sqrt())
}

/// Gradients of one row of layer norm; `statistics` are mean and reciprocal deviation, `inverse` is 1 / width.
#[inline(always)]
fn layer_norm_row<R: Real>(dx: &mut [R], [x, dy, weight]: [&[R]; 3], [mean, s]: [R; 2], inverse: R) {
    let (a, b) = two_sums(
        [x, dy, weight],
        #[inline(always)]
        |x, dy, weight| (dy * weight, dy * weight * ((x - mean) * s)),
    );
    let (a, b) = (a * inverse, b * inverse);
    for (((dx, &x), &dy), &weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
        *dx = s * (dy * weight - a - (x - mean) * s * b);
    }
}

/// Gradients of one row of RMS norm.
#[inline(always)]
fn rms_norm_row<R: Real>(dx: &mut [R], [x, dy, weight]: [&[R]; 3], s: R, inverse: R) {
    let (b, _) = two_sums(
        [x, dy, weight],
        #[inline(always)]
        |x, dy, weight| (dy * weight * (x * s), R::zero()),
    );
    let b = b * inverse;
    for (((dx, &x), &dy), &weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
        *dx = s * (dy * weight - x * s * b);
    }
}

/// `dx += residual[row]`; nothing where there is no residual.
#[inline(always)]
fn add_row<R: Real>(dx: &mut [R], residual: &[R], row: usize) {
    let residual = residual.chunks_exact(dx.len()).nth(row).unwrap_or_default();
    dx.iter_mut().zip(residual).for_each(|(dx, &residual)| *dx += residual);
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
        let [x, y, mean, std] = [args.x, args.y, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let [other, sum] = sum_ranges(activations, args.sum);
        let ranges = [x, y, mean, std, other, sum];
        let [x, y, mean, std, other, sum] = disjoint(&mut activations.values, ranges, "layer norm")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let bias = args.bias.map(|bias| &arena.parameters[arena.range(bias)]);
        let rows = rows_in_piece(width);
        let inverse = R::from_f64(1.0 / width as f64);
        let epsilon = R::from_f64(args.epsilon);
        let statistics = mean.par_chunks_mut(rows).zip(std.par_chunks_mut(rows));
        in_pieces(
            [y, x],
            args.sum.map(|_| [other, sum]),
            statistics,
            rows * width,
            #[inline(always)]
            |y, x, (mean, std)| {
                let lines = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((y, x), (mean, std)) in lines.zip(mean.iter_mut().zip(std)) {
                    let (m, s) = row_statistics(x, inverse, epsilon);
                    match bias {
                        Some(bias) => {
                            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                                *y = (x - m) * s * w + b;
                            }
                        }
                        None => {
                            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                                *y = (x - m) * s * w;
                            }
                        }
                    }
                    (*mean, *std) = (m, s);
                }
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
        let [dx, residual] = [args.dx, args.residual].map(|act| range_of(activations, act));
        let [x, dy, mean, std] = [args.x, args.dy, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let ranges = [x, dy, mean, std, dx, residual];
        let [x, dy, mean, std, dx, residual] = disjoint(&mut activations.values, ranges, "layer norm")?;
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
                        for ((dweight, &x), &dy) in dweight.iter_mut().zip(x).zip(dy) {
                            *dweight = dy.mul_add((x - m) * s, *dweight);
                        }
                        if args.dbias.is_some() {
                            dbias.iter_mut().zip(dy).for_each(|(dbias, &dy)| *dbias += dy);
                        }
                        if let Some(dx) = &mut dx {
                            let dx = &mut dx[local * width..(local + 1) * width];
                            layer_norm_row(dx, [x, dy, weight], [m, s], inverse);
                            add_row(dx, residual, row);
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
        let range = arena.gradient_range(args.dweight.param);
        add_partials(&mut arena.gradients[range], &partials, 0, step.overwrites(args.dweight));
        if let Some(dbias) = args.dbias {
            let range = arena.gradient_range(dbias.param);
            add_partials(&mut arena.gradients[range], &partials, 1, step.overwrites(dbias));
        }
        Ok(())
    }

    fn rms_norm_forward(&self, memory: &mut Memory<'_, Self>, args: &RmsNormForward, _: &StepContext) -> Result<()> {
        let width = args.width.max(1);
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let [x, y, rms] = [args.x, args.y, args.reciprocal_rms].map(|act| activations.range(act));
        let [other, sum] = sum_ranges(activations, args.sum);
        let [x, y, rms, other, sum] = disjoint(&mut activations.values, [x, y, rms, other, sum], "rms norm")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let rows = rows_in_piece(width);
        let inverse = R::from_f64(1.0 / width as f64);
        let epsilon = R::from_f64(args.epsilon);
        in_pieces(
            [y, x],
            args.sum.map(|_| [other, sum]),
            rms.par_chunks_mut(rows),
            rows * width,
            #[inline(always)]
            |y, x, rms| {
                for ((y, x), rms) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rms) {
                    let squares = dot(x, x) * inverse;
                    let s = R::one() / (squares + epsilon).sqrt();
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * s * w;
                    }
                    *rms = s;
                }
            },
        );
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
        let [dx, residual] = [args.dx, args.residual].map(|act| range_of(activations, act));
        let [x, dy, rms] = [args.x, args.dy, args.reciprocal_rms].map(|act| activations.range(act));
        let ranges = [x, dy, rms, dx, residual];
        let [x, dy, rms, dx, residual] = disjoint(&mut activations.values, ranges, "rms norm")?;
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
                        for ((dweight, &x), &dy) in dweight.iter_mut().zip(x).zip(dy) {
                            *dweight = dy.mul_add(x * s, *dweight);
                        }
                        if let Some(dx) = &mut dx {
                            let dx = &mut dx[local * width..(local + 1) * width];
                            rms_norm_row(dx, [x, dy, weight], s, inverse);
                            add_row(dx, residual, row);
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
        let range = arena.gradient_range(args.dweight.param);
        add_partials(&mut arena.gradients[range], &partials, 0, step.overwrites(args.dweight));
        Ok(())
    }
}
