//! Losses, each with its gradient in the same pass.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{PIECE, rows_in_piece, vectorize};
use crate::backend::ops::{BinaryCrossEntropy, CrossEntropy, Loss, METRICS, MeanSquaredError};
use crate::backend::{Act, Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

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

/// Largest value of a row, in lanes.
#[inline(always)]
fn row_max<R: Real>(row: &[R]) -> R {
    const LANES: usize = 16;
    let mut lanes = [R::neg_infinity(); LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(R::neg_infinity(), |a, &b| if b > a { b } else { a })
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
    const LANES: usize = 16;
    let max = row_max(row);
    let mut lanes = [R::zero(); LANES];
    let mut total = [R::zero(); LANES];
    for chunk in row.chunks(LANES) {
        for (i, &x) in chunk.iter().enumerate() {
            lanes[i] += (x - max).exp_lane();
            total[i] += x - max;
        }
    }
    let sum: R = lanes.iter().copied().sum();
    let log_sum = sum.ln();
    let classes = R::from_f64(row.len() as f64);
    let smooth = total.iter().copied().sum::<R>() / classes - log_sum;
    let picked = row[target] - max - log_sum;
    let loss = -((R::one() - smoothing) * picked + smoothing * smooth);
    if let Some(gradient) = gradient {
        let inverse = scale / sum;
        let uniform = smoothing / classes * scale;
        for (d, &x) in gradient.iter_mut().zip(row) {
            *d = (x - max).exp_lane() * inverse - uniform;
        }
        gradient[target] -= (R::one() - smoothing) * scale;
    }
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
        let rows = rows_in_piece(classes);
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
        pointwise(memory, acts, args.dprediction, "mean squared error", |x, t| {
            let d = x - t;
            ((d * d).f64(), d + d, false)
        })
    }

    fn binary_cross_entropy(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BinaryCrossEntropy,
        _: &StepContext,
    ) -> Result<()> {
        let acts = [args.logits, args.target, args.metrics];
        pointwise(memory, acts, args.dlogits, "binary cross-entropy", |x, t| {
            // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which overflows for no x.
            let e = (-x.abs()).exp();
            let loss = x.max(R::zero()) - x * t + e.ln_1p();
            let sigmoid = if x >= R::zero() { R::one() / (R::one() + e) } else { e / (R::one() + e) };
            (loss.f64(), sigmoid - t, (x > R::zero()) == (t > R::from_f64(0.5)))
        })
    }
}

/// A loss that is a mean over values: `f(x, target)` gives loss, derivative, and whether the prediction is right.
fn pointwise<R: Real>(
    memory: &mut Memory<'_, Cpu<R>>,
    [prediction, target, metrics]: [Act; 3],
    gradient: Option<Act>,
    name: &str,
    f: impl Fn(R, R) -> (f64, R, bool) + Sync,
) -> Result<()> {
    let activations = &mut *memory.activations;
    let gradient_range = gradient.map_or(0..0, |g| activations.range(g));
    let ranges = [activations.range(prediction), activations.range(target), activations.range(metrics), gradient_range];
    let [prediction, target, metrics, derivative] = disjoint(&mut activations.values, ranges, name)?;
    debug_assert_eq!(metrics.len(), METRICS);
    let len = prediction.len();
    let scale = R::from_f64(1.0 / len.max(1) as f64);
    let piece = |x: &[R], t: &[R], mut d: Option<&mut [R]>| {
        let mut partial = Partial::default();
        for (i, (&x, &t)) in x.iter().zip(t).enumerate() {
            let (loss, slope, right) = f(x, t);
            partial.loss += loss;
            partial.right += f64::from(u8::from(right));
            if let Some(d) = &mut d {
                d[i] = slope * scale;
            }
        }
        partial
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
