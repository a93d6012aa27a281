//! Attention in row blocks: scores of a block are computed, used and forgotten; the backward computes them again. What a causal
//! row must not see is not computed at all, but for what shares a vector or a tile with it.
//!
//! A piece of parallel work is one sample and one key head with the query heads that share it, so no two pieces write the
//! same memory.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayView4, ArrayViewMut, ArrayViewMut2, ArrayViewMut4, Axis, RemoveAxis, s};
use rayon::prelude::*;

use super::Cpu;
use super::attention_scores::Shape;
use super::panels::{Panels, Part, room};
use super::parallel::{LANES, Lanes, dot, rows_in_piece, vectorize};
use crate::backend::ops::{Attention, AttentionBackward, AttentionForward, Rotary};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

/// What a thread keeps from piece to piece of the forward.
struct Forward<R> {
    scores: Vec<Lanes<R>>,
    factors: Vec<Lanes<R>>,
    keys_across: Vec<Lanes<R>>,
    values: Vec<Lanes<R>>,
}

/// What a thread keeps from piece to piece of the backward.
struct Backward<R> {
    p: Vec<Lanes<R>>,
    dp: Vec<Lanes<R>>,
    factors: Vec<Lanes<R>>,
    keys: Vec<Lanes<R>>,
    keys_across: Vec<Lanes<R>>,
    values_across: Vec<Lanes<R>>,
    queries: Vec<Lanes<R>>,
    dout: Vec<Lanes<R>>,
}

impl<R: Real> Shape<R> {
    /// Room for rows of one head.
    fn panels(&self) -> Vec<Lanes<R>> {
        vec![[R::zero(); LANES]; room(self.geometry.time, self.geometry.head_size)]
    }

    /// Room for rows of one head on their side.
    fn panels_across(&self) -> Vec<Lanes<R>> {
        vec![[R::zero(); LANES]; room(self.geometry.head_size, self.geometry.time)]
    }

    fn forward_scratch(&self) -> Forward<R> {
        let (keys_across, values) = (self.panels_across(), self.panels());
        Forward { scores: self.scratch(), factors: self.factors(), keys_across, values }
    }

    fn backward_scratch(&self) -> Backward<R> {
        Backward {
            p: self.scratch(),
            dp: self.scratch(),
            factors: self.factors(),
            keys: self.panels(),
            keys_across: self.panels_across(),
            values_across: self.panels_across(),
            queries: self.panels(),
            dout: self.panels(),
        }
    }

    /// Of a product of queries and keys: what some rows of the block that begins at row `first` can see.
    fn scores_of(&self, first: usize) -> impl Fn(Range<usize>) -> Part + Sync {
        move |rows| Part { depth: 0..self.geometry.head_size, width: self.visible(first + rows.end - 1) }
    }

    /// Of a product of scores and what they weigh: the keys that some rows can see.
    fn weighed_by(&self, first: usize) -> impl Fn(Range<usize>) -> Part + Sync {
        move |rows| Part { depth: 0..self.visible(first + rows.end - 1), width: self.geometry.head_size }
    }

    /// Of a product of the transpose of the scores of `count` rows and what these rows have: those that can see some keys.
    fn seen_by(&self, first: usize, count: usize) -> impl Fn(Range<usize>) -> Part + Sync {
        move |keys| {
            let from = if self.geometry.causal { keys.start.saturating_sub(first) } else { 0 };
            Part { depth: from..count, width: self.geometry.head_size }
        }
    }

    /// One sample and key head of the forward.
    fn forward_piece(
        &self,
        [sample, group]: [usize; 2],
        qkv: &ArrayView4<'_, R>,
        y: Vec<ArrayViewMut2<'_, R>>,
        log_sum_exp: &mut [R],
        scratch: &mut Forward<R>,
    ) -> Result<()> {
        let g = &self.geometry;
        let Forward { scores, factors, keys_across, values } = scratch;
        let column = |column: usize| qkv.slice(s![sample, .., column, ..]);
        let keys_across = Panels::pack_transposed(keys_across, column(g.heads + group));
        let values = Panels::pack(values, column(g.heads + g.kv_heads + group));
        let first_head = group * y.len();
        for (i, mut y) in y.into_iter().enumerate() {
            let query = column(first_head + i);
            for [first, rows, keys] in self.blocks() {
                let query = query.slice(s![first..first + rows, ..]);
                let scores = &mut scores[..rows * self.stride()];
                let forms = [false, self.wide];
                keys_across.multiply(block_mut(scores, rows, keys)?, query, 0, self.scores_of(first), forms);
                let lse = &mut log_sum_exp[i * g.time + first..][..rows];
                self.softmax(scores, lse, [sample, first_head + i, first], factors);
                let out = y.slice_mut(s![first..first + rows, ..]);
                values.multiply(out, block(scores, rows, keys)?, 0, self.weighed_by(first), forms);
            }
        }
        Ok(())
    }

    /// One sample and key head of the backward.
    fn backward_piece(
        &self,
        [sample, group]: [usize; 2],
        [qkv, y, dy]: [&ArrayView4<'_, R>; 3],
        gradients: Gradients<'_, R>,
        log_sum_exp: &[R],
        scratch: &mut Backward<R>,
    ) -> Result<()> {
        let g = &self.geometry;
        let column = |column: usize| qkv.slice(s![sample, .., column, ..]);
        let (key, value) = (column(g.heads + group), column(g.heads + g.kv_heads + group));
        let keys = Panels::pack(&mut scratch.keys, key);
        let keys_across = Panels::pack_transposed(&mut scratch.keys_across, key);
        let values_across = Panels::pack_transposed(&mut scratch.values_across, value);
        let Gradients { queries, key: mut dkey, value: mut dvalue } = gradients;
        let first_head = group * queries.len();
        for (i, mut dquery) in queries.into_iter().enumerate() {
            let head = first_head + i;
            let query = column(head);
            let (y, dout) = (y.slice(s![sample, .., head, ..]), dy.slice(s![sample, .., head, ..]));
            let queries = Panels::pack(&mut scratch.queries, query);
            let douts = Panels::pack(&mut scratch.dout, dout);
            // The last block first: it sees every key, so it can overwrite and the others add.
            for [first, rows, seen] in self.blocks().rev() {
                let adds = i > 0 || first + rows < g.time;
                let (p, dp) = (&mut scratch.p[..rows * self.stride()], &mut scratch.dp[..rows * self.stride()]);
                let query = query.slice(s![first..first + rows, ..]);
                let dout = dout.slice(s![first..first + rows, ..]);
                let (scores_of, forms) = (self.scores_of(first), [false, self.wide]);
                keys_across.multiply(block_mut(p, rows, seen)?, query, 0, &scores_of, forms);
                values_across.multiply(block_mut(dp, rows, seen)?, dout, 0, &scores_of, forms);
                let deltas = row_products(&y.slice(s![first..first + rows, ..]), &dout);
                let lse = &log_sum_exp[i * g.time + first..][..rows];
                self.score_gradients(p, dp, [lse, &deltas], [sample, head, first], &mut scratch.factors);
                let (p, ds) = (block(p, rows, seen)?, block(dp, rows, seen)?);
                let (seen_by, added) = (self.seen_by(first, rows), [adds, self.wide]);
                douts.multiply(dvalue.slice_mut(s![..seen, ..]), p.t(), first, &seen_by, added);
                queries.multiply(dkey.slice_mut(s![..seen, ..]), ds.t(), first, &seen_by, added);
                let dquery = dquery.slice_mut(s![first..first + rows, ..]);
                keys.multiply(dquery, ds, 0, self.weighed_by(first), forms);
            }
        }
        Ok(())
    }
}

/// Where the gradients of one sample's query heads, and of the key head that they share, go.
struct Gradients<'a, R> {
    queries: Vec<ArrayViewMut2<'a, R>>,
    key: ArrayViewMut2<'a, R>,
    value: ArrayViewMut2<'a, R>,
}

/// `sum over columns of a * b`, row by row.
fn row_products<R: Real>(a: &ArrayView2<'_, R>, b: &ArrayView2<'_, R>) -> Vec<R> {
    vectorize(
        #[inline(always)]
        || {
            let mut products = Vec::with_capacity(a.nrows());
            for (a, b) in a.outer_iter().zip(b.outer_iter()) {
                products.push(match (a.to_slice(), b.to_slice()) {
                    (Some(a), Some(b)) => dot(a, b),
                    _ => (&a * &b).sum(),
                });
            }
            products
        },
    )
}

/// The first `keys` columns of a block of scores.
fn block<R: Real>(scores: &[Lanes<R>], rows: usize, keys: usize) -> Result<ArrayView2<'_, R>> {
    let stride = scores.len() / rows * LANES;
    let whole = ArrayView2::from_shape((rows, stride), scores.as_flattened()).map_err(outside)?;
    Ok(whole.slice_move(s![.., ..keys]))
}

fn block_mut<R: Real>(scores: &mut [Lanes<R>], rows: usize, keys: usize) -> Result<ArrayViewMut2<'_, R>> {
    let stride = scores.len() / rows * LANES;
    let whole = ArrayViewMut2::from_shape((rows, stride), scores.as_flattened_mut()).map_err(outside)?;
    Ok(whole.slice_move(s![.., ..keys]))
}

fn outside(error: ndarray::ShapeError) -> Error {
    Error::shape("attention", "tensors of the sizes planned", error.to_string())
}

/// `[batch, time, heads, head size]` taken apart: a matrix `[time, head size]` for each sample and head.
fn heads_mut<R: Real>(values: ArrayViewMut4<'_, R>) -> Vec<Vec<ArrayViewMut2<'_, R>>> {
    apart(values, Axis(0)).into_iter().map(|sample| apart(sample, Axis(1))).collect()
}

/// The parts of a tensor along an axis, each to be written on its own.
fn apart<R, D: RemoveAxis>(values: ArrayViewMut<'_, R, D>, axis: Axis) -> Vec<ArrayViewMut<'_, R, D::Smaller>> {
    let mut parts = Vec::with_capacity(values.len_of(axis));
    let mut rest = values;
    while rest.len_of(axis) > 0 {
        let (part, others) = rest.split_at(axis, 1);
        parts.push(part.index_axis_move(axis, 0));
        rest = others;
    }
    parts
}

/// The next `count` of `from`.
fn next<T>(from: &mut impl Iterator<Item = T>, count: usize) -> Vec<T> {
    from.by_ref().take(count).collect()
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
        let padding = args.padding.map(|p| (p, &activations.indices[activations.index_range(p.tokens)]));
        let shape = Shape::<R>::new(g, padding, args.dropout, step);
        let ranges = [args.qkv, args.y, args.log_sum_exp].map(|act| activations.range(act));
        let [qkv, y, log_sum_exp] = disjoint(&mut activations.values, ranges, "attention")?;
        let columns = g.heads + 2 * g.kv_heads;
        let qkv = ArrayView4::from_shape((g.batch, g.time, columns, g.head_size), qkv).map_err(outside)?;
        let y = ArrayViewMut4::from_shape((g.batch, g.time, g.heads, g.head_size), y).map_err(outside)?;
        let sharing = g.heads / g.kv_heads;
        let mut pieces = Vec::with_capacity(g.batch * g.kv_heads);
        for (sample, heads) in heads_mut(y).into_iter().enumerate() {
            let mut heads = heads.into_iter();
            pieces.extend((0..g.kv_heads).map(|group| ([sample, group], next(&mut heads, sharing))));
        }
        let sums = log_sum_exp.par_chunks_mut((sharing * g.time).max(1));
        pieces.into_par_iter().zip(sums).try_for_each_init(
            || shape.forward_scratch(),
            |scratch, ((place, y), lse)| shape.forward_piece(place, &qkv, y, lse, scratch),
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
        let padding = args.padding.map(|p| (p, &activations.indices[activations.index_range(p.tokens)]));
        let shape = Shape::<R>::new(g, padding, args.dropout, step);
        let ranges = [args.qkv, args.y, args.dy, args.log_sum_exp, args.dqkv].map(|act| activations.range(act));
        let [qkv, y, dy, log_sum_exp, dqkv] = disjoint(&mut activations.values, ranges, "attention")?;
        let packed = (g.batch, g.time, g.heads + 2 * g.kv_heads, g.head_size);
        let out = (g.batch, g.time, g.heads, g.head_size);
        let qkv = ArrayView4::from_shape(packed, qkv).map_err(outside)?;
        let y = ArrayView4::from_shape(out, y).map_err(outside)?;
        let dy = ArrayView4::from_shape(out, dy).map_err(outside)?;
        let sharing = g.heads / g.kv_heads;
        let mut pieces = Vec::with_capacity(g.batch * g.kv_heads);
        for (sample, columns) in
            heads_mut(ArrayViewMut4::from_shape(packed, dqkv).map_err(outside)?).into_iter().enumerate()
        {
            let mut columns = columns.into_iter();
            let queries: Vec<_> = (0..g.kv_heads).map(|_| next(&mut columns, sharing)).collect();
            let keys = next(&mut columns, g.kv_heads);
            for (group, ((queries, key), value)) in queries.into_iter().zip(keys).zip(columns).enumerate() {
                pieces.push(([sample, group], Gradients { queries, key, value }));
            }
        }
        let sums = log_sum_exp.par_chunks((sharing * g.time).max(1));
        pieces.into_par_iter().zip(sums).try_for_each_init(
            || shape.backward_scratch(),
            |scratch, ((place, gradients), lse)| shape.backward_piece(place, [&qkv, &y, &dy], gradients, lse, scratch),
        )
    }

    fn rotary(&self, memory: &mut Memory<'_, Self>, args: &Rotary, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let range = activations.range(args.x);
        let half = args.head_size / 2;
        let direction = if args.inverse { -1.0 } else { 1.0 };
        let frequencies: Vec<f64> =
            (0..half).map(|i| args.base.powf(-2.0 * i as f64 / args.head_size as f64)).collect();
        let turn = |t: usize| {
            frequencies.iter().map(move |frequency| {
                let (sin, cos) = (t as f64 * frequency).sin_cos();
                [R::from_f64(cos), R::from_f64(direction * sin)]
            })
        };
        let turns: Vec<[R; 2]> = (0..args.time).into_par_iter().flat_map_iter(turn).collect();
        let rows = rows_in_piece(args.row_width);
        activations.values[range].par_chunks_mut(rows * args.row_width).enumerate().for_each(|(piece, x)| {
            vectorize(
                #[inline(always)]
                || {
                    for (i, row) in x.chunks_exact_mut(args.row_width).enumerate() {
                        let turns = &turns[(piece * rows + i) % args.time * half..][..half];
                        for head in row[..args.heads * args.head_size].chunks_exact_mut(args.head_size) {
                            turn_head(head, turns, args.interleaved);
                        }
                    }
                },
            );
        });
        Ok(())
    }
}

/// Turns the pairs of one head, each by its `[cos, sin]`.
#[inline(always)]
fn turn_head<R: Real>(head: &mut [R], turns: &[[R; 2]], interleaved: bool) {
    if interleaved {
        for (pair, &[cos, sin]) in head.chunks_exact_mut(2).zip(turns) {
            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
        }
    } else {
        let (first, second) = head.split_at_mut(turns.len());
        for ((a, b), &[cos, sin]) in first.iter_mut().zip(second).zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
