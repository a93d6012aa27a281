//! Sums, joins and means.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{PIECE, map2, rows_in_piece};
use crate::backend::ops::{Add, Concatenate, Elementwise, MeanTimeBackward, MeanTimeForward, Padding, Split};
use crate::backend::{Activations, Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

/// Whether position `row` (of `[batch, time]`) counts.
fn counts<R: Real>(activations: &Activations<Cpu<R>>, padding: Option<Padding>, rows: usize) -> Option<Vec<bool>> {
    padding.map(|padding| {
        let tokens = &activations.indices[activations.index_range(padding.tokens)];
        tokens[..rows].iter().map(|&token| token != padding.pad).collect()
    })
}

/// Does something with each row of `y` and its row of `x`, of these widths.
fn by_rows<R: Real>([y, x]: [&mut [R]; 2], [y_width, x_width]: [usize; 2], copy: impl Fn(&mut [R], &[R]) + Sync) {
    let piece = |(y, x): (&mut [R], &[R])| {
        y.chunks_exact_mut(y_width).zip(x.chunks_exact(x_width)).for_each(|(y, x)| copy(y, x));
    };
    if y.len().max(x.len()) <= PIECE {
        piece((y, x));
    } else {
        let rows = rows_in_piece(y_width.max(x_width));
        y.par_chunks_mut(rows * y_width).zip(x.par_chunks(rows * x_width)).for_each(piece);
    }
}

impl<R: Real> Elementwise for Cpu<R> {
    fn add(&self, memory: &mut Memory<'_, Self>, args: &Add, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let ranges = [activations.range(args.a), activations.range(args.b), activations.range(args.y)];
        let [a, b, y] = disjoint(&mut activations.values, ranges, "add")?;
        map2(
            y,
            a,
            b,
            #[inline(always)]
            |a, b| a + b,
        );
        Ok(())
    }

    fn concatenate(&self, memory: &mut Memory<'_, Self>, args: &Concatenate, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let total: usize = args.widths.iter().sum();
        let mut start = 0;
        for (&part, &width) in args.parts.iter().zip(&args.widths) {
            let ranges = [activations.range(part), activations.range(args.y)];
            let [x, y] = disjoint(&mut activations.values, ranges, "concatenate")?;
            by_rows([y, x], [total, width], |y, x| y[start..start + width].copy_from_slice(x));
            start += width;
        }
        Ok(())
    }

    fn split(&self, memory: &mut Memory<'_, Self>, args: &Split, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let total: usize = args.widths.iter().sum();
        let mut start = 0;
        for (&part, &width) in args.parts.iter().zip(&args.widths) {
            let ranges = [activations.range(part), activations.range(args.x)];
            let [y, x] = disjoint(&mut activations.values, ranges, "split")?;
            by_rows([y, x], [width, total], |y, x| y.copy_from_slice(&x[start..start + width]));
            start += width;
        }
        Ok(())
    }

    fn mean_time_forward(&self, memory: &mut Memory<'_, Self>, args: &MeanTimeForward, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let MeanTimeForward { batch, time, width, .. } = *args;
        let counted = counts(activations, args.padding, batch * time);
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "mean over time")?;
        y.par_chunks_mut(width).zip(x.par_chunks(time * width)).enumerate().for_each(|(sample, (y, x))| {
            y.fill(R::zero());
            let mut n = 0usize;
            for (t, x) in x.chunks_exact(width).enumerate() {
                if counted.as_ref().is_none_or(|c| c[sample * time + t]) {
                    n += 1;
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y += x);
                }
            }
            let scale = R::from_f64(1.0 / n.max(1) as f64);
            y.iter_mut().for_each(|y| *y *= scale);
        });
        Ok(())
    }

    fn mean_time_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanTimeBackward,
        _: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let MeanTimeBackward { batch, time, width, .. } = *args;
        let counted = counts(activations, args.padding, batch * time);
        let ranges = [activations.range(args.dy), activations.range(args.dx)];
        let [dy, dx] = disjoint(&mut activations.values, ranges, "mean over time")?;
        dx.par_chunks_mut(time * width).zip(dy.par_chunks(width)).enumerate().for_each(|(sample, (dx, dy))| {
            let seen = |t: usize| counted.as_ref().is_none_or(|c| c[sample * time + t]);
            let n = (0..time).filter(|&t| seen(t)).count();
            let scale = R::from_f64(1.0 / n.max(1) as f64);
            for (t, dx) in dx.chunks_exact_mut(width).enumerate() {
                if seen(t) {
                    dx.iter_mut().zip(dy).for_each(|(dx, &dy)| *dx = dy * scale);
                } else {
                    dx.fill(R::zero());
                }
            }
        });
        Ok(())
    }
}
