//! Pooling.

use rayon::prelude::*;

use super::Cpu;
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
            for oy in 0..oh {
                for ox in 0..ow {
                    let [rows, columns] = window(g, oy, ox);
                    let mut best = R::neg_infinity();
                    let mut at = rows.start * g.input[1] + columns.start;
                    for iy in rows {
                        for ix in columns.clone() {
                            let value = x[iy * g.input[1] + ix];
                            if value > best || (value.is_nan() && !best.is_nan()) {
                                (best, at) = (value, iy * g.input[1] + ix);
                            }
                        }
                    }
                    y[oy * ow + ox] = best;
                    positions[oy * ow + ox] = at as i32;
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
