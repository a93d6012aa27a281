//! Convolution as products: the windows of a sample become the columns of a matrix. Where kernels of 3 x 3 take fewer multiplications in
//! another form, that is in winograd.rs.

use std::sync::{Mutex, PoisonError};

use ndarray::ArrayView2;
use rayon::prelude::*;

use super::Cpu;
use super::linear::{matrix, matrix_mut};
use super::parallel::{sum_of, sum_rows, vectorize};
use super::product::product_here;
use super::transpose::transpose;
use super::winograd::Winograd;
use crate::backend::ops::{Conv, Conv2dBackward, Conv2dForward, Conv2dGeometry};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

/// Parts that a batch is cut into, whatever the number of threads: each has its own sums of weight and bias gradients, which are
/// added in order.
const PARTS: usize = 16;

/// Sizes that follow from a geometry.
#[derive(Clone, Copy)]
struct Sizes {
    /// Positions of the output.
    positions: usize,
    /// Values under the kernel, in one group.
    taps: usize,
    /// Filters of a group.
    group_filters: usize,
    /// Elements of a sample, in and out.
    input: usize,
    output: usize,
    /// Elements of the matrix of columns; 0 where the input is that matrix already.
    columns: usize,
    /// Samples of a part, and how many parts there are.
    part: usize,
    parts: usize,
    output_sides: [usize; 2],
}

fn sizes(g: &Conv2dGeometry) -> Result<Sizes> {
    let output_sides = g.output().ok_or_else(|| {
        Error::shape("conv2d", "a kernel that fits the padded input", format!("{:?} in {:?}", g.kernel, g.input))
    })?;
    let positions = output_sides[0] * output_sides[1];
    let group_channels = g.channels / g.groups;
    let part = g.batch.div_ceil(PARTS).max(1);
    let taps = group_channels * g.kernel[0] * g.kernel[1];
    Ok(Sizes {
        positions,
        taps,
        group_filters: g.filters / g.groups,
        input: g.channels * g.input[0] * g.input[1],
        output: g.filters * positions,
        columns: if is_pointwise(g) { 0 } else { taps * positions },
        part,
        parts: g.batch.div_ceil(part),
        output_sides,
    })
}

/// Whether the input is its own matrix of columns: a 1 x 1 kernel at every position.
fn is_pointwise(g: &Conv2dGeometry) -> bool {
    g.kernel == [1, 1] && g.stride == [1, 1] && g.padding == [0, 0]
}

/// For each row of the output under tap (ky, kx): the input row, and the output columns whose input lies within it.
#[inline(always)]
fn tap_rows(
    g: &Conv2dGeometry,
    sides: [usize; 2],
    [ky, kx]: [usize; 2],
    mut visit: impl FnMut(usize, Option<usize>, std::ops::Range<usize>),
) {
    let first = g.padding[1].saturating_sub(kx).div_ceil(g.stride[1]).min(sides[1]);
    let end = (g.input[1] + g.padding[1]).saturating_sub(kx).div_ceil(g.stride[1]).clamp(first, sides[1]);
    for oy in 0..sides[0] {
        let iy = (oy * g.stride[0] + ky).checked_sub(g.padding[0]).filter(|&iy| iy < g.input[0]);
        visit(oy, iy, first..end);
    }
}

/// Where windows lie one apart and rows of the output are as wide as those of the input: the positions of the output, and the
/// places of the input, that tap (ky, kx) brings together in one piece; columns at the edges apart, which have none.
fn shifted(g: &Conv2dGeometry, sides: [usize; 2], [ky, kx]: [usize; 2]) -> Option<[std::ops::Range<usize>; 2]> {
    let width = g.input[1];
    if g.stride != [1, 1] || sides[1] != width {
        return None;
    }
    let (forth, back) = (ky * width + kx, g.padding[0] * width + g.padding[1]);
    let positions = sides[0] * width;
    let first = back.saturating_sub(forth).min(positions);
    let end = (g.input[0] * width + back).saturating_sub(forth).clamp(first, positions);
    // A tap that lies beyond the input everywhere has no place there.
    let start = if first < end { first + forth - back } else { 0 };
    Some([first..end, start..start + (end - first)])
}

/// Sets to 0 what tap column kx finds beyond the sides of the input, in every row of `line`.
fn clear_edges<R: Real>(g: &Conv2dGeometry, kx: usize, line: &mut [R]) {
    let width = g.input[1];
    let [left, right] = [g.padding[1].saturating_sub(kx).min(width), kx.saturating_sub(g.padding[1]).min(width)];
    for row in line.chunks_exact_mut(width) {
        row[..left].fill(R::zero());
        row[width - right..].fill(R::zero());
    }
}

/// Writes the columns of one group of one sample: `columns` `[taps, positions]`, `=`.
fn to_columns<R: Real>(g: &Conv2dGeometry, s: &Sizes, x: &[R], columns: &mut [R]) {
    let (plane, [kh, kw]) = (g.input[0] * g.input[1], g.kernel);
    for (tap, line) in columns.chunks_exact_mut(s.positions).enumerate() {
        let (c, ky, kx) = (tap / (kh * kw), tap / kw % kh, tap % kw);
        let x = &x[c * plane..(c + 1) * plane];
        if let Some([positions, places]) = shifted(g, s.output_sides, [ky, kx]) {
            line[..positions.start].fill(R::zero());
            line[positions.end..].fill(R::zero());
            line[positions].copy_from_slice(&x[places]);
            clear_edges(g, kx, line);
            continue;
        }
        tap_rows(g, s.output_sides, [ky, kx], |oy, iy, inside| {
            let line = &mut line[oy * s.output_sides[1]..(oy + 1) * s.output_sides[1]];
            let Some(iy) = iy else {
                line.fill(R::zero());
                return;
            };
            line[..inside.start].fill(R::zero());
            line[inside.end..].fill(R::zero());
            if inside.is_empty() {
                return;
            }
            let start = iy * g.input[1] + inside.start * g.stride[1] + kx - g.padding[1];
            if g.stride[1] == 1 {
                line[inside.clone()].copy_from_slice(&x[start..start + inside.len()]);
            } else {
                line[inside].iter_mut().enumerate().for_each(|(i, to)| *to = x[start + i * g.stride[1]]);
            }
        });
    }
}

/// Adds the columns of one group of one sample to where they came from: `x` `+=`; columns that came from nowhere may be set to 0.
fn from_columns<R: Real>(g: &Conv2dGeometry, s: &Sizes, columns: &mut [R], x: &mut [R]) {
    let (plane, [kh, kw]) = (g.input[0] * g.input[1], g.kernel);
    for (tap, line) in columns.chunks_exact_mut(s.positions).enumerate() {
        let (c, ky, kx) = (tap / (kh * kw), tap / kw % kh, tap % kw);
        let x = &mut x[c * plane..(c + 1) * plane];
        if let Some([positions, places]) = shifted(g, s.output_sides, [ky, kx]) {
            clear_edges(g, kx, line);
            vectorize(
                #[inline(always)]
                || x[places].iter_mut().zip(&line[positions]).for_each(|(x, &c)| *x += c),
            );
            continue;
        }
        tap_rows(g, s.output_sides, [ky, kx], |oy, iy, inside| {
            let (Some(iy), false) = (iy, inside.is_empty()) else { return };
            let line = &line[oy * s.output_sides[1]..][inside.clone()];
            let start = iy * g.input[1] + inside.start * g.stride[1] + kx - g.padding[1];
            if g.stride[1] == 1 {
                x[start..start + line.len()].iter_mut().zip(line).for_each(|(x, &c)| *x += c);
            } else {
                line.iter().enumerate().for_each(|(i, &c)| x[start + i * g.stride[1]] += c);
            }
        });
    }
}

/// The columns of a group: written to `scratch`, or the input itself.
fn columns<'v, R: Real>(g: &Conv2dGeometry, s: &Sizes, x: &'v [R], scratch: &'v mut [R]) -> Result<ArrayView2<'v, R>> {
    if s.columns == 0 {
        return matrix(x, s.taps, s.positions, "conv2d input");
    }
    let columns = &mut scratch[..s.columns];
    to_columns(g, s, x, columns);
    matrix(columns, s.taps, s.positions, "conv2d columns")
}

/// Does pieces of work, each with `each` values of `scratch` that a thread keeps from one piece to the next: they stay in its cache.
fn share_out<R: Real, T>(
    pieces: impl Iterator<Item = T> + Send,
    scratch: &mut [R],
    each: usize,
    work: impl Fn(T, &mut [R]) -> Result<()> + Sync,
) -> Result<()> {
    let pieces = Mutex::new(pieces);
    let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
    let thread = |scratch: &mut [R]| {
        while let Some(piece) = next() {
            work(piece, scratch)?;
        }
        Ok(())
    };
    match each {
        0 => (0..rayon::current_num_threads()).into_par_iter().try_for_each(|_| thread(&mut [])),
        each => scratch.par_chunks_exact_mut(each).try_for_each(thread),
    }
}

/// What of a backward is done in fewer multiplications: the gradient of the weights, and that of the input. Columns serve the rest.
struct Ways {
    weights: Option<Winograd>,
    input: Option<Winograd>,
}

impl Ways {
    fn of(g: &Conv2dGeometry) -> Self {
        let forward = Winograd::of(g);
        Ways { weights: forward.filter(Winograd::serves_weights), input: forward.map(|forward| forward.of_gradient()) }
    }

    /// Values of memory that each thread has.
    fn room(&self, s: &Sizes) -> usize {
        let weights = self.weights.as_ref().map_or(s.columns, Winograd::gradient_room);
        weights.max(self.input.as_ref().map_or(s.columns, Winograd::room))
    }
}

impl<R: Real> Conv for Cpu<R> {
    fn conv2d_workspace(g: &Conv2dGeometry, backward: bool) -> usize {
        let Ok(s) = sizes(g) else { return 0 };
        let threads = rayon::current_num_threads().clamp(1, s.parts.max(1));
        let weights = g.filters * s.taps;
        if backward {
            let ways = Ways::of(g);
            let kernels = ways.input.as_ref().map_or(0, Winograd::kernels);
            s.parts * (weights + g.filters) + weights + kernels + threads * ways.room(&s)
        } else if let Some(winograd) = Winograd::of(g) {
            weights + winograd.kernels() + threads * winograd.room()
        } else {
            threads * s.columns
        }
    }

    fn conv2d_forward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dForward, _: &StepContext) -> Result<()> {
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let g = &args.geometry;
        let s = sizes(g)?;
        let ranges = [args.x, args.y, args.workspace].map(|act| activations.range(act));
        let [x, y, workspace] = disjoint(&mut activations.values, ranges, "conv2d")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let bias = args.bias.map(|bias| &arena.parameters[arena.range(bias)]);
        let samples = x.chunks(s.part * s.input).zip(y.chunks_mut(s.part * s.output));
        if let Some(winograd) = Winograd::of(g) {
            let (memory, rest) = workspace.split_at_mut(weight.len());
            let (kernels, rooms) = rest.split_at_mut(winograd.kernels());
            winograd.kernels_of(weight, false, kernels, memory)?;
            let part = |(x, y): (&[R], &mut [R]), room: &mut [R]| winograd.convolve(kernels, bias, x, y, room);
            return share_out(samples, rooms, winograd.room(), part);
        }
        let part = |(x, y): (&[R], &mut [R]), scratch: &mut [R]| -> Result<()> {
            for (x, y) in x.chunks_exact(s.input).zip(y.chunks_exact_mut(s.output)) {
                let groups = x.chunks_exact(s.input / g.groups).zip(y.chunks_exact_mut(s.output / g.groups));
                for (group, (x, y)) in groups.enumerate() {
                    let columns = columns(g, &s, x, scratch)?;
                    let weight = &weight[group * s.group_filters * s.taps..][..s.group_filters * s.taps];
                    let weight = matrix(weight, s.group_filters, s.taps, "conv2d weight")?;
                    product_here(matrix_mut(y, s.group_filters, s.positions, "conv2d")?, weight, columns, false);
                }
                if let Some(bias) = bias {
                    vectorize(
                        #[inline(always)]
                        || {
                            for (y, &b) in y.chunks_exact_mut(s.positions).zip(bias) {
                                y.iter_mut().for_each(|y| *y += b);
                            }
                        },
                    );
                }
            }
            Ok(())
        };
        share_out(samples, workspace, s.columns, part)
    }

    fn conv2d_backward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dBackward, step: &StepContext) -> Result<()> {
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let g = &args.geometry;
        let s = sizes(g)?;
        let ways = Ways::of(g);
        let dx_range = args.dx.map_or(0..0, |dx| activations.range(dx));
        let [x, dy, work] = [args.x, args.dy, args.workspace].map(|act| activations.range(act));
        let [x, dy, workspace, dx] = disjoint(&mut activations.values, [x, dy, work, dx_range], "conv2d")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let (dweights, rest) = workspace.split_at_mut(s.parts * weight.len());
        let (dbiases, rest) = rest.split_at_mut(s.parts * g.filters);
        let (total, rest) = rest.split_at_mut(weight.len());
        let (kernels, rooms) = rest.split_at_mut(ways.input.as_ref().map_or(0, Winograd::kernels));
        if let (Some(winograd), Some(_)) = (&ways.input, args.dx) {
            winograd.kernels_of(weight, true, kernels, total)?;
        }
        let kernels = &*kernels;
        // By columns, a sample at a time: the gradient of weights on its side, `[taps, filters]` of each group. Of the two factors, which
        // both lie along the sum, the smaller one is rearranged for it.
        let dweight_by_columns =
            |x: &[R], dy: &[R], dweight: &mut [R], scratch: &mut [R], accumulate: bool| -> Result<()> {
                let groups = x.chunks_exact(s.input / g.groups).zip(dy.chunks_exact(s.output / g.groups));
                for ((x, dy), dweight) in groups.zip(dweight.chunks_exact_mut(s.group_filters * s.taps)) {
                    let dy = matrix(dy, s.group_filters, s.positions, "conv2d gradient")?;
                    let columns = columns(g, &s, x, scratch)?;
                    let dweight = matrix_mut(dweight, s.taps, s.group_filters, "conv2d weight gradient")?;
                    product_here(dweight, columns, dy.t(), accumulate);
                }
                Ok(())
            };
        let dx_by_columns = |dy: &[R], dx: &mut [R], scratch: &mut [R]| -> Result<()> {
            let groups = dy.chunks_exact(s.output / g.groups).zip(dx.chunks_exact_mut(s.input / g.groups));
            for ((dy, dx), weight) in groups.zip(weight.chunks_exact(s.group_filters * s.taps)) {
                let dy = matrix(dy, s.group_filters, s.positions, "conv2d gradient")?;
                let weight = matrix(weight, s.group_filters, s.taps, "conv2d weight")?;
                if s.columns == 0 {
                    product_here(matrix_mut(dx, s.taps, s.positions, "conv2d")?, weight.t(), dy, false);
                } else {
                    let dcolumns = &mut scratch[..s.columns];
                    product_here(matrix_mut(dcolumns, s.taps, s.positions, "conv2d columns")?, weight.t(), dy, false);
                    dx.fill(R::zero());
                    from_columns(g, &s, dcolumns, dx);
                }
            }
            Ok(())
        };
        let part = |((x, dy), (dweight, dbias)): Part<'_, R>, mut dx: Option<&mut [R]>, room: &mut [R]| -> Result<()> {
            if let Some(winograd) = &ways.weights {
                winograd.weight_gradient(x, dy, dweight, room)?;
            }
            if let (Some(winograd), Some(dx)) = (&ways.input, &mut dx) {
                winograd.convolve(kernels, None, dy, dx, room)?;
            }
            for (sample, (x, dy)) in x.chunks_exact(s.input).zip(dy.chunks_exact(s.output)).enumerate() {
                if ways.weights.is_none() {
                    dweight_by_columns(x, dy, dweight, room, sample > 0)?;
                }
                if let (None, Some(dx)) = (&ways.input, &mut dx) {
                    dx_by_columns(dy, &mut dx[sample * s.input..(sample + 1) * s.input], room)?;
                }
                if args.dbias.is_some() {
                    add_bias_gradient(dbias, dy, &s, sample > 0);
                }
            }
            Ok(())
        };
        let inputs = x.chunks(s.part * s.input).zip(dy.chunks(s.part * s.output));
        let sums = dweights.chunks_exact_mut(weight.len()).zip(dbiases.chunks_exact_mut(g.filters));
        let inputs = inputs.zip(sums);
        let each = ways.room(&s);
        if args.dx.is_some() {
            let pieces = inputs.zip(dx.chunks_mut(s.part * s.input));
            share_out(pieces, rooms, each, |(inputs, dx), room| part(inputs, Some(dx), room))?;
        } else {
            share_out(inputs, rooms, each, |inputs, room| part(inputs, None, room))?;
        }
        sum_rows(total, dweights, false);
        let range = arena.gradient_range(args.dweight.param);
        let gradient = &mut arena.gradients[range];
        // As `[taps, filters]` of each group, or `[9, filters and channels]`.
        let [rows, columns] = match ways.weights {
            Some(_) => [9, weight.len() / 9],
            None => [s.taps, s.group_filters],
        };
        for (gradient, total) in gradient.chunks_exact_mut(rows * columns).zip(total.chunks_exact(rows * columns)) {
            let gradient = matrix_mut(gradient, columns, rows, "conv2d weight gradient")?;
            let total = matrix(total, rows, columns, "conv2d weight gradient")?;
            transpose(gradient, total, !step.overwrites(args.dweight));
        }
        if let Some(dbias) = args.dbias {
            let range = arena.gradient_range(dbias.param);
            sum_rows(&mut arena.gradients[range], dbiases, !step.overwrites(dbias));
        }
        Ok(())
    }
}

/// Some samples' x and dy, and where their sums of the gradients of weights and of biases go.
type Part<'v, R> = ((&'v [R], &'v [R]), (&'v mut [R], &'v mut [R]));

/// `gradient[f] = sum of dy over the positions of a sample`, `+=` with `accumulate`.
fn add_bias_gradient<R: Real>(gradient: &mut [R], dy: &[R], s: &Sizes, accumulate: bool) {
    vectorize(
        #[inline(always)]
        || {
            for (gradient, plane) in gradient.iter_mut().zip(dy.chunks_exact(s.positions)) {
                let total = sum_of(
                    plane,
                    #[inline(always)]
                    |x| x,
                );
                *gradient = if accumulate { *gradient + total } else { total };
            }
        },
    );
}
