//! Batch normalization.
//!
//! Samples in parallel, in the order in which they lie in memory: first what is summed over each row of a sample and a channel,
//! then, when a channel's rows are known, what is written.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::activation::{relu, relu_slope};
use super::parallel::{sum_of, two_sums, vectorize};
use crate::backend::ops::{BatchNorm, BatchNormBackward, BatchNormForward, BatchNormInference, Epilogue, Rectified};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

/// `[batch, channels, spatial]`.
#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    channels: usize,
    spatial: usize,
}

impl Shape {
    /// Values of a sample.
    fn sample(&self) -> usize {
        self.channels * self.spatial
    }

    /// Where a sample's values of a channel lie.
    #[inline(always)]
    fn range(&self, sample: usize, channel: usize) -> Range<usize> {
        let start = (sample * self.channels + channel) * self.spatial;
        start..start + self.spatial
    }

    /// What `f` finds in each row, `[batch, channels]`; it may write the row of `values`, where there are any.
    fn by_row<R: Real, T: Copy + Default + Send>(
        &self,
        values: Option<&mut [R]>,
        f: impl Fn(Option<&mut [R]>, Range<usize>, usize) -> T + Sync,
    ) -> Vec<T> {
        let visit = |sample: usize, found: &mut [T], mut values: Option<&mut [R]>| {
            vectorize(
                #[inline(always)]
                || {
                    for (channel, found) in found.iter_mut().enumerate() {
                        let within = channel * self.spatial..(channel + 1) * self.spatial;
                        let row = values.as_deref_mut().map(|values| &mut values[within]);
                        *found = f(row, self.range(sample, channel), channel);
                    }
                },
            );
        };
        let mut found = vec![T::default(); self.batch * self.channels];
        let samples = found.par_chunks_mut(self.channels);
        match values {
            None => samples.enumerate().for_each(|(sample, found)| visit(sample, found, None)),
            Some(values) => samples
                .zip(values.par_chunks_mut(self.sample()))
                .enumerate()
                .for_each(|(sample, (found, values))| visit(sample, found, Some(values))),
        }
        found
    }

    /// Hands `f` every row of `y`, where it lies and its channel.
    fn write_rows<R: Real>(&self, y: &mut [R], f: impl Fn(&mut [R], Range<usize>, usize) + Sync) {
        y.par_chunks_mut(self.sample()).enumerate().for_each(|(sample, y)| {
            vectorize(
                #[inline(always)]
                || {
                    for (channel, y) in y.chunks_exact_mut(self.spatial).enumerate() {
                        f(y, self.range(sample, channel), channel);
                    }
                },
            );
        });
    }

    /// What the rows of a channel hold, samples in order.
    fn of_channel<'v, T>(&self, rows: &'v [T], channel: usize) -> impl Iterator<Item = &'v T> + Clone {
        rows.iter().skip(channel).step_by(self.channels)
    }
}

/// What a channel's values become: `(x - mean) * scale + shift`.
#[derive(Clone, Copy)]
struct Normal<R> {
    mean: R,
    scale: R,
    shift: R,
}

impl<R: Real> Normal<R> {
    #[inline(always)]
    fn of(&self, x: R) -> R {
        (x - self.mean) * self.scale + self.shift
    }

    /// A row of y = what becomes of that of x, and of the residual where there is one; they lie at `range`.
    #[inline(always)]
    fn write(&self, y: &mut [R], x: &[R], residual: Option<&[R]>, range: Range<usize>, rectifies: bool) {
        let end = |value| if rectifies { relu(value) } else { value };
        let x = &x[range.clone()];
        match residual {
            None => y.iter_mut().zip(x).for_each(|(y, &x)| *y = end(self.of(x))),
            Some(other) => {
                let other = &other[range];
                y.iter_mut().zip(x).zip(other).for_each(|((y, &x), &other)| *y = end(self.of(x) + other));
            }
        }
    }
}

/// The residual of an epilogue, if it has one: these values.
fn residual_of<'v, R>(epilogue: &Epilogue, values: &'v [R]) -> Option<&'v [R]> {
    epilogue.residual.map(|_| values)
}

/// Sum and sum of squared differences from the mean, of a row.
#[derive(Clone, Copy, Default)]
struct Moments {
    sum: f64,
    squares: f64,
}

/// What all rows' backwards share.
struct Backward<'a, R> {
    shape: Shape,
    x: &'a [R],
    dy: &'a [R],
    /// What ReLU was given or gave; x where that need not be read.
    given: &'a [R],
    mean: &'a [R],
    reciprocal_std: &'a [R],
    weight: &'a [R],
    bias: &'a [R],
}

impl<R: Real> Backward<'_, R> {
    fn normal(&self, channel: usize) -> Normal<R> {
        let scale = self.reciprocal_std[channel] * self.weight[channel];
        Normal { mean: self.mean[channel], scale, shift: self.bias[channel] }
    }

    /// The channels' sums of d and of d times what was normalized, where d is what `slope` makes of (normal, x, given, dy). d is left in
    /// `behind`, where that is there; and dx is written, unless it is empty.
    fn run(
        self,
        mut behind: Option<&mut [R]>,
        dx: &mut [R],
        slope: impl Fn(&Normal<R>, R, R, R) -> R + Sync,
    ) -> [Vec<f64>; 2] {
        let sums = self.sums(behind.as_deref_mut(), &slope);
        match behind {
            _ if dx.is_empty() => {}
            None => self.write(dx, &sums, slope),
            Some(d) => Backward { dy: d, ..self }.write(
                dx,
                &sums,
                #[inline(always)]
                |_, _, _, d| d,
            ),
        }
        sums
    }

    fn sums(&self, behind: Option<&mut [R]>, slope: &(impl Fn(&Normal<R>, R, R, R) -> R + Sync)) -> [Vec<f64>; 2] {
        let rows = self.shape.by_row(
            behind,
            #[inline(always)]
            |behind, range, channel| {
                let normal = self.normal(channel);
                let (x, dy, given) = (&self.x[range.clone()], &self.dy[range.clone()], &self.given[range]);
                let (m, s) = (normal.mean, self.reciprocal_std[channel]);
                let (level, tilt) = match behind {
                    None => two_sums(
                        [x, given, dy],
                        #[inline(always)]
                        |x, given, dy| {
                            let d = slope(&normal, x, given, dy);
                            (d, d * ((x - m) * s))
                        },
                    ),
                    Some(behind) => {
                        for (((behind, &x), &given), &dy) in behind.iter_mut().zip(x).zip(given).zip(dy) {
                            *behind = slope(&normal, x, given, dy);
                        }
                        two_sums(
                            [x, behind, behind],
                            #[inline(always)]
                            |x, d, _| (d, d * ((x - m) * s)),
                        )
                    }
                };
                [level.f64(), tilt.f64()]
            },
        );
        [0, 1].map(|which| {
            let of = |channel| self.shape.of_channel(&rows, channel).map(|row| row[which]).sum();
            (0..self.shape.channels).map(of).collect()
        })
    }

    fn write(&self, dx: &mut [R], sums: &[Vec<f64>; 2], slope: impl Fn(&Normal<R>, R, R, R) -> R + Sync) {
        let inverse = 1.0 / (self.shape.batch * self.shape.spatial) as f64;
        self.shape.write_rows(
            dx,
            #[inline(always)]
            |dx, range, channel| {
                let normal = self.normal(channel);
                let [level, tilt] = [0, 1].map(|which| R::from_f64(sums[which][channel] * inverse));
                let (x, dy, given) = (&self.x[range.clone()], &self.dy[range.clone()], &self.given[range]);
                let s = self.reciprocal_std[channel];
                for (((dx, &x), &given), &dy) in dx.iter_mut().zip(x).zip(given).zip(dy) {
                    let d = slope(&normal, x, given, dy);
                    *dx = normal.scale * (d - level - (x - normal.mean) * s * tilt);
                }
            },
        );
    }
}

impl<R: Real> BatchNorm for Cpu<R> {
    fn batch_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormForward,
        _: &StepContext,
    ) -> Result<()> {
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let shape = Shape { batch: args.batch, channels: args.channels, spatial: args.spatial };
        let [x, y, mean, std] = [args.x, args.y, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let other = args.epilogue.residual.map_or(0..0, |act| activations.range(act));
        let [x, y, mean, std, other] = disjoint(&mut activations.values, [x, y, mean, std, other], "batch norm")?;
        let (x, other) = (&*x, residual_of(&args.epilogue, other));
        let (of_row, count) = (args.spatial as f64, (args.batch * args.spatial) as f64);
        let rows = shape.by_row(
            None,
            #[inline(always)]
            |_: Option<&mut [R]>, range, _| {
                let x = &x[range];
                let sum = sum_of(
                    x,
                    #[inline(always)]
                    |x| x,
                );
                let center = R::from_f64(sum.f64() / of_row);
                let squares = sum_of(
                    x,
                    #[inline(always)]
                    |x| (x - center) * (x - center),
                );
                Moments { sum: sum.f64(), squares: squares.f64() }
            },
        );
        let (mean_range, var_range) = (arena.state_range(args.running_mean), arena.state_range(args.running_var));
        for channel in 0..args.channels {
            let rows = shape.of_channel(&rows, channel);
            let m = rows.clone().map(|row| row.sum).sum::<f64>() / count;
            // Those around a row's mean, and that mean around the batch's (Chan, Golub and LeVeque 1979).
            let apart = |row: &Moments| row.squares + of_row * (row.sum / of_row - m).powi(2);
            let squares = rows.map(apart).sum::<f64>();
            mean[channel] = R::from_f64(m);
            std[channel] = R::from_f64(1.0 / (squares / count + args.epsilon).sqrt());
            let unbiased = squares / (count - 1.0).max(1.0);
            for (at, value) in [(mean_range.start, m), (var_range.start, unbiased)] {
                let running = &mut arena.state[at + channel];
                *running = R::from_f64(running.f64() * (1.0 - args.momentum) + args.momentum * value);
            }
        }
        let [weight, bias] = [args.weight, args.bias].map(|param| &arena.parameters[arena.range(param)]);
        shape.write_rows(
            y,
            #[inline(always)]
            |y, range, channel| {
                let scale = std[channel] * weight[channel];
                let normal = Normal { mean: mean[channel], scale, shift: bias[channel] };
                normal.write(y, x, other, range, args.epilogue.relu);
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
        let shape = Shape { batch: args.batch, channels: args.channels, spatial: args.spatial };
        let other = args.epilogue.residual.map_or(0..0, |act| activations.range(act));
        let ranges = [activations.range(args.x), activations.range(args.y), other];
        let [x, y, other] = disjoint(&mut activations.values, ranges, "batch norm")?;
        let (x, other) = (&*x, residual_of(&args.epilogue, other));
        let mean = &arena.state[arena.state_range(args.running_mean)];
        let variance = &arena.state[arena.state_range(args.running_var)];
        let [weight, bias] = [args.weight, args.bias].map(|param| &arena.parameters[arena.range(param)]);
        let epsilon = R::from_f64(args.epsilon);
        shape.write_rows(
            y,
            #[inline(always)]
            |y, range, channel| {
                let scale = weight[channel] / (variance[channel] + epsilon).sqrt();
                let normal = Normal { mean: mean[channel], scale, shift: bias[channel] };
                normal.write(y, x, other, range, args.epilogue.relu);
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
        let shape = Shape { batch: args.batch, channels: args.channels, spatial: args.spatial };
        let [output, gradient] = args.rectified.map_or([None; 2], |rectified| [rectified.output, rectified.gradient]);
        let [x, dy, mean, std] = [args.x, args.dy, args.mean, args.reciprocal_std].map(|act| activations.range(act));
        let [given, behind, dx] = [output, gradient, args.dx].map(|act| act.map_or(0..0, |act| activations.range(act)));
        let ranges = [x, dy, mean, std, given, behind, dx];
        let [x, dy, mean, std, given, behind, dx] = disjoint(&mut activations.values, ranges, "batch norm")?;
        let [weight, bias] = [args.weight, args.bias].map(|param| &arena.parameters[arena.range(param)]);
        // Where nothing is to be read, anything that is there does.
        let given = if output.is_some() { &*given } else { &*x };
        let rows = Backward { shape, x, dy, given, mean, reciprocal_std: std, weight, bias };
        let behind = gradient.map(|_| behind);
        let sums = match args.rectified {
            None => rows.run(
                None,
                dx,
                #[inline(always)]
                |_, _, _, dy| dy,
            ),
            Some(Rectified { output: Some(_), .. }) => rows.run(
                behind,
                dx,
                #[inline(always)]
                |_, _, given, dy| relu_slope(given, dy),
            ),
            Some(_) => rows.run(
                behind,
                dx,
                #[inline(always)]
                |normal, x, _, dy| relu_slope(normal.of(x), dy),
            ),
        };
        for (grad, of_channels) in [args.dbias, args.dweight].into_iter().zip(sums) {
            let range = arena.gradient_range(grad.param);
            for (gradient, sum) in arena.gradients[range].iter_mut().zip(of_channels) {
                let sum = R::from_f64(sum);
                *gradient = if step.overwrites(grad) { sum } else { *gradient + sum };
            }
        }
        Ok(())
    }
}
