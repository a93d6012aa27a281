//! The affine map.

use ndarray::{ArrayView2, ArrayViewMut2};

use super::Cpu;
use super::activation::{add_and_apply, multiply_by_slope};
use super::parallel::{add_to_rows, sum_rows};
use super::product::product;
use crate::backend::ops::{Linear, LinearBackward, LinearForward};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::{Error, Result};
use crate::real::Real;

/// `values` as a matrix.
///
/// # Errors
/// Another number of elements.
pub(super) fn matrix<'v, R>(values: &'v [R], rows: usize, columns: usize, what: &str) -> Result<ArrayView2<'v, R>> {
    ArrayView2::from_shape((rows, columns), values).map_err(|_| wrong_size(what, rows, columns, values.len()))
}

/// `values` as a matrix that can be written.
///
/// # Errors
/// Another number of elements.
pub(super) fn matrix_mut<'v, R>(
    values: &'v mut [R],
    rows: usize,
    columns: usize,
    what: &str,
) -> Result<ArrayViewMut2<'v, R>> {
    let len = values.len();
    ArrayViewMut2::from_shape((rows, columns), values).map_err(|_| wrong_size(what, rows, columns, len))
}

fn wrong_size(what: &str, rows: usize, columns: usize, len: usize) -> Error {
    Error::shape(what, format!("[{rows}, {columns}]"), format!("{len} elements"))
}

impl<R: Real> Linear for Cpu<R> {
    fn linear_forward(&self, memory: &mut Memory<'_, Self>, args: &LinearForward, _: &StepContext) -> Result<()> {
        let LinearForward { rows, inputs, outputs, .. } = *args;
        let (arena, activations) = (&*memory.arena, &mut *memory.activations);
        let kept = args.activation.and_then(|activation| activation.kept);
        let kept_range = kept.map_or(0..0, |kept| activations.range(kept));
        let ranges = [activations.range(args.x), activations.range(args.y), kept_range];
        let [x, y, before] = disjoint(&mut activations.values, ranges, "linear")?;
        let weight = matrix(&arena.parameters[arena.range(args.weight)], outputs, inputs, "linear weight")?;
        let out = if kept.is_some() { &mut *before } else { &mut *y };
        product(
            matrix_mut(out, rows, outputs, "linear output")?,
            matrix(x, rows, inputs, "linear input")?,
            weight.t(),
            false,
        );
        let bias = args.bias.map(|bias| &arena.parameters[arena.range(bias)]);
        match (args.activation, bias) {
            (Some(activation), bias) => {
                add_and_apply(activation.kind, y, kept.is_some().then_some(before), bias, outputs);
            }
            (None, Some(bias)) => add_to_rows(y, bias),
            (None, None) => {}
        }
        Ok(())
    }

    fn linear_backward(&self, memory: &mut Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()> {
        let LinearBackward { rows, inputs, outputs, .. } = *args;
        let (arena, activations) = (&mut *memory.arena, &mut *memory.activations);
        let dx_range = args.dx.map_or(0..0, |dx| activations.range(dx));
        // The slope may be that of x itself.
        let of = args.slope.map(|slope| slope.of).filter(|&of| of != args.x);
        let of_range = of.map_or(0..0, |of| activations.range(of));
        let ranges = [activations.range(args.x), activations.range(args.dy), dx_range, of_range];
        let [x, dy, dx, before] = disjoint(&mut activations.values, ranges, "linear")?;
        let (x, before) = (&*x, &*before);
        if let Some(dbias) = args.dbias {
            let range = arena.gradient_range(dbias.param);
            sum_rows(&mut arena.gradients[range], dy, !step.overwrites(dbias));
        }
        let dy = matrix(dy, rows, outputs, "linear gradient")?;
        let range = arena.gradient_range(args.dweight.param);
        product(
            matrix_mut(&mut arena.gradients[range], outputs, inputs, "linear weight gradient")?,
            dy.t(),
            matrix(x, rows, inputs, "linear input")?,
            !step.overwrites(args.dweight),
        );
        if args.dx.is_some() {
            let weight = matrix(&arena.parameters[arena.range(args.weight)], outputs, inputs, "linear weight")?;
            product(matrix_mut(dx, rows, inputs, "linear input gradient")?, dy, weight, false);
            if let Some(slope) = args.slope {
                multiply_by_slope(slope.kind, dx, if of.is_some() { before } else { x });
            }
        }
        Ok(())
    }
}
