//! Muon: matrices one after another, each by products of matrices.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ShapeError};
use rayon::prelude::*;

use super::pieces::Arrays;
use super::{PIECE, Pass, plain_squares};
use crate::backend::cpu::parallel::vectorize;
use crate::backend::cpu::product::product;
use crate::error::{Error, Result};
use crate::host;
use crate::optim::Rule;
use crate::real::Real;

impl<R: Real> Pass<'_, R> {
    /// Updates those of Muon's matrices that lie within `elements`, which the arrays hold. Returns the least coefficient of the
    /// adaptive clip.
    ///
    /// # Errors
    /// No memory for matrices of their size.
    pub(super) fn muon(&self, arrays: &mut Arrays<'_, R>, elements: &Range<usize>) -> Result<f64> {
        let mut least = 1.0f64;
        for (index, tensor) in self.plan.tensors.iter().enumerate() {
            let (group, r) = self.group(index);
            let Rule::Muon { nesterov, steps, scale, .. } = group.rule else { continue };
            if tensor.offset < elements.start || elements.end < tensor.offset + tensor.len {
                continue;
            }
            let start = tensor.offset - elements.start;
            let range = start..start + tensor.len;
            let theta = &mut arrays.theta[range.clone()];
            let gradient = &mut arrays.gradient[range.clone()];
            let momentum = &mut arrays.first[range];
            let mut direction: Vec<R> = host::zeros(tensor.len)?;
            let (piece, unit) = (self.plan.piece(index), self.unit(index));
            let halves = (direction.par_chunks_mut(piece), momentum.par_chunks_mut(piece));
            let found: Vec<f64> = (halves.0.zip(halves.1))
                .zip(theta.par_chunks(piece).zip(gradient.par_chunks(piece)))
                .map(|((direction, momentum), (theta, gradient))| {
                    let mut least = 1.0f64;
                    let kept = direction.chunks_mut(unit).zip(momentum.chunks_mut(unit));
                    for ((d, m), (t, g)) in kept.zip(theta.chunks(unit).zip(gradient.chunks(unit))) {
                        let (scale, coefficient) = self.unit_scale(index, t, g);
                        least = least.min(coefficient);
                        vectorize(
                            #[inline(always)]
                            || {
                                for ((d, m), (&t, &g)) in d.iter_mut().zip(m).zip(t.iter().zip(g)) {
                                    let (g, _) = r.decay(t, scale.of(g));
                                    (*d, *m) = r.muon(g, *m, nesterov);
                                }
                            },
                        );
                    }
                    least
                })
                .collect();
            least = found.into_iter().fold(least, f64::min);
            let columns = tensor.unit();
            let direction = orthogonal(&direction, tensor.units, columns, steps)?;
            let rate = R::from_f64(group.learning_rate(self.step) * scale.factor(tensor.units, columns));
            theta.par_chunks_mut(PIECE).zip(direction.par_chunks(PIECE)).for_each(|(theta, direction)| {
                vectorize(
                    #[inline(always)]
                    || theta.iter_mut().zip(direction).for_each(|(t, &d)| *t = (-rate).mul_add(d, *t * r.shrink)),
                );
            });
            if self.step.zero_gradients {
                gradient.fill(R::zero());
            }
        }
        Ok(least)
    }
}

/// Newton and Schulz's quintic iteration towards the nearest semi-orthogonal matrix (Jordan 2024): `[rows, columns]`.
fn orthogonal<R: Real>(matrix: &[R], rows: usize, columns: usize, steps: u32) -> Result<Vec<R>> {
    let [a, b, c] = [3.4445, -4.7750, 2.0315].map(R::from_f64);
    let misshapen = |e: ShapeError| Error::shape("muon", format!("[{rows}, {columns}]"), e.to_string());
    let zeros = |rows: usize, columns: usize| {
        Array2::from_shape_vec((rows, columns), host::zeros::<R>(rows * columns)?).map_err(misshapen)
    };
    let view = ArrayView2::from_shape((rows, columns), matrix).map_err(misshapen)?;
    let tall = rows > columns;
    let view = if tall { view.reversed_axes() } else { view };
    let mut x = zeros(view.nrows(), view.ncols())?;
    x.assign(&view);
    let squares: Vec<f64> = matrix.par_chunks(PIECE).map(plain_squares).collect();
    let norm = R::from_f64(squares.iter().sum::<f64>().sqrt().max(1e-7));
    x.mapv_inplace(|value| value / norm);
    let side = x.nrows();
    let (mut gram, mut square) = (zeros(side, side)?, zeros(side, side)?);
    let mut next = zeros(side, x.ncols())?;
    for _ in 0..steps {
        product(gram.view_mut(), x.view(), x.t(), false);
        product(square.view_mut(), gram.view(), gram.view(), false);
        gram.zip_mut_with(&square, |g, &s| *g = b * *g + c * s);
        product(next.view_mut(), gram.view(), x.view(), false);
        x.zip_mut_with(&next, |x, &n| *x = a.mul_add(*x, n));
    }
    if tall {
        next = next.into_shape_with_order((rows, columns)).map_err(misshapen)?;
        next.assign(&x.t());
        x = next;
    }
    Ok(x.into_raw_vec_and_offset().0)
}
