//! Rows of attention scores: what each row may see, softmax, dropout, and their gradients.
//!
//! Rows are padded to whole vectors, and hidden keys hold minus infinity before the exponential.

use super::dropout::first_position;
use super::parallel::{LANES, Lanes, fold_lanes, sum_lanes, vectorize};
use crate::backend::StepContext;
use crate::backend::ops::{AttentionDropout, AttentionGeometry, Padding};
use crate::random::{Philox, Purpose, to_unit};
use crate::real::Real;

/// Query rows of a block.
pub(super) const BLOCK: usize = 64;

/// Everything about an attention but its tensors.
pub(super) struct Shape<R> {
    pub(super) geometry: AttentionGeometry,
    /// `[batch, time padded to lanes]`: 0, or minus infinity where a key is padding.
    mask: Option<Vec<Lanes<R>>>,
    dropout: Option<(AttentionDropout, Philox, u64)>,
    /// `1 / sqrt(head size)`.
    scale: R,
    /// Whether products share the threads: where pieces alone do not keep them busy.
    pub(super) wide: bool,
}

impl<R: Real> Shape<R> {
    pub(super) fn new(
        g: AttentionGeometry,
        padding: Option<(Padding, &[i32])>,
        dropout: Option<AttentionDropout>,
        step: &StepContext,
    ) -> Self {
        let mask = padding.map(|(padding, tokens)| {
            let lines = tokens.chunks_exact(g.time.max(1));
            lines.flat_map(|line| line.chunks(LANES).map(|part| mask_lanes(part, padding.pad))).collect()
        });
        let len = g.batch * g.heads * g.time * g.time;
        Shape {
            geometry: g,
            mask,
            dropout: dropout
                .map(|d| (d, Philox::new(step.seed, Purpose::Dropout, d.stream), first_position(step, len))),
            scale: R::from_f64(1.0 / (g.head_size as f64).sqrt()),
            wide: g.batch * g.kv_heads < rayon::current_num_threads(),
        }
    }

    /// Vectors of lanes in a row of scores.
    pub(super) fn stride(&self) -> usize {
        self.geometry.time.div_ceil(LANES)
    }

    /// Vectors of lanes for a block of scores.
    pub(super) fn scratch(&self) -> Vec<Lanes<R>> {
        vec![[R::zero(); LANES]; BLOCK.min(self.geometry.time) * self.stride()]
    }

    /// Vectors of lanes for what dropout multiplies a row by.
    pub(super) fn factors(&self) -> Vec<Lanes<R>> {
        vec![[R::zero(); LANES]; self.stride()]
    }

    /// Row blocks: first row, number of rows, number of keys that they can see.
    pub(super) fn blocks(&self) -> impl DoubleEndedIterator<Item = [usize; 3]> + use<R> {
        let (time, causal) = (self.geometry.time, self.geometry.causal);
        (0..time.div_ceil(BLOCK)).map(move |block| {
            let first = block * BLOCK;
            let end = (first + BLOCK).min(time);
            [first, end - first, if causal { end } else { time }]
        })
    }

    /// The keys that a row can see, padding apart.
    #[inline(always)]
    pub(super) fn visible(&self, row: usize) -> usize {
        if self.geometry.causal { row + 1 } else { self.geometry.time }
    }

    /// Vectors of lanes that hold the keys which some of `rows` rows from `first` on can see; the products read no further.
    fn seen(&self, first: usize, rows: usize) -> usize {
        self.visible(first + rows.max(1) - 1).div_ceil(LANES)
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
    pub(super) fn softmax(
        &self,
        scores: &mut [Lanes<R>],
        log_sum_exp: &mut [R],
        [sample, head, first]: [usize; 3],
        factors: &mut [Lanes<R>],
    ) {
        let (stride, seen) = (self.stride(), self.seen(first, log_sum_exp.len()));
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
                    let (line, hidden) = line[..seen].split_at_mut(vectors(i));
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

    /// `p`: from scores to the probabilities that met the values; `dp`: from gradients of these to gradients of the products
    /// of queries and keys.
    pub(super) fn score_gradients(
        &self,
        p: &mut [Lanes<R>],
        dp: &mut [Lanes<R>],
        [log_sum_exp, deltas]: [&[R]; 2],
        [sample, head, first]: [usize; 3],
        factors: &mut [Lanes<R>],
    ) {
        let (stride, seen, scale) = (self.stride(), self.seen(first, deltas.len()), self.scale);
        vectorize(
            #[inline(always)]
            || {
                let lines = p.chunks_exact_mut(stride).zip(dp.chunks_exact_mut(stride));
                for (i, ((p, dp), (&lse, &delta))) in lines.zip(log_sum_exp.iter().zip(deltas)).enumerate() {
                    let visible = self.visible(first + i);
                    let (p, p_hidden) = p[..seen].split_at_mut(visible.div_ceil(LANES));
                    let (dp, dp_hidden) = dp[..seen].split_at_mut(visible.div_ceil(LANES));
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
