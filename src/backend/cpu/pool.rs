//! Pooling.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::vectorize;
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

/// The part of window `(oy, ox)` that lies within the input: rows and columns.
#[inline(always)]
fn window(g: &PoolGeometry, oy: usize, ox: usize) -> [std::ops::Range<usize>; 2] {
    let side = |i: usize, o: usize| {
        let start = o * g.stride[i];
        let end = (start + g.kernel[i]).saturating_sub(g.padding[i]).min(g.input[i]);
        start.saturating_sub(g.padding[i]).min(end)..end
    };
    [side(0, oy), side(1, ox)]
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
            for oy in 0..oh {
                for ox in 0..ow {
                    let [rows, columns] = window(g, oy, ox);
                    let mut total = R::zero();
                    for iy in rows {
                        x[iy * g.input[1]..][columns.clone()].iter().for_each(|&x| total += x);
                    }
                    y[oy * ow + ox] = total * scale;
                }
            }
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
        planes.with_min_len(16).for_each(|(dx, dy)| {
            dx.fill(R::zero());
            for oy in 0..oh {
                for ox in 0..ow {
                    let [rows, columns] = window(g, oy, ox);
                    let share = dy[oy * ow + ox] * scale;
                    for iy in rows {
                        dx[iy * g.input[1]..][columns.clone()].iter_mut().for_each(|dx| *dx += share);
                    }
                }
            }
        });
        Ok(())
    }
}
