//! Attention in row blocks: scores of a block are computed, used and forgotten; the backward computes them again.
//!
//! A piece of parallel work is one sample and one key head with the query heads that share it, so no two pieces write the
//! same memory. Rows of scores are padded to whole vectors, and hidden keys hold minus infinity before the exponential.

use ndarray::{ArrayView2, ArrayView4, ArrayViewMut, ArrayViewMut2, ArrayViewMut4, Axis, RemoveAxis, s};
use rayon::prelude::*;

use super::Cpu;
use super::dropout::first_position;
use super::parallel::{LANES, Lanes, dot, fold_lanes, rows_in_piece, sum_lanes, vectorize};
use super::product::{product, product_here};
use crate::backend::ops::{
    Attention, AttentionBackward, AttentionDropout, AttentionForward, AttentionGeometry, Padding, Rotary,
};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose, to_unit};
use crate::real::Real;

/// Query rows of a block.
const BLOCK: usize = 64;

/// Everything about an attention but its tensors.
struct Shape<R> {
    geometry: AttentionGeometry,
    /// `[batch, time padded to lanes]`: 0, or minus infinity where a key is padding.
    mask: Option<Vec<Lanes<R>>>,
    dropout: Option<(AttentionDropout, Philox, u64)>,
    /// `1 / sqrt(head size)`.
    scale: R,
    /// Whether products share the threads: where pieces alone do not keep them busy.
    wide: bool,
}

impl<R: Real> Shape<R> {
    fn new(
        g: AttentionGeometry,
        padding: Option<(Padding, &[i32])>,
        dropout: Option<AttentionDropout>,
        step: &StepContext,
    ) -> Self {
        let mask = padding.map(|(padding, tokens)| {
            let lines = tokens.chunks_exact(g.time.max(1));
            lines.flat_map(|line| line.chunks(LANES).map(|part| mask_lanes(part, padding.pad))).collect()
        });
        Shape {
            geometry: g,
            mask,
            dropout: dropout.map(|d| (d, Philox::new(step.seed, Purpose::Dropout, d.stream), first_position(step))),
            scale: R::from_f64(1.0 / (g.head_size as f64).sqrt()),
            wide: g.batch * g.kv_heads < rayon::current_num_threads(),
        }
    }

    /// Vectors of lanes in a row of scores.
    fn stride(&self) -> usize {
        self.geometry.time.div_ceil(LANES)
    }

    /// Vectors of lanes for a block of scores.
    fn scratch(&self) -> Vec<Lanes<R>> {
        vec![[R::zero(); LANES]; BLOCK.min(self.geometry.time) * self.stride()]
    }

    /// Row blocks: first row, number of rows, number of keys that they can see.
    fn blocks(&self) -> impl DoubleEndedIterator<Item = [usize; 3]> + use<R> {
        let (time, causal) = (self.geometry.time, self.geometry.causal);
        (0..time.div_ceil(BLOCK)).map(move |block| {
            let first = block * BLOCK;
            let end = (first + BLOCK).min(time);
            [first, end - first, if causal { end } else { time }]
        })
    }

    /// The keys that a row can see, padding apart.
    #[inline(always)]
    fn visible(&self, row: usize) -> usize {
        if self.geometry.causal { row + 1 } else { self.geometry.time }
    }

    fn multiply(&self, c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
        if self.wide { product(c, a, b, accumulate) } else { product_here(c, a, b, accumulate) }
    }

    /// Hides what a row of scores must not see. `scores` are the vectors that hold `visible` keys.
    #[inline(always)]
    fn hide(&self, scores: &mut [Lanes<R>], sample: usize, visible: usize) {
        if let Some(last) = scores.last_mut() {
            let inside = visible - (visible - 1) / LANES * LANES;
            for (lane, s) in last.iter_mut().enumerate() {
                *s = if lane < inside { *s } else { R::neg_infinity() };
            }
        }
        if let Some(mask) = &self.mask {
            let stride = self.stride();
            for (scores, mask) in scores.iter_mut().zip(&mask[sample * stride..(sample + 1) * stride]) {
                for (s, &m) in scores.iter_mut().zip(mask) {
                    *s += m;
                }
            }
        }
    }

    /// What dropout multiplies a row of probabilities by: 0, or `1 / (1 - probability)`.
    #[inline(always)]
    fn keep(&self, factors: &mut [Lanes<R>], [sample, head, row]: [usize; 3]) {
        if let Some((dropout, stream, first)) = &self.dropout {
            let g = &self.geometry;
            let start = first + (((sample * g.heads + head) * g.time + row) * g.time) as u64;
            let scale = R::from_f64(1.0 / (1.0 - dropout.probability));
            let probability = dropout.probability as f32;
            const PART: usize = 4 * LANES;
            let mut words = [0; PART];
            for (part, factors) in factors.as_flattened_mut().chunks_mut(PART).enumerate() {
                let words = &mut words[..factors.len()];
                stream.words(start + (part * PART) as u64, words);
                for (factor, &mut word) in factors.iter_mut().zip(words) {
                    *factor = if to_unit(word) < probability { R::zero() } else { scale };
                }
            }
        }
    }

    /// Scores to probabilities, row by row, and the logarithms of the sums.
    fn softmax(
        &self,
        scores: &mut [Lanes<R>],
        log_sum_exp: &mut [R],
        [sample, head, first]: [usize; 3],
        factors: &mut [Lanes<R>],
    ) {
        let stride = self.stride();
        let vectors = |i: usize| self.visible(first + i).div_ceil(LANES);
        let mut totals = [R::zero(); BLOCK];
        // Three passes over the rows, each of them short, so that the processor works on several rows at once.
        vectorize(
            #[inline(always)]
            || {
                for (i, (line, max)) in scores.chunks_exact_mut(stride).zip(log_sum_exp.iter_mut()).enumerate() {
                    let visible = self.visible(first + i);
                    let line = &mut line[..visible.div_ceil(LANES)];
                    self.hide(line, sample, visible);
                    *max = row_max(line);
                }
                let rows = scores.chunks_exact_mut(stride).zip(log_sum_exp.iter()).zip(&mut totals);
                for (i, ((line, &max), total)) in rows.enumerate() {
                    let max = if max == R::neg_infinity() { R::zero() } else { max };
                    *total = exponentials(&mut line[..vectors(i)], max, self.scale);
                }
                for (i, (line, &total)) in scores.chunks_exact_mut(stride).zip(&totals).enumerate() {
                    let (line, hidden) = line.split_at_mut(vectors(i));
                    hidden.fill([R::zero(); LANES]);
                    let inverse = if total == R::zero() { R::zero() } else { R::one() / total };
                    if self.dropout.is_some() {
                        self.keep(&mut factors[..line.len()], [sample, head, first + i]);
                        for (p, f) in line.iter_mut().zip(factors.iter()) {
                            p.iter_mut().zip(f).for_each(|(p, &f)| *p *= inverse * f);
                        }
                    } else {
                        line.as_flattened_mut().iter_mut().for_each(|p| *p *= inverse);
                    }
                }
            },
        );
        // A row that sees nothing gets infinity: by that the backward sees nothing either.
        for (lse, &total) in log_sum_exp.iter_mut().zip(&totals) {
            *lse = if total == R::zero() { R::infinity() } else { *lse * self.scale + total.ln() };
        }
    }

    /// One sample and key head of the forward.
    fn forward_piece(
        &self,
        [sample, group]: [usize; 2],
        qkv: &ArrayView4<'_, R>,
        y: Vec<ArrayViewMut2<'_, R>>,
        log_sum_exp: &mut [R],
        scratch: &mut [Vec<Lanes<R>>; 2],
    ) -> Result<()> {
        let g = &self.geometry;
        let [scores, factors] = scratch;
        let column = |column: usize| qkv.slice(s![sample, .., column, ..]);
        let (key, value) = (column(g.heads + group), column(g.heads + g.kv_heads + group));
        let first_head = group * y.len();
        for (i, mut y) in y.into_iter().enumerate() {
            let query = column(first_head + i);
            for [first, rows, keys] in self.blocks() {
                let query = query.slice(s![first..first + rows, ..]);
                let scores = &mut scores[..rows * self.stride()];
                self.multiply(block_mut(scores, rows, keys)?, query, key.slice(s![..keys, ..]).t(), false);
                let lse = &mut log_sum_exp[i * g.time + first..][..rows];
                self.softmax(scores, lse, [sample, first_head + i, first], factors);
                let out = y.slice_mut(s![first..first + rows, ..]);
                self.multiply(out, block(scores, rows, keys)?, value.slice(s![..keys, ..]), false);
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
        scratch: &mut [Vec<Lanes<R>>; 3],
    ) -> Result<()> {
        let g = &self.geometry;
        let [p, dp, factors] = scratch;
        let column = |column: usize| qkv.slice(s![sample, .., column, ..]);
        let (key, value) = (column(g.heads + group), column(g.heads + g.kv_heads + group));
        let Gradients { queries, key: mut dkey, value: mut dvalue } = gradients;
        let first_head = group * queries.len();
        for (i, mut dquery) in queries.into_iter().enumerate() {
            let head = first_head + i;
            let (y, dy) = (y.slice(s![sample, .., head, ..]), dy.slice(s![sample, .., head, ..]));
            // The last block first: it sees every key, so it can overwrite and the others add.
            for [first, rows, keys] in self.blocks().rev() {
                let adds = i > 0 || first + rows < g.time;
                let (p, dp) = (&mut p[..rows * self.stride()], &mut dp[..rows * self.stride()]);
                let query = column(head);
                let query = query.slice(s![first..first + rows, ..]);
                let dout = dy.slice(s![first..first + rows, ..]);
                let (key, value) = (key.slice(s![..keys, ..]), value.slice(s![..keys, ..]));
                self.multiply(block_mut(p, rows, keys)?, query, key.t(), false);
                self.multiply(block_mut(dp, rows, keys)?, dout, value.t(), false);
                let deltas = row_products(&y.slice(s![first..first + rows, ..]), &dout);
                let lse = &log_sum_exp[i * g.time + first..][..rows];
                self.score_gradients(p, dp, [lse, &deltas], [sample, head, first], factors);
                let (p, ds) = (block(p, rows, keys)?, block(dp, rows, keys)?);
                self.multiply(dvalue.slice_mut(s![..keys, ..]), p.t(), dout, adds);
                self.multiply(dquery.slice_mut(s![first..first + rows, ..]), ds, key, false);
                self.multiply(dkey.slice_mut(s![..keys, ..]), ds.t(), query, adds);
            }
        }
        Ok(())
    }

    /// `p`: from scores to the probabilities that met the values; `dp`: from gradients of these to gradients of the products
    /// of queries and keys.
    fn score_gradients(
        &self,
        p: &mut [Lanes<R>],
        dp: &mut [Lanes<R>],
        [log_sum_exp, deltas]: [&[R]; 2],
        [sample, head, first]: [usize; 3],
        factors: &mut [Lanes<R>],
    ) {
        let stride = self.stride();
        let scale = self.scale;
        vectorize(
            #[inline(always)]
            || {
                let lines = p.chunks_exact_mut(stride).zip(dp.chunks_exact_mut(stride));
                for (i, ((p, dp), (&lse, &delta))) in lines.zip(log_sum_exp.iter().zip(deltas)).enumerate() {
                    let visible = self.visible(first + i);
                    let (p, p_hidden) = p.split_at_mut(visible.div_ceil(LANES));
                    let (dp, dp_hidden) = dp.split_at_mut(visible.div_ceil(LANES));
                    p_hidden.fill([R::zero(); LANES]);
                    dp_hidden.fill([R::zero(); LANES]);
                    self.hide(p, sample, visible);
                    if self.dropout.is_some() {
                        self.keep(&mut factors[..p.len()], [sample, head, first + i]);
                        for ((p, dp), f) in p.iter_mut().zip(dp.iter_mut()).zip(factors.iter()) {
                            for ((p, dp), &f) in p.iter_mut().zip(dp).zip(f) {
                                let e = p.mul_add(scale, -lse).exp_lane();
                                *p = e * f;
                                *dp = e * (*dp * f - delta) * scale;
                            }
                        }
                    } else {
                        for (p, dp) in p.iter_mut().zip(dp.iter_mut()) {
                            for (p, dp) in p.iter_mut().zip(dp) {
                                *p = p.mul_add(scale, -lse).exp_lane();
                                *dp = *p * (*dp - delta) * scale;
                            }
                        }
                    }
                    // Beyond the visible keys dp may hold anything, even what is no number: e * dp is not 0 then.
                    if let Some(last) = dp.last_mut() {
                        let inside = visible - (visible - 1) / LANES * LANES;
                        last.iter_mut().skip(inside).for_each(|dp| *dp = R::zero());
                    }
                }
            },
        );
    }
}

/// Where the gradients of one sample's query heads, and of the key head that they share, go.
struct Gradients<'a, R> {
    queries: Vec<ArrayViewMut2<'a, R>>,
    key: ArrayViewMut2<'a, R>,
    value: ArrayViewMut2<'a, R>,
}

fn mask_lanes<R: Real>(tokens: &[i32], pad: i32) -> Lanes<R> {
    let mut lanes = [R::zero(); LANES];
    for (lane, &token) in lanes.iter_mut().zip(tokens) {
        *lane = if token == pad { R::neg_infinity() } else { R::zero() };
    }
    lanes
}

/// The largest value of a row.
#[inline(always)]
fn row_max<R: Real>(row: &[Lanes<R>]) -> R {
    let mut max = [R::neg_infinity(); LANES];
    for x in row {
        for (max, &x) in max.iter_mut().zip(x) {
            *max = if x > *max { x } else { *max };
        }
    }
    fold_lanes(
        max,
        #[inline(always)]
        |a, b| if b > a { b } else { a },
    )
}

/// `e^((x - max) scale)`, `=`; gives the sum.
#[inline(always)]
fn exponentials<R: Real>(row: &mut [Lanes<R>], max: R, scale: R) -> R {
    let mut total = [R::zero(); LANES];
    for x in row {
        for (x, total) in x.iter_mut().zip(&mut total) {
            *x = ((*x - max) * scale).exp_lane();
            *total += *x;
        }
    }
    sum_lanes(total)
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
            || [shape.scratch(), vec![[R::zero(); LANES]; shape.stride()]],
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
            || [shape.scratch(), shape.scratch(), vec![[R::zero(); LANES]; shape.stride()]],
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
