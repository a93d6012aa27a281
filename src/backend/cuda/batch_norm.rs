//! Batch normalization (kernels/batch_norm.cu).

use super::channel::Channels;
use super::launch::args;
use super::{Cuda, Storage};
use crate::backend::ops::{BatchNorm, BatchNormBackward, BatchNormForward, BatchNormInference};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

const FILE: &str = "batch_norm";
/// Bytes of `Moments` and of `Slopes` in the kernels.
const MOMENTS: usize = 12;
const SLOPES: usize = 8;

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
        let (epsilon, momentum) = (args.epsilon as f32, args.momentum as f32);
        let partial = self.device().scratch(MOMENTS * args.channels * channels.parts)?;
        let statistics = args![x, partial, channels.shape];
        let normalize =
            args![x, partial, weight, bias, y, mean, std, running_mean, running_var, channels.shape, epsilon, momentum];
        let [first, second] =
            ["batch_norm_statistics", "batch_norm_normalize"].map(|k| channels.kernel(k, size_of::<S>()));
        // SAFETY: x and y hold the values that the shape says, scratch the moments of every part, and the others a value a
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
        let list = args![x, weight, bias, mean, variance, y, channels.shape, args.epsilon as f32];
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
        let (weight, dx) = (Self::param(memory, args.weight), Self::act_or_null(memory, args.dx));
        let [dweight, dbias] = [args.dweight, args.dbias].map(|grad| Self::grad(memory, grad));
        let [add_weight, add_bias] = [args.dweight, args.dbias].map(|grad| !step.overwrites(grad));
        let parts = channels.parts as u32;
        let partial = self.device().scratch(SLOPES * args.channels * channels.parts)?;
        let slopes = args![x, dy, mean, std, partial, channels.shape];
        let backward =
            args![x, dy, mean, std, partial, weight, dx, dweight, dbias, channels.shape, parts, add_weight, add_bias];
        let [first, second] = ["batch_norm_slopes", "batch_norm_backward"].map(|k| channels.kernel(k, size_of::<S>()));
        let grid = if args.dx.is_some() { channels.grid() } else { channels.grid_of_one_part() };
        // SAFETY: as in the forward; the gradients hold a value a channel, scratch the slopes of every part.
        unsafe {
            self.launch(FILE, &first, channels.grid(), slopes)?;
            self.launch(FILE, &second, grid, backward)
        }
    }
}
