//! Batch normalization.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{sum_of, two_sums, vectorize};
use crate::backend::ops::{BatchNorm, BatchNormBackward, BatchNormForward, BatchNormInference};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

/// Sums over all elements of one channel, of what `sums` gives for the elements of one sample; samples in order, added in f64.
#[inline(always)]
fn channel_sums<R: Real, const N: usize>(
    [batch, channels, spatial]: [usize; 3],
    channel: usize,
    sums: impl Fn(Range<usize>) -> [R; N],
) -> [f64; N] {
    vectorize(
        #[inline(always)]
        || {
            let mut totals = [0.0; N];
            for sample in 0..batch {
                let start = (sample * channels + channel) * spatial;
                for (total, sum) in totals.iter_mut().zip(sums(start..start + spatial)) {
                    *total += sum.f64();
                }
            }
            totals
        },
    )
}

/// `y = f(channel, position)` for every element, samples in parallel.
fn by_channel<R: Real>(
    y: &mut [R],
    [_, channels, spatial]: [usize; 3],
    f: impl Fn(usize, Range<usize>, &mut [R]) + Sync,
) {
    y.par_chunks_mut(channels * spatial).enumerate().for_each(|(sample, y)| {
        vectorize(
            #[inline(always)]
            || {
                for (channel, y) in y.chunks_exact_mut(spatial).enumerate() {
                    let start = (sample * channels + channel) * spatial;
                    f(channel, start..start + spatial, y);
                }
            },
        );
    });
}

impl<R: Real> BatchNorm for Cpu<R> {
    fn batch_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormForward,
        _: &StepContext,
    ) -> Result<()> {
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let dimensions = [args.batch, args.channels, args.spatial];
        let count = args.batch * args.spatial;
        let ranges = [args.x, args.y, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let [x, y, mean, std] = disjoint(&mut activations.values, ranges, "batch norm")?;
        let x: &[R] = x;
        let moments: Vec<(f64, f64)> = (0..args.channels)
            .into_par_iter()
            .map(|channel| {
                let [total] = channel_sums(
                    dimensions,
                    channel,
                    #[inline(always)]
                    |range| {
                        [sum_of(
                            &x[range],
                            #[inline(always)]
                            |x| x,
                        )]
                    },
                );
                let m = total / count as f64;
                let center = R::from_f64(m);
                let [squares] = channel_sums(
                    dimensions,
                    channel,
                    #[inline(always)]
                    |range| {
                        [sum_of(
                            &x[range],
                            #[inline(always)]
                            |x| (x - center) * (x - center),
                        )]
                    },
                );
                (m, squares / count as f64)
            })
            .collect();
        let (mean_range, var_range) = (arena.state_range(args.running_mean), arena.state_range(args.running_var));
        let unbiased = count as f64 / (count as f64 - 1.0).max(1.0);
        for (channel, &(m, variance)) in moments.iter().enumerate() {
            mean[channel] = R::from_f64(m);
            std[channel] = R::from_f64(1.0 / (variance + args.epsilon).sqrt());
            for (at, value) in [(mean_range.start, m), (var_range.start, variance * unbiased)] {
                let running = &mut arena.state[at + channel];
                *running = R::from_f64(running.f64() * (1.0 - args.momentum) + args.momentum * value);
            }
        }
        let weight = &arena.parameters[arena.range(args.weight)];
        let bias = &arena.parameters[arena.range(args.bias)];
        by_channel(
            y,
            dimensions,
            #[inline(always)]
            |channel, range, y| {
                let (scale, m, b) = (std[channel] * weight[channel], mean[channel], bias[channel]);
                y.iter_mut().zip(&x[range]).for_each(|(y, &x)| *y = (x - m) * scale + b);
            },
        );
        Ok(())
    }

    fn batch_norm_inference(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormInference,
        _: &StepContext,
    ) -> Result<()> {
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "batch norm")?;
        let mean = &arena.state[arena.state_range(args.running_mean)];
        let variance = &arena.state[arena.state_range(args.running_var)];
        let weight = &arena.parameters[arena.range(args.weight)];
        let bias = &arena.parameters[arena.range(args.bias)];
        let epsilon = R::from_f64(args.epsilon);
        by_channel(
            y,
            [args.batch, args.channels, args.spatial],
            #[inline(always)]
            |channel, range, y| {
                let scale = weight[channel] / (variance[channel] + epsilon).sqrt();
                let (m, b) = (mean[channel], bias[channel]);
                y.iter_mut().zip(&x[range]).for_each(|(y, &x)| *y = (x - m) * scale + b);
            },
        );
        Ok(())
    }

    fn batch_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormBackward,
        step: &StepContext,
    ) -> Result<()> {
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let dimensions = [args.batch, args.channels, args.spatial];
        let dx_range = args.dx.map_or(0..0, |dx| activations.range(dx));
        let [x, dy, mean, std] = [args.x, args.dy, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let [x, dy, mean, std, dx] = disjoint(&mut activations.values, [x, dy, mean, std, dx_range], "batch norm")?;
        let (x, dy): (&[R], &[R]) = (x, dy);
        let sums: Vec<[f64; 2]> = (0..args.channels)
            .into_par_iter()
            .map(|channel| {
                let (m, s) = (mean[channel], std[channel]);
                channel_sums(
                    dimensions,
                    channel,
                    #[inline(always)]
                    |range| {
                        let (x, dy) = (&x[range.clone()], &dy[range]);
                        two_sums(
                            [x, dy, dy],
                            #[inline(always)]
                            |x, dy, _| (dy, dy * ((x - m) * s)),
                        )
                        .into()
                    },
                )
            })
            .collect();
        let (weight_range, bias_range) =
            (arena.gradient_range(args.dweight.param), arena.gradient_range(args.dbias.param));
        for (channel, &[bias, weight]) in sums.iter().enumerate() {
            for (at, grad, value) in [(bias_range.start, args.dbias, bias), (weight_range.start, args.dweight, weight)]
            {
                let gradient = &mut arena.gradients[at + channel];
                let value = R::from_f64(value);
                *gradient = if step.overwrites(grad) { value } else { *gradient + value };
            }
        }
        if args.dx.is_some() {
            let weight = &arena.parameters[arena.range(args.weight)];
            let inverse = 1.0 / (args.batch * args.spatial) as f64;
            by_channel(
                dx,
                dimensions,
                #[inline(always)]
                |channel, range, dx| {
                    let (m, s) = (mean[channel], std[channel]);
                    let scale = weight[channel] * s;
                    let (bias, slope) =
                        (R::from_f64(sums[channel][0] * inverse), R::from_f64(sums[channel][1] * inverse));
                    for ((dx, &x), &dy) in dx.iter_mut().zip(&x[range.clone()]).zip(&dy[range]) {
                        *dx = scale * (dy - bias - (x - m) * s * slope);
                    }
                },
            );
        }
        Ok(())
    }
}
