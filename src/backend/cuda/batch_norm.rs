//! Batch normalization (kernels/batch_norm.cu).

use super::channel::Channels;
use super::launch::args;
use super::{Cuda, Storage};
use crate::backend::ops::{BatchNorm, BatchNormBackward, BatchNormForward, BatchNormInference, Rectified};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

const FILE: &str = "batch_norm";
/// Bytes of `Moments` and of `Slopes` in the kernels.
const MOMENTS: usize = 12;
const SLOPES: usize = 8;
/// `Rectified` as the kernels number it.
const NONE: i32 = 0;
const OF_NORMALIZED: i32 = 1;
const OF_OUTPUT: i32 = 2;

/// Bytes of the moments of every part.
pub(super) fn forward_scratch(args: &BatchNormForward) -> Result<usize> {
    let channels = Channels::new("batch_norm", [args.batch, args.channels, args.spatial])?;
    Ok(MOMENTS * args.channels * channels.parts)
}

/// Bytes of the slopes of every part.
pub(super) fn backward_scratch(args: &BatchNormBackward) -> Result<usize> {
    let channels = Channels::new("batch_norm", [args.batch, args.channels, args.spatial])?;
    Ok(SLOPES * args.channels * channels.parts)
}

impl<S: Storage> BatchNorm for Cuda<S> {
    fn batch_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormForward,
        _: &StepContext,
    ) -> Result<()> {
        let channels = Channels::new("batch_norm", [args.batch, args.channels, args.spatial])?;
        let [x, y, mean, std] = [args.x, args.y, args.mean, args.reciprocal_std].map(|act| Self::act(memory, act));
        let [weight, bias] = [args.weight, args.bias].map(|param| Self::param(memory, param));
        let [running_mean, running_var] = [args.running_mean, args.running_var].map(|s| Self::state(memory, s));
        let residual = Self::act_or_null(memory, args.epilogue.residual);
        let (epsilon, momentum, relu) = (args.epsilon as f32, args.momentum as f32, args.epilogue.relu);
        let scratch = self.device().scratch(forward_scratch(args)?)?;
        let partial = scratch.address();
        let statistics = args![x, partial, channels.shape];
        let normalize = args![
            x,
            partial,
            weight,
            bias,
            residual,
            y,
            mean,
            std,
            running_mean,
            running_var,
            channels.shape,
            epsilon,
            momentum,
            relu
        ];
        let [first, second] =
            ["batch_norm_statistics", "batch_norm_normalize"].map(|k| channels.kernel(k, size_of::<S>()));
        // SAFETY: x, y and the residual, if there is one, hold the values that the shape says, scratch the moments of every part, and the others a value a
        // channel, as the operation says.
        unsafe {
            self.launch(FILE, &first, channels.grid(), statistics)?;
            self.launch(FILE, &second, channels.grid(), normalize)
        }
    }

    fn batch_norm_inference(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormInference,
        _: &StepContext,
    ) -> Result<()> {
        let channels = Channels::new("batch_norm", [args.batch, args.channels, args.spatial])?;
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let [weight, bias] = [args.weight, args.bias].map(|param| Self::param(memory, param));
        let [mean, variance] = [args.running_mean, args.running_var].map(|state| Self::state(memory, state));
        let (residual, relu) = (Self::act_or_null(memory, args.epilogue.residual), args.epilogue.relu);
        let list = args![x, weight, bias, mean, variance, residual, y, channels.shape, args.epsilon as f32, relu];
        let kernel = channels.kernel("batch_norm_inference", size_of::<S>());
        // SAFETY: as in the forward.
        unsafe { self.launch(FILE, &kernel, channels.grid(), list) }
    }

    fn batch_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormBackward,
        step: &StepContext,
    ) -> Result<()> {
        let channels = Channels::new("batch_norm", [args.batch, args.channels, args.spatial])?;
        let [x, dy, mean, std] = [args.x, args.dy, args.mean, args.reciprocal_std].map(|act| Self::act(memory, act));
        let [weight, bias] = [args.weight, args.bias].map(|param| Self::param(memory, param));
        let [given, written] = args.rectified.map_or([None; 2], |relu| [relu.output, relu.gradient]);
        let [output, gradient, dx] = [given, written, args.dx].map(|act| Self::act_or_null(memory, act));
        let rectified = match args.rectified {
            None => NONE,
            Some(Rectified { output: None, .. }) => OF_NORMALIZED,
            Some(_) => OF_OUTPUT,
        };
        let [dweight, dbias] = [args.dweight, args.dbias].map(|grad| Self::grad(memory, grad));
        let [add_weight, add_bias] = [args.dweight, args.dbias].map(|grad| !step.overwrites(grad));
        let parts = channels.parts as u32;
        let scratch = self.device().scratch(backward_scratch(args)?)?;
        let partial = scratch.address();
        let slopes = args![x, dy, output, mean, std, weight, bias, gradient, partial, channels.shape, rectified];
        // What the first launch wrote needs no slope any more.
        let (dy, rectified) = if written.is_some() { (gradient, NONE) } else { (dy, rectified) };
        let backward = args![
            x,
            dy,
            output,
            mean,
            std,
            partial,
            weight,
            bias,
            dx,
            dweight,
            dbias,
            channels.shape,
            parts,
            rectified,
            add_weight,
            add_bias
        ];
        let [first, second] = ["batch_norm_slopes", "batch_norm_backward"].map(|k| channels.kernel(k, size_of::<S>()));
        let grid = if args.dx.is_some() { channels.grid() } else { channels.grid_of_one_part() };
        // SAFETY: as in the forward; so do ReLU's output and the gradient behind it, where they are not null; gradients of parameters
        // hold a value a channel, scratch the slopes of every part.
        unsafe {
            self.launch(FILE, &first, channels.grid(), slopes)?;
            self.launch(FILE, &second, grid, backward)
        }
    }
}
