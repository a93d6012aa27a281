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

/// One row of outputs of the maximum, over windows `stride` apart that lie within the input `x`: several side by side, the last
/// ones once more where they do not fill a group of their own.
#[inline(always)]
fn max_row<R: Real>(g: &PoolGeometry, stride: usize, x: &[R], oy: usize, y: &mut [R], positions: &mut [i32]) {
    match y.len() {
        8.. => max_groups::<R, 8>(g, stride, x, oy, y, positions),
        4.. => max_groups::<R, 4>(g, stride, x, oy, y, positions),
        _ => max_groups::<R, 1>(g, stride, x, oy, y, positions),
    }
}

#[inline(always)]
fn max_groups<R: Real, const GROUP: usize>(
    g: &PoolGeometry,
    stride: usize,
    x: &[R],
    oy: usize,
    y: &mut [R],
    positions: &mut [i32],
) {
    let (width, top) = (g.input[1], oy * g.stride[0] * g.input[1]);
    for start in (0..y.len()).step_by(GROUP) {
        let start = start.min(y.len() - GROUP);
        let corner = top + start * stride;
        let mut best = [R::neg_infinity(); GROUP];
        let mut at: [i32; GROUP] = std::array::from_fn(|i| (corner + i * stride) as i32);
        for tap in 0..g.kernel[0] * g.kernel[1] {
            let first = corner + tap / g.kernel[1] * width + tap % g.kernel[1];
            let taken = &x[first..][..(GROUP - 1) * stride + 1];
            for i in 0..GROUP {
                take_larger(&mut best[i], &mut at[i], taken[i * stride], first + i * stride);
            }
        }
        y[start..][..GROUP].copy_from_slice(&best);
        positions[start..][..GROUP].copy_from_slice(&at);
    }
}

/// The first of the largest values, or the first that is no number.
#[inline(always)]
fn take_larger<R: Real>(best: &mut R, at: &mut i32, value: R, place: usize) {
    let take = (value > *best) | (value.is_nan() & !best.is_nan());
    *best = if take { value } else { *best };
    *at = if take { place as i32 } else { *at };
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
        planes.with_min_len(16).for_each(|((x, y), positions)| {
            if g.padding == [0, 0] {
                return vectorize(
                    #[inline(always)]
                    || {
                        let rows = y.chunks_exact_mut(ow).zip(positions.chunks_exact_mut(ow));
                        for (oy, (y, positions)) in rows.enumerate() {
                            // Strides that are known when this is compiled.
                            match g.stride[1] {
                                1 => max_row(g, 1, x, oy, y, positions),
                                2 => max_row(g, 2, x, oy, y, positions),
                                stride => max_row(g, stride, x, oy, y, positions),
                            }
                        }
                    },
                );
            }
            for oy in 0..oh {
                for ox in 0..ow {
                    let [rows, columns] = window(g, oy, ox);
                    let mut best = R::neg_infinity();
                    let mut at = (rows.start * g.input[1] + columns.start) as i32;
                    for iy in rows {
                        for ix in columns.clone() {
                            take_larger(&mut best, &mut at, x[iy * g.input[1] + ix], iy * g.input[1] + ix);
                        }
                    }
                    y[oy * ow + ox] = best;
                    positions[oy * ow + ox] = at;
                }
            }
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
