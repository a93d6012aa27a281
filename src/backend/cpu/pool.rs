//! Pooling.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{sum_of, vectorize};
use crate::backend::ops::{
    AveragePoolBackward, AveragePoolForward, MaxPoolBackward, MaxPoolForward, Pool, PoolGeometry,
};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

fn output(g: &PoolGeometry) -> Result<[usize; 2]> {
    g.output().ok_or_else(|| {
        Error::shape("pooling", "a window that fits the padded input", format!("{:?} in {:?}", g.kernel, g.input))
    })
}

/// Of side `i` of the windows at place `o`, what lies within the input.
#[inline(always)]
fn within(g: &PoolGeometry, i: usize, o: usize) -> Range<usize> {
    let start = o * g.stride[i];
    let end = (start + g.kernel[i]).saturating_sub(g.padding[i]).min(g.input[i]);
    start.saturating_sub(g.padding[i]).min(end)..end
}

/// Which of `count` windows of a row have their column `tap` within the input, and which column of the input that is of the first.
#[inline(always)]
fn windows_with(g: &PoolGeometry, stride: usize, tap: usize, count: usize) -> (Range<usize>, usize) {
    let first = g.padding[1].saturating_sub(tap).div_ceil(stride);
    // Column `o * stride + tap - padding` is below the width.
    let end = (g.input[1] + g.padding[1]).saturating_sub(tap).div_ceil(stride).min(count);
    match first < end {
        true => (first..end, first * stride + tap - g.padding[1]),
        false => (0..0, 0),
    }
}

/// The sum of the only window of row `oy`.
#[inline(always)]
fn window_sum<R: Real>(g: &PoolGeometry, x: &[R], oy: usize) -> R {
    let columns = within(g, 1, 0);
    let mut total = R::zero();
    for iy in within(g, 0, oy) {
        total += sum_of(
            &x[iy * g.input[1]..][columns.clone()],
            #[inline(always)]
            |x| x,
        );
    }
    total
}

/// y, `=`: the sums of the windows of row `oy`, `stride` apart, side by side.
#[inline(always)]
fn add_windows<R: Real>(g: &PoolGeometry, stride: usize, x: &[R], oy: usize, y: &mut [R]) {
    y.fill(R::zero());
    for iy in within(g, 0, oy) {
        for tap in 0..g.kernel[1] {
            let (windows, column) = windows_with(g, stride, tap, y.len());
            let x = x[iy * g.input[1] + column..].iter().step_by(stride);
            for (y, &x) in y[windows].iter_mut().zip(x) {
                *y += x;
            }
        }
    }
}

/// dx, `+=`, of the windows of row `oy`, `stride` apart, side by side: to each value in their order.
#[inline(always)]
fn add_to_windows<R: Real>(g: &PoolGeometry, stride: usize, scale: R, oy: usize, dx: &mut [R], dy: &[R]) {
    for iy in within(g, 0, oy) {
        for tap in (0..g.kernel[1]).rev() {
            let (windows, column) = windows_with(g, stride, tap, dy.len());
            let dx = dx[iy * g.input[1] + column..].iter_mut().step_by(stride);
            for (dx, &dy) in dx.zip(&dy[windows]) {
                *dx += dy * scale;
            }
        }
    }
}

/// Rows of dx, `width` wide, that a row of windows of `side` columns side by side covers, `=`; what is left of a row is 0.
#[inline(always)]
fn fill_tiles<R: Real>(side: usize, width: usize, scale: R, dx: &mut [R], dy: &[R]) {
    let (line, others) = dx.split_at_mut(width);
    let (tiles, rest) = line.split_at_mut(side * dy.len());
    for (tile, &dy) in tiles.chunks_exact_mut(side).zip(dy) {
        tile.fill(dy * scale);
    }
    rest.fill(R::zero());
    for other in others.chunks_exact_mut(width) {
        other.copy_from_slice(line);
    }
}

/// A plane of the input, with as much of what is below every number around it as windows reach beyond it.
struct Padded<'v, R> {
    values: &'v [R],
    width: usize,
}

/// One row of outputs of the maximum, over windows `stride` apart: several side by side, the last ones once more where they do not
/// fill a group of their own.
#[inline(always)]
fn max_row<R: Real>(g: &PoolGeometry, stride: usize, x: &Padded<'_, R>, oy: usize, y: &mut [R], positions: &mut [i32]) {
    match y.len() {
        8.. => max_groups::<R, 8>(g, stride, x, oy, y, positions),
        4.. => max_groups::<R, 4>(g, stride, x, oy, y, positions),
        _ => max_groups::<R, 1>(g, stride, x, oy, y, positions),
    }
}

/// Windows of 2 x 2 that lie side by side: the maximum of each row, and then of both, which is as good as one after the other.
#[inline(always)]
fn max_tiles<R: Real, const GROUP: usize>(
    g: &PoolGeometry,
    x: &Padded<'_, R>,
    oy: usize,
    y: &mut [R],
    positions: &mut [i32],
) {
    let (width, top) = (x.width, oy * g.stride[0]);
    for start in (0..y.len()).step_by(GROUP) {
        let start = start.min(y.len() - GROUP);
        let first = top * width + 2 * start;
        let [upper, lower] = [first, first + width].map(|at| x.values[at..][..2 * GROUP].as_chunks::<2>().0);
        let (mut best, mut at) = ([R::zero(); GROUP], [0; GROUP]);
        for i in 0..GROUP {
            let [place, beneath] = [first, first + width].map(|at| (at + 2 * i) as i32);
            let [[above, right], [below, last]] = [upper[i], lower[i]];
            let ((mut largest, mut here), (mut other, mut there)) = ((above, place), (below, beneath));
            take_larger(&mut largest, &mut here, right, place + 1);
            take_larger(&mut other, &mut there, last, beneath + 1);
            take_larger(&mut largest, &mut here, other, there);
            (best[i], at[i]) = (largest, here);
        }
        y[start..][..GROUP].copy_from_slice(&best);
        positions[start..][..GROUP].copy_from_slice(&at);
    }
}

#[inline(always)]
fn max_groups<R: Real, const GROUP: usize>(
    g: &PoolGeometry,
    stride: usize,
    x: &Padded<'_, R>,
    oy: usize,
    y: &mut [R],
    positions: &mut [i32],
) {
    if stride == 2 && g.kernel == [2, 2] && g.padding == [0, 0] {
        return max_tiles::<R, GROUP>(g, x, oy, y, positions);
    }
    let (width, top) = (g.input[1], oy * g.stride[0]);
    // Where nothing is larger than nothing: the first position that lies within the input.
    let row = top.saturating_sub(g.padding[0]) * width;
    for start in (0..y.len()).step_by(GROUP) {
        let start = start.min(y.len() - GROUP);
        let left = start * stride;
        let mut best = [R::neg_infinity(); GROUP];
        let mut at: [i32; GROUP] =
            std::array::from_fn(|i| (row + (left + i * stride).saturating_sub(g.padding[1])) as i32);
        for tap in 0..g.kernel[0] * g.kernel[1] {
            let (iy, ix) = (top + tap / g.kernel[1], left + tap % g.kernel[1]);
            let taken = &x.values[iy * x.width + ix..][..(GROUP - 1) * stride + 1];
            // Of what lies beyond the input, which is never taken, this names no position.
            let first = (iy as i32 - g.padding[0] as i32) * width as i32 + (ix as i32 - g.padding[1] as i32);
            for i in 0..GROUP {
                take_larger(&mut best[i], &mut at[i], taken[i * stride], first + (i * stride) as i32);
            }
        }
        y[start..][..GROUP].copy_from_slice(&best);
        positions[start..][..GROUP].copy_from_slice(&at);
    }
}

/// The first of the largest values, or the first that is no number.
#[inline(always)]
fn take_larger<R: Real>(best: &mut R, at: &mut i32, value: R, place: i32) {
    let take = (value > *best) | (value.is_nan() & !best.is_nan());
    *best = if take { value } else { *best };
    *at = if take { place } else { *at };
}

impl<R: Real> Pool for Cpu<R> {
    fn max_pool_forward(&self, memory: &mut Memory<'_, Self>, args: &MaxPoolForward, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let g = &args.geometry;
        let [oh, ow] = output(g)?;
        let (plane, out) = (g.input[0] * g.input[1], oh * ow);
        let position_range = activations.index_range(args.positions);
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "max pooling")?;
        let positions = &mut activations.indices[position_range];
        let planes = x.par_chunks(plane).zip(y.par_chunks_mut(out)).zip(positions.par_chunks_mut(out));
        let width = g.input[1] + 2 * g.padding[1];
        let padded = if g.padding == [0, 0] { 0 } else { (g.input[0] + 2 * g.padding[0]) * width };
        let memory = || vec![R::neg_infinity(); padded];
        planes.with_min_len(16).for_each_init(memory, |memory, ((x, y), positions)| {
            let values = if padded == 0 {
                x
            } else {
                let rows = memory.chunks_exact_mut(width).skip(g.padding[0]);
                for (row, x) in rows.zip(x.chunks_exact(g.input[1])) {
                    row[g.padding[1]..][..g.input[1]].copy_from_slice(x);
                }
                memory
            };
            let x = Padded { values, width };
            vectorize(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(ow).zip(positions.chunks_exact_mut(ow));
                    for (oy, (y, positions)) in rows.enumerate() {
                        // Strides that are known when this is compiled.
                        match g.stride[1] {
                            1 => max_row(g, 1, &x, oy, y, positions),
                            2 => max_row(g, 2, &x, oy, y, positions),
                            stride => max_row(g, stride, &x, oy, y, positions),
                        }
                    }
                },
            );
        });
        Ok(())
    }

    fn max_pool_backward(&self, memory: &mut Memory<'_, Self>, args: &MaxPoolBackward, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let g = &args.geometry;
        let [oh, ow] = output(g)?;
        let positions = &activations.indices[activations.index_range(args.positions)];
        let ranges = [activations.range(args.dy), activations.range(args.dx)];
        let [dy, dx] = disjoint(&mut activations.values, ranges, "max pooling")?;
        let planes = dx.par_chunks_mut(g.input[0] * g.input[1]).zip(dy.par_chunks(oh * ow));
        planes.zip(positions.par_chunks(oh * ow)).with_min_len(16).for_each(|((dx, dy), positions)| {
            dx.fill(R::zero());
            dy.iter().zip(positions).for_each(|(&d, &at)| dx[at as usize] += d);
        });
        Ok(())
    }

    fn average_pool_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AveragePoolForward,
        _: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let g = &args.geometry;
        let [oh, ow] = output(g)?;
        let scale = R::from_f64(1.0 / (g.kernel[0] * g.kernel[1]) as f64);
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "average pooling")?;
        let planes = x.par_chunks(g.input[0] * g.input[1]).zip(y.par_chunks_mut(oh * ow));
        planes.with_min_len(16).for_each(|(x, y)| {
            vectorize(
                #[inline(always)]
                || {
                    for (oy, y) in y.chunks_exact_mut(ow).enumerate() {
                        match (y, g.stride[1]) {
                            ([y], _) => *y = window_sum(g, x, oy),
                            (y, 1) => add_windows(g, 1, x, oy, y),
                            (y, 2) => add_windows(g, 2, x, oy, y),
                            (y, stride) => add_windows(g, stride, x, oy, y),
                        }
                    }
                    for y in y {
                        *y *= scale;
                    }
                },
            );
        });
        Ok(())
    }

    fn average_pool_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AveragePoolBackward,
        _: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let g = &args.geometry;
        let [oh, ow] = output(g)?;
        let scale = R::from_f64(1.0 / (g.kernel[0] * g.kernel[1]) as f64);
        let ranges = [activations.range(args.dy), activations.range(args.dx)];
        let [dy, dx] = disjoint(&mut activations.values, ranges, "average pooling")?;
        let planes = dx.par_chunks_mut(g.input[0] * g.input[1]).zip(dy.par_chunks(oh * ow));
        let tiled = g.stride == g.kernel && g.padding == [0, 0];
        planes.with_min_len(16).for_each(|(dx, dy)| {
            vectorize(
                #[inline(always)]
                || {
                    let width = g.input[1];
                    if tiled {
                        let whole = oh * g.kernel[0] * width;
                        let tiles = dx[..whole].chunks_exact_mut(g.kernel[0] * width).zip(dy.chunks_exact(ow));
                        match g.kernel[1] {
                            2 => tiles.for_each(
                                #[inline(always)]
                                |(dx, dy)| fill_tiles(2, width, scale, dx, dy),
                            ),
                            side => tiles.for_each(
                                #[inline(always)]
                                |(dx, dy)| fill_tiles(side, width, scale, dx, dy),
                            ),
                        }
                        dx[whole..].fill(R::zero());
                        return;
                    }
                    dx.fill(R::zero());
                    for (oy, dy) in dy.chunks_exact(ow).enumerate() {
                        match g.stride[1] {
                            1 => add_to_windows(g, 1, scale, oy, dx, dy),
                            2 => add_to_windows(g, 2, scale, oy, dx, dy),
                            stride => add_to_windows(g, stride, scale, oy, dx, dy),
                        }
                    }
                },
            );
        });
        Ok(())
    }
}
