//! Convolution: the way that each product of one is done, and the batch shared out among threads.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::Cpu;
use super::columns::Columns;
use super::joint::Joint;
use super::linear::{matrix, matrix_mut};
use super::parallel::{sum_of, sum_rows, vectorize};
use super::transpose::transpose;
use super::winograd::Winograd;
use crate::backend::ops::{Conv, Conv2dBackward, Conv2dForward, Conv2dGeometry};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

/// Parts that a batch is cut into, whatever the number of threads: each has its own sums of weight and bias gradients, which are
/// added in order.
const PARTS: usize = 16;

/// How a batch is cut.
struct Parts {
    /// Samples of a part, and how many parts there are.
    samples: usize,
    count: usize,
}

impl Parts {
    fn of(g: &Conv2dGeometry) -> Self {
        let samples = g.batch.div_ceil(PARTS).max(1);
        Parts { samples, count: g.batch.div_ceil(samples) }
    }

    /// The values of each part: as many of each sample, or none at all.
    fn of_samples<'v, R>(&self, values: &'v mut [R], batch: usize) -> Vec<&'v mut [R]> {
        self.cut(values, self.samples * values.len().checked_div(batch).unwrap_or(0))
    }

    /// As many for each part, or none.
    fn cut<'v, R>(&self, values: &'v mut [R], each: usize) -> Vec<&'v mut [R]> {
        match each {
            0 => (0..self.count).map(|_| Default::default()).collect(),
            each => values.chunks_mut(each).collect(),
        }
    }
}

/// Does pieces of work, each with `each` values of `scratch` that a thread keeps from one piece to the next: they stay in its cache.
fn share_out<R: Real, T: Send>(
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

/// How a product of a convolution is done.
enum Way<'g> {
    /// A sample at a time, of the columns of its windows.
    Columns(Columns<'g>),
    /// A sample at a time, in fewer multiplications.
    Winograd(Winograd),
    /// Several samples at a time.
    Joint(Joint<'g>),
}

impl<'g> Way<'g> {
    fn of(g: &'g Conv2dGeometry, winograd: Option<Winograd>, joint: Option<Joint<'g>>) -> Result<Self> {
        Ok(match (winograd, joint) {
            (Some(winograd), _) => Way::Winograd(winograd),
            (None, Some(joint)) => Way::Joint(joint),
            (None, None) => Way::Columns(Columns::of(g)?),
        })
    }

    fn of_forward(g: &'g Conv2dGeometry) -> Result<Self> {
        Self::of(g, Winograd::of(g), Joint::of(g)?)
    }

    /// Values that all kernels become.
    fn kernels(&self) -> usize {
        if let Way::Winograd(winograd) = self { winograd.kernels() } else { 0 }
    }

    /// Values of memory that each thread has.
    fn room(&self) -> usize {
        match self {
            Way::Columns(columns) => columns.room(),
            Way::Winograd(winograd) => winograd.room(),
            Way::Joint(_) => 0,
        }
    }

    /// The same for the gradient of the weights.
    fn gradient_room(&self) -> usize {
        if let Way::Winograd(winograd) = self { winograd.gradient_room() } else { self.room() }
    }

    /// Values of memory that products of several samples take.
    fn joint_room(&self) -> usize {
        if let Way::Joint(joint) = self { joint.room() } else { 0 }
    }
}

/// How a backward is done: the gradient of the weights, and that of the input.
struct Ways<'g> {
    weights: Way<'g>,
    input: Way<'g>,
}

/// Where its workspace goes.
struct Layout {
    /// Sums of each part: of the weights' gradient, and of the biases'.
    weights: usize,
    biases: usize,
    /// The sum of the former, by way of which the kernels of the input's gradient are made.
    total: usize,
    kernels: usize,
    /// Of each thread.
    room: usize,
}

impl<'g> Ways<'g> {
    fn of(g: &'g Conv2dGeometry) -> Result<Self> {
        let forward = Winograd::of(g);
        Ok(Ways {
            weights: Way::of(g, forward.filter(Winograd::serves_weights), Joint::of_weights(g)?)?,
            input: Way::of(g, forward.map(|forward| forward.of_gradient()), Joint::of(g)?)?,
        })
    }

    fn layout(&self, g: &Conv2dGeometry) -> Layout {
        let in_parts = if matches!(self.weights, Way::Joint(_)) { 0 } else { g.weights() };
        let kernels = self.input.kernels();
        let (total, room) = (if kernels > 0 { g.weights() } else { in_parts }, self.weights.gradient_room());
        Layout { weights: in_parts, biases: g.filters, total, kernels, room: room.max(self.input.room()) }
    }
}

/// Values of workspace, for so many threads.
fn workspace(g: &Conv2dGeometry, backward: bool, threads: usize) -> Result<usize> {
    let parts = Parts::of(g).count;
    let threads = threads.clamp(1, parts.max(1));
    if !backward {
        let way = Way::of_forward(g)?;
        let weights = if way.kernels() > 0 { g.weights() } else { 0 };
        return Ok((weights + way.kernels() + threads * way.room()).max(way.joint_room()));
    }
    let ways = Ways::of(g)?;
    let of = ways.layout(g);
    let in_parts = parts * (of.weights + of.biases) + of.total + of.kernels + threads * of.room;
    Ok(in_parts.max(ways.weights.joint_room()).max(ways.input.joint_room()))
}

impl<R: Real> Conv for Cpu<R> {
    fn conv2d_workspace(g: &Conv2dGeometry, backward: bool) -> usize {
        workspace(g, backward, rayon::current_num_threads()).unwrap_or_default()
    }

    fn conv2d_forward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dForward, _: &StepContext) -> Result<()> {
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let (g, parts) = (&args.geometry, Parts::of(&args.geometry));
        let ranges = [args.x, args.y, args.workspace].map(|act| activations.range(act));
        let [x, y, workspace] = disjoint(&mut activations.values, ranges, "conv2d")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let bias = args.bias.map(|bias| &arena.parameters[arena.range(bias)]);
        let [input, output] = [x.len(), y.len()].map(|len| parts.samples * len / g.batch.max(1));
        let samples = x.chunks(input.max(1)).zip(y.chunks_mut(output.max(1)));
        match Way::of_forward(g)? {
            Way::Joint(joint) => joint.forward(weight, bias, x, y, workspace),
            Way::Winograd(winograd) => {
                let (memory, rest) = workspace.split_at_mut(weight.len());
                let (kernels, rooms) = rest.split_at_mut(winograd.kernels());
                winograd.kernels_of(weight, false, kernels, memory)?;
                share_out(samples, rooms, winograd.room(), |(x, y), room| winograd.convolve(kernels, bias, x, y, room))
            }
            Way::Columns(columns) => share_out(samples, workspace, columns.room(), |(x, y), scratch| {
                columns.forward(weight, bias, x, y, scratch)
            }),
        }
    }

    fn conv2d_backward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dBackward, step: &StepContext) -> Result<()> {
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let (g, parts, ways) = (&args.geometry, Parts::of(&args.geometry), Ways::of(&args.geometry)?);
        let dx_range = args.dx.map_or(0..0, |dx| activations.range(dx));
        let [x, dy, work] = [args.x, args.dy, args.workspace].map(|act| activations.range(act));
        let [x, dy, workspace, dx] = disjoint(&mut activations.values, [x, dy, work, dx_range], "conv2d")?;
        let weight = &arena.parameters[arena.range(args.weight)];
        let range = arena.gradient_range(args.dweight.param);
        let (gradient, accumulate) = (&mut arena.gradients[range], !step.overwrites(args.dweight));
        if let Way::Joint(joint) = &ways.weights {
            joint.weight_gradient(x, dy, gradient, accumulate, workspace)?;
        }
        if let (Way::Joint(joint), Some(_)) = (&ways.input, args.dx) {
            joint.input_gradient(weight, dy, dx, workspace)?;
        }

        let of = ways.layout(g);
        let (dweights, rest) = workspace.split_at_mut(parts.count * of.weights);
        let (dbiases, rest) = rest.split_at_mut(parts.count * of.biases);
        let (total, rest) = rest.split_at_mut(of.total);
        let (kernels, rooms) = rest.split_at_mut(of.kernels);
        if let (Way::Winograd(winograd), Some(_)) = (&ways.input, args.dx) {
            winograd.kernels_of(weight, true, kernels, total)?;
        }
        let kernels = &*kernels;
        let positions = dy.len() / (g.batch * g.filters).max(1);
        let part = |Part { x, dy, dweight, dbias, dx }: Part<'_, R>, room: &mut [R]| -> Result<()> {
            match &ways.weights {
                Way::Columns(columns) => columns.weight_gradient(x, dy, dweight, room)?,
                Way::Winograd(winograd) => winograd.weight_gradient(x, dy, dweight, room)?,
                Way::Joint(_) => {}
            }
            match &ways.input {
                _ if dx.is_empty() => {}
                Way::Columns(columns) => columns.input_gradient(weight, dy, dx, room)?,
                Way::Winograd(winograd) => winograd.convolve(kernels, None, dy, dx, room)?,
                Way::Joint(_) => {}
            }
            if args.dbias.is_some() {
                bias_gradient(positions, dy, dbias);
            }
            Ok(())
        };
        let [input, output] = [x.len(), dy.len()].map(|len| (parts.samples * len / g.batch.max(1)).max(1));
        let inputs = x.chunks(input).zip(dy.chunks(output)).zip(parts.of_samples(dx, g.batch));
        let sums = parts.cut(dweights, of.weights).into_iter().zip(parts.cut(dbiases, of.biases));
        let pieces = inputs.zip(sums).map(|(((x, dy), dx), (dweight, dbias))| Part { x, dy, dweight, dbias, dx });
        share_out(pieces, rooms, of.room, part)?;
        // As `[taps, filters]` of each group, or `[9, filters and channels]`; or added to its place already.
        let in_parts = match &ways.weights {
            Way::Columns(columns) => Some(columns.weights()),
            Way::Winograd(_) => Some([9, weight.len() / 9]),
            Way::Joint(_) => None,
        };
        if let Some([rows, columns]) = in_parts {
            sum_rows(total, dweights, false);
            for (gradient, total) in gradient.chunks_exact_mut(rows * columns).zip(total.chunks_exact(rows * columns)) {
                let gradient = matrix_mut(gradient, columns, rows, "conv2d weight gradient")?;
                let total = matrix(total, rows, columns, "conv2d weight gradient")?;
                transpose(gradient, total, accumulate);
            }
        }
        if let Some(dbias) = args.dbias {
            let range = arena.gradient_range(dbias.param);
            sum_rows(&mut arena.gradients[range], dbiases, !step.overwrites(dbias));
        }
        Ok(())
    }
}

/// Some samples' x and dy, where their sums of the gradients of weights and of biases go, and the gradient of their x; what another way
/// sees to, or is not asked for, is empty.
struct Part<'v, R> {
    x: &'v [R],
    dy: &'v [R],
    dweight: &'v mut [R],
    dbias: &'v mut [R],
    dx: &'v mut [R],
}

/// `gradient[f] = sum of dy over samples and positions`, `=`.
fn bias_gradient<R: Real>(positions: usize, dy: &[R], gradient: &mut [R]) {
    gradient.fill(R::zero());
    vectorize(
        #[inline(always)]
        || {
            for dy in dy.chunks_exact(gradient.len() * positions) {
                for (gradient, plane) in gradient.iter_mut().zip(dy.chunks_exact(positions)) {
                    *gradient += sum_of(
                        plane,
                        #[inline(always)]
                        |x| x,
                    );
                }
            }
        },
    );
}
