//! Attention in row blocks: scores of a block are computed, used and forgotten; the backward computes them again.

use ndarray::{ArrayView2, ArrayViewMut2, ShapeBuilder};
use rayon::prelude::*;

use super::Cpu;
use super::dropout::first_position;
use super::parallel::{sum, vectorize};
use super::product::{product, product_here};
use crate::backend::ops::{
    Attention, AttentionBackward, AttentionDropout, AttentionForward, AttentionGeometry, Rotary,
};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose, to_unit};
use crate::real::Real;

/// Query rows of a block.
const BLOCK: usize = 64;

/// Everything about an attention but its tensors.
struct Shape<'a> {
    geometry: AttentionGeometry,
    seen: Option<&'a [bool]>,
    dropout: Option<(AttentionDropout, Philox, u64)>,
}

impl Shape<'_> {
    /// The keys that query rows below `end` can see.
    fn keys(&self, end: usize) -> usize {
        if self.geometry.causal { end } else { self.geometry.time }
    }

    fn scale<R: Real>(&self) -> R {
        R::from_f64(1.0 / (self.geometry.head_size as f64).sqrt())
    }

    /// First elements of query, key and value of head `head` in a row of `qkv`.
    fn columns(&self, head: usize) -> [usize; 3] {
        let g = &self.geometry;
        let kv = head / (g.heads / g.kv_heads);
        [head, g.heads + kv, g.heads + g.kv_heads + kv].map(|column| column * g.head_size)
    }

    fn sees(&self, sample: usize, row: usize, key: usize) -> bool {
        !(self.geometry.causal && key > row) && self.seen.is_none_or(|seen| seen[sample * self.geometry.time + key])
    }

    /// `p = 0` or `p / (1 - probability)`, as the stream says for this row of probabilities.
    fn drop_row<R: Real>(&self, p: &mut [R], sample: usize, head: usize, row: usize) {
        if let Some((dropout, stream, first)) = &self.dropout {
            let g = &self.geometry;
            let start = first + (((sample * g.heads + head) * g.time + row) * g.time) as u64;
            let scale = R::from_f64(1.0 / (1.0 - dropout.probability));
            for (i, p) in p.iter_mut().enumerate() {
                let dropped = to_unit(stream.word(start + i as u64)) < dropout.probability as f32;
                *p = if dropped { R::zero() } else { *p * scale };
            }
        }
    }
}

/// A window of `[rows, columns]` in a matrix whose rows are `stride` apart.
fn window<R>(values: &[R], start: usize, stride: usize, rows: usize, columns: usize) -> Result<ArrayView2<'_, R>> {
    ArrayView2::from_shape((rows, columns).strides((stride, 1)), &values[start..])
        .map_err(|e| Error::shape("attention", "a window within the tensor", e.to_string()))
}

fn window_mut<R>(
    values: &mut [R],
    start: usize,
    stride: usize,
    rows: usize,
    columns: usize,
) -> Result<ArrayViewMut2<'_, R>> {
    ArrayViewMut2::from_shape((rows, columns).strides((stride, 1)), &mut values[start..])
        .map_err(|e| Error::shape("attention", "a window within the tensor", e.to_string()))
}

/// A product with all threads where samples alone do not keep them busy.
fn multiply<R: Real>(batch: usize, c: ArrayViewMut2<R>, a: ArrayView2<R>, b: ArrayView2<R>, accumulate: bool) {
    if batch == 1 { product(c, a, b, accumulate) } else { product_here(c, a, b, accumulate) }
}

/// Scores to probabilities, row by row, and the logarithms of the sums.
fn softmax_rows<R: Real>(
    shape: &Shape<'_>,
    scores: &mut [R],
    log_sum_exp: &mut [R],
    [sample, first_row, keys]: [usize; 3],
) {
    let scale: R = shape.scale();
    vectorize(
        #[inline(always)]
        || {
            for (i, (p, lse)) in scores.chunks_exact_mut(keys).zip(log_sum_exp).enumerate() {
                let row = first_row + i;
                if shape.seen.is_some() {
                    for (key, s) in p.iter_mut().enumerate() {
                        if !shape.sees(sample, row, key) {
                            *s = R::neg_infinity();
                        }
                    }
                }
                let visible = if shape.geometry.causal { row + 1 } else { keys };
                let (p, hidden) = p.split_at_mut(visible);
                hidden.fill(R::zero());
                let mut max = R::neg_infinity();
                for &s in p.iter() {
                    max = if s > max { s } else { max };
                }
                if max == R::neg_infinity() {
                    p.fill(R::zero());
                    *lse = R::infinity(); // e^(score - lse) = 0: the backward sees no key either
                    continue;
                }
                p.iter_mut().for_each(|s| *s = ((*s - max) * scale).exp_lane());
                let total = sum(
                    p.len(),
                    #[inline(always)]
                    |j| p[j],
                );
                let inverse = R::one() / total;
                p.iter_mut().for_each(|p| *p *= inverse);
                *lse = max * scale + total.ln();
            }
        },
    );
}

impl<R: Real> Attention for Cpu<R> {
    fn attention_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AttentionForward,
        step: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let g = args.geometry;
        let seen: Option<Vec<bool>> = args.padding.map(|padding| {
            activations.indices[activations.index_range(padding.tokens)].iter().map(|&t| t != padding.pad).collect()
        });
        let shape = shape(g, seen.as_deref(), args.dropout, step);
        let ranges = [args.qkv, args.y, args.log_sum_exp].map(|act| activations.range(act));
        let [qkv, y, log_sum_exp] = disjoint(&mut activations.values, ranges, "attention")?;
        let (packed, width, time) = (g.packed_width(), g.width(), g.time);
        let samples = y.par_chunks_mut(time * width).zip(qkv.par_chunks(time * packed));
        samples.zip(log_sum_exp.par_chunks_mut(g.heads * time)).enumerate().try_for_each_init(
            || vec![R::zero(); BLOCK.min(time) * time],
            |scratch, (sample, ((y, qkv), lse))| {
                for head in 0..g.heads {
                    let [q, k, v] = shape.columns(head);
                    for first in (0..time).step_by(BLOCK) {
                        let end = (first + BLOCK).min(time);
                        let (rows, keys) = (end - first, shape.keys(end));
                        let scores = &mut scratch[..rows * keys];
                        let query = window(qkv, first * packed + q, packed, rows, g.head_size)?;
                        let key = window(qkv, k, packed, keys, g.head_size)?;
                        multiply(g.batch, window_mut(scores, 0, keys, rows, keys)?, query, key.t(), false);
                        let lse = &mut lse[head * time + first..head * time + end];
                        softmax_rows(&shape, scores, lse, [sample, first, keys]);
                        for (i, p) in scores.chunks_exact_mut(keys).enumerate() {
                            shape.drop_row(p, sample, head, first + i);
                        }
                        let out = window_mut(y, first * width + head * g.head_size, width, rows, g.head_size)?;
                        let value = window(qkv, v, packed, keys, g.head_size)?;
                        multiply(g.batch, out, window(scores, 0, keys, rows, keys)?, value, false);
                    }
                }
                Ok(())
            },
        )
    }

    fn attention_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AttentionBackward,
        step: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let g = args.geometry;
        let seen: Option<Vec<bool>> = args.padding.map(|padding| {
            activations.indices[activations.index_range(padding.tokens)].iter().map(|&t| t != padding.pad).collect()
        });
        let shape = shape(g, seen.as_deref(), args.dropout, step);
        let ranges = [args.qkv, args.y, args.dy, args.log_sum_exp, args.dqkv].map(|act| activations.range(act));
        let [qkv, y, dy, log_sum_exp, dqkv] = disjoint(&mut activations.values, ranges, "attention")?;
        let (packed, width, time) = (g.packed_width(), g.width(), g.time);
        let block = BLOCK.min(time) * time;
        let inputs = qkv.par_chunks(time * packed).zip(y.par_chunks(time * width)).zip(dy.par_chunks(time * width));
        let samples = dqkv.par_chunks_mut(time * packed).zip(inputs).zip(log_sum_exp.par_chunks(g.heads * time));
        samples.enumerate().try_for_each_init(
            || vec![R::zero(); 3 * block],
            |scratch, (sample, ((dqkv, ((qkv, y), dy)), lse))| {
                dqkv.fill(R::zero());
                for head in 0..g.heads {
                    for first in (0..time).step_by(BLOCK) {
                        let lse = &lse[head * time..(head + 1) * time];
                        backward_block(&shape, [sample, head, first], [qkv, y, dy, lse], dqkv, scratch)?;
                    }
                }
                Ok(())
            },
        )
    }

    fn rotary(&self, memory: &mut Memory<'_, Self>, args: &Rotary, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let range = activations.range(args.x);
        let half = args.head_size / 2;
        let direction = if args.inverse { -1.0 } else { 1.0 };
        let angles: Vec<(R, R)> = (0..args.time)
            .flat_map(|t| (0..half).map(move |i| (t, i)))
            .map(|(t, i)| {
                let angle = t as f64 * args.base.powf(-2.0 * i as f64 / args.head_size as f64);
                (R::from_f64(angle.cos()), R::from_f64(direction * angle.sin()))
            })
            .collect();
        activations.values[range].par_chunks_mut(args.row_width).enumerate().for_each(|(row, x)| {
            let angles = &angles[row % args.time * half..][..half];
            for head in x[..args.heads * args.head_size].chunks_exact_mut(args.head_size) {
                for (i, &(cos, sin)) in angles.iter().enumerate() {
                    let (a, b) = if args.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
                }
            }
        });
        Ok(())
    }
}

fn shape<'a>(
    geometry: AttentionGeometry,
    seen: Option<&'a [bool]>,
    dropout: Option<AttentionDropout>,
    step: &StepContext,
) -> Shape<'a> {
    let dropout = dropout.map(|d| (d, Philox::new(step.seed, Purpose::Dropout, d.stream), first_position(step)));
    Shape { geometry, seen, dropout }
}

/// Gradients that the query rows from `first` on give to `dqkv` (`+=` for keys and values, `=` for queries).
fn backward_block<R: Real>(
    shape: &Shape<'_>,
    [sample, head, first]: [usize; 3],
    [qkv, y, dy, lse]: [&[R]; 4],
    dqkv: &mut [R],
    scratch: &mut [R],
) -> Result<()> {
    let g = shape.geometry;
    let (packed, width, size) = (g.packed_width(), g.width(), g.head_size);
    let end = (first + BLOCK).min(g.time);
    let (rows, keys) = (end - first, shape.keys(end));
    let [q, k, v] = shape.columns(head);
    let (p, rest) = scratch.split_at_mut(scratch.len() / 3);
    let (dp, dropped) = rest.split_at_mut(rest.len() / 2);
    let (p, dp, dropped) = (&mut p[..rows * keys], &mut dp[..rows * keys], &mut dropped[..rows * keys]);
    let scale: R = shape.scale();
    let query = window(qkv, first * packed + q, packed, rows, size)?;
    let key = window(qkv, k, packed, keys, size)?;
    let value = window(qkv, v, packed, keys, size)?;
    let dout = window(dy, first * width + head * size, width, rows, size)?;

    multiply(g.batch, window_mut(p, 0, keys, rows, keys)?, query, key.t(), false);
    multiply(g.batch, window_mut(dp, 0, keys, rows, keys)?, dout, value.t(), false);
    vectorize(
        #[inline(always)]
        || {
            for (i, p) in p.chunks_exact_mut(keys).enumerate() {
                let row = first + i;
                let visible = if g.causal { row + 1 } else { keys };
                let (p, hidden) = p.split_at_mut(visible);
                hidden.fill(R::zero());
                let lse = lse[row];
                p.iter_mut().for_each(|s| *s = s.mul_add(scale, -lse).exp_lane());
            }
        },
    );
    if shape.seen.is_some() {
        for (i, p) in p.chunks_exact_mut(keys).enumerate() {
            for (key, p) in p.iter_mut().enumerate() {
                if !shape.sees(sample, first + i, key) {
                    *p = R::zero();
                }
            }
        }
    }
    if shape.dropout.is_some() {
        dropped.copy_from_slice(p);
        for (i, (d, dp)) in dropped.chunks_exact_mut(keys).zip(dp.chunks_exact_mut(keys)).enumerate() {
            shape.drop_row(d, sample, head, first + i);
            shape.drop_row(dp, sample, head, first + i);
        }
    }
    let used: &[R] = if shape.dropout.is_some() { dropped } else { p };
    let dvalue = window_mut(dqkv, v, packed, keys, size)?;
    multiply(g.batch, dvalue, window(used, 0, keys, rows, keys)?.t(), dout, true);
    vectorize(
        #[inline(always)]
        || {
            for (i, (dp, p)) in dp.chunks_exact_mut(keys).zip(p.chunks_exact(keys)).enumerate() {
                let at = (first + i) * width + head * size;
                let (dy, y) = (&dy[at..at + size], &y[at..at + size]);
                let delta = sum(
                    size,
                    #[inline(always)]
                    |j| dy[j] * y[j],
                );
                dp.iter_mut().zip(p).for_each(|(dp, &p)| *dp = p * (*dp - delta) * scale);
            }
        },
    );
    let ds = window(dp, 0, keys, rows, keys)?;
    multiply(g.batch, window_mut(dqkv, first * packed + q, packed, rows, size)?, ds, key, false);
    multiply(g.batch, window_mut(dqkv, k, packed, keys, size)?, ds.t(), query, true);
    Ok(())
}
