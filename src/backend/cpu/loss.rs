//! Losses, each with its gradient in the same pass.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{LANES, Lanes, PIECE, fold_lanes, sum_lanes, sum_of, vectorize};
use crate::backend::ops::{BinaryCrossEntropy, CrossEntropy, Loss, METRICS, MeanSquaredError};
use crate::backend::{Act, Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

/// Values in a piece of rows whose exponentials and logarithm are taken: some microseconds.
const COSTLY: usize = 1 << 9;

/// Sums over a piece: of losses, and of right predictions.
#[derive(Clone, Copy, Default)]
struct Partial {
    loss: f64,
    right: f64,
}

fn write_metrics<R: Real>(metrics: &mut [R], partials: &[Partial], counted: usize) {
    let loss: f64 = partials.iter().map(|p| p.loss).sum();
    let right: f64 = partials.iter().map(|p| p.right).sum();
    let mean = if counted == 0 { 0.0 } else { loss / counted as f64 };
    for (to, from) in metrics.iter_mut().zip([mean, loss, counted as f64, right]) {
        *to = R::from_f64(from);
    }
}

/// The values at a row's end as a vector of their own: what is beyond is no maximum, and its exponential is 0.
#[inline(always)]
fn padded<R: Real>(rest: &[R]) -> Lanes<R> {
    let mut lanes = [R::neg_infinity(); LANES];
    lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane = x);
    lanes
}

/// The largest value of a row.
#[inline(always)]
fn row_max<R: Real>(row: &[R]) -> R {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = padded(rest);
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    fold_lanes(
        lanes,
        #[inline(always)]
        |a, b| if b > a { b } else { a },
    )
}

/// `e^(x - max)`, `=`; gives the sum.
#[inline(always)]
fn exponentials<R: Real>(to: &mut [R], row: &[R], max: R) -> R {
    let mut lanes = [R::zero(); LANES];
    let ((to, to_rest), (row, row_rest)) = (to.as_chunks_mut::<LANES>(), row.as_chunks::<LANES>());
    for (to, x) in to.iter_mut().zip(row) {
        for ((to, &x), lane) in to.iter_mut().zip(x).zip(&mut lanes) {
            *to = (x - max).exp_lane();
            *lane += *to;
        }
    }
    if !row_rest.is_empty() {
        let mut last = padded(row_rest);
        for (x, lane) in last.iter_mut().zip(&mut lanes) {
            *x = (*x - max).exp_lane();
            *lane += *x;
        }
        to_rest.copy_from_slice(&last[..to_rest.len()]);
    }
    sum_lanes(lanes)
}

/// Loss and gradient of one row; returns the loss and whether the prediction is right.
#[inline(always)]
fn cross_entropy_row<R: Real>(
    row: &[R],
    gradient: Option<&mut [R]>,
    target: usize,
    smoothing: R,
    scale: R,
) -> (f64, bool) {
    let max = row_max(row);
    let classes = R::from_f64(row.len() as f64);
    let sum = match gradient {
        Some(gradient) => {
            let sum = exponentials(gradient, row, max);
            let inverse = scale / sum;
            let uniform = smoothing / classes * scale;
            gradient.iter_mut().for_each(|d| *d = *d * inverse - uniform);
            gradient[target] -= (R::one() - smoothing) * scale;
            sum
        }
        None => sum_of(
            row,
            #[inline(always)]
            |x| (x - max).exp_lane(),
        ),
    };
    let log_sum = sum.ln();
    let picked = row[target] - max - log_sum;
    let loss = if smoothing == R::zero() {
        -picked
    } else {
        let total = sum_of(
            row,
            #[inline(always)]
            |x| x - max,
        );
        -((R::one() - smoothing) * picked + smoothing * (total / classes - log_sum))
    };
    let right = row[target] == max && row[..target].iter().all(|&x| x < max);
    (loss.f64(), right)
}

impl<R: Real> Loss for Cpu<R> {
    fn cross_entropy(&self, memory: &mut Memory<'_, Self>, args: &CrossEntropy, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let classes = args.classes.max(1);
        let targets = &activations.indices[activations.index_range(args.targets)];
        let mut counted = 0usize;
        for (row, &target) in targets.iter().enumerate() {
            if target == args.ignore_index {
                continue;
            }
            if target < 0 || target as usize >= classes {
                return Err(Error::shape(
                    "cross-entropy",
                    format!("targets from 0 to {} (or {} to leave one out)", classes - 1, args.ignore_index),
                    format!("{target} in row {row}"),
                ));
            }
            counted += 1;
        }
        let gradient_range = args.dlogits.map_or(0..0, |d| activations.range(d));
        let ranges = [activations.range(args.logits), gradient_range, activations.range(args.metrics)];
        let [logits, dlogits, metrics] = disjoint(&mut activations.values, ranges, "cross-entropy")?;
        let smoothing = R::from_f64(args.label_smoothing);
        let scale = R::from_f64(1.0 / counted.max(1) as f64);
        let rows = (COSTLY / classes).max(1);
        let piece = |logits: &[R], mut gradient: Option<&mut [R]>, targets: &[i32]| {
            vectorize(
                #[inline(always)]
                || {
                    let mut partial = Partial::default();
                    for (i, (row, &target)) in logits.chunks_exact(classes).zip(targets).enumerate() {
                        let line = gradient.as_mut().map(|g| &mut g[i * classes..(i + 1) * classes]);
                        if target == args.ignore_index {
                            if let Some(line) = line {
                                line.fill(R::zero());
                            }
                            continue;
                        }
                        let (loss, right) = cross_entropy_row(row, line, target as usize, smoothing, scale);
                        partial.loss += loss;
                        partial.right += f64::from(u8::from(right));
                    }
                    partial
                },
            )
        };
        let inputs = logits.par_chunks(rows * classes).zip(targets.par_chunks(rows));
        let partials: Vec<Partial> = if args.dlogits.is_some() {
            let lines = dlogits.par_chunks_mut(rows * classes);
            inputs.zip(lines).map(|((x, t), d)| piece(x, Some(d), t)).collect()
        } else {
            inputs.map(|(x, t)| piece(x, None, t)).collect()
        };
        write_metrics(metrics, &partials, counted);
        Ok(())
    }

    fn mean_squared_error(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanSquaredError,
        _: &StepContext,
    ) -> Result<()> {
        let acts = [args.prediction, args.target, args.metrics];
        pointwise(
            memory,
            acts,
            args.dprediction,
            "mean squared error",
            #[inline(always)]
            |x, t| {
                let d = x - t;
                [d * d, d + d, R::zero()]
            },
        )
    }

    fn binary_cross_entropy(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BinaryCrossEntropy,
        _: &StepContext,
    ) -> Result<()> {
        let acts = [args.logits, args.target, args.metrics];
        pointwise(
            memory,
            acts,
            args.dlogits,
            "binary cross-entropy",
            #[inline(always)]
            |x, t| {
                // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which overflows for no x.
                let e = (-x.abs()).exp_lane();
                let positive = if x > R::zero() { x } else { R::zero() };
                let loss = positive - x * t + e.ln_1p_lane();
                let far = R::one() / (R::one() + e);
                let sigmoid = if x >= R::zero() { far } else { e * far };
                let is_right = (x > R::zero()) == (t > R::from_f64(0.5));
                [loss, sigmoid - t, if is_right { R::one() } else { R::zero() }]
            },
        )
    }
}

/// Sums by lanes: of losses in f64, and of right predictions, which are fewer in a piece than f32 counts.
struct Sums<R> {
    losses: Lanes<f64>,
    rights: Lanes<R>,
}

impl<R: Real> Sums<R> {
    /// Adds those of some values, as many as there are lanes at most, and gives their derivatives times `scale`.
    #[inline(always)]
    fn take(&mut self, x: &[R], t: &[R], scale: R, f: &impl Fn(R, R) -> [R; 3]) -> Lanes<R> {
        let mut slopes = [R::zero(); LANES];
        for (lane, ((&x, &t), to)) in x.iter().zip(t).zip(&mut slopes).enumerate() {
            let [loss, slope, right] = f(x, t);
            self.losses[lane] += loss.f64();
            self.rights[lane] += right;
            *to = slope * scale;
        }
        slopes
    }
}

/// Losses of a piece and, where `d` is given, derivatives times `scale`, each value by `f`.
#[inline(always)]
fn pointwise_piece<R: Real>(
    x: &[R],
    t: &[R],
    mut d: Option<&mut [R]>,
    scale: R,
    f: &impl Fn(R, R) -> [R; 3],
) -> Partial {
    let mut sums = Sums { losses: [0.0; LANES], rights: [R::zero(); LANES] };
    let ((chunks, rest), (t_chunks, t_rest)) = (x.as_chunks::<LANES>(), t.as_chunks::<LANES>());
    for (number, (x, t)) in chunks.iter().zip(t_chunks).enumerate() {
        let slopes = sums.take(x, t, scale, f);
        if let Some(d) = &mut d {
            d[number * LANES..][..LANES].copy_from_slice(&slopes);
        }
    }
    let slopes = sums.take(rest, t_rest, scale, f);
    if let Some(d) = &mut d {
        d[x.len() - rest.len()..].copy_from_slice(&slopes[..rest.len()]);
    }
    Partial { loss: sum_lanes(sums.losses), right: sum_lanes(sums.rights).f64() }
}

/// A loss that is a mean over values: `f(x, target)` gives loss, derivative, and 1 where the prediction is right, else 0.
fn pointwise<R: Real>(
    memory: &mut Memory<'_, Cpu<R>>,
    [prediction, target, metrics]: [Act; 3],
    gradient: Option<Act>,
    name: &str,
    f: impl Fn(R, R) -> [R; 3] + Sync,
) -> Result<()> {
    let activations = &mut *memory.activations;
    let gradient_range = gradient.map_or(0..0, |g| activations.range(g));
    let ranges = [activations.range(prediction), activations.range(target), activations.range(metrics), gradient_range];
    let [prediction, target, metrics, derivative] = disjoint(&mut activations.values, ranges, name)?;
    debug_assert_eq!(metrics.len(), METRICS);
    let len = prediction.len();
    let scale = R::from_f64(1.0 / len.max(1) as f64);
    let piece = |x: &[R], t: &[R], d: Option<&mut [R]>| {
        vectorize(
            #[inline(always)]
            || pointwise_piece(x, t, d, scale, &f),
        )
    };
    let inputs = prediction.par_chunks(PIECE).zip(target.par_chunks(PIECE));
    let partials: Vec<Partial> = if gradient.is_some() {
        inputs.zip(derivative.par_chunks_mut(PIECE)).map(|((x, t), d)| piece(x, t, Some(d))).collect()
    } else {
        inputs.map(|(x, t)| piece(x, t, None)).collect()
    };
    write_metrics(metrics, &partials, len);
    Ok(())
}
