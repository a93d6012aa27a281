use crate::backend::op::{Operand, Use, op};
use crate::backend::{Act, Backend, Grad, Memory, Param, State, StepContext};
use crate::error::Result;

/// Batch normalization (Ioffe and Szegedy 2015), as `torch.nn.BatchNorm1d` and `BatchNorm2d`.
pub trait BatchNorm: Sized {
    /// Normalizes by the batch's statistics and moves the running ones.
    fn batch_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Normalizes by the running statistics.
    fn batch_norm_inference(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormInference,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Gradients of [`BatchNormForward`].
    fn batch_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BatchNormBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
}

/// Layer normalization (Ba et al. 2016) and its form without mean (RMS norm, Zhang and Sennrich 2019).
pub trait LayerNorm: Sized {
    /// `y = (x - mean) / sqrt(variance + epsilon) * weight + bias`, row by row, of a sum where one is asked for.
    fn layer_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &LayerNormForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Gradients of [`LayerNormForward`].
    fn layer_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &LayerNormBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// `y = x / sqrt(mean of x^2 + epsilon) * weight`, row by row, of a sum where one is asked for.
    fn rms_norm_forward(&self, memory: &mut Memory<'_, Self>, args: &RmsNormForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// Gradients of [`RmsNormForward`].
    fn rms_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &RmsNormBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
}

/// What a batch normalization does to its values before it writes them: `y = relu(normalized + residual)`, each where asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epilogue {
    /// `[batch, channels, spatial]`: added.
    pub residual: Option<Act>,
    /// Whether what is below 0 becomes 0, after the sum.
    pub relu: bool,
}

impl Epilogue {
    /// Additions and comparisons of each value.
    fn flops(&self) -> usize {
        usize::from(self.residual.is_some()) + usize::from(self.relu)
    }
}

impl Operand for Epilogue {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.residual.uses(visit);
    }
}

/// ReLU behind a batch normalization, whose slope the normalization's backward takes as it reads `dy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rectified {
    /// `[batch, channels, spatial]`: what ReLU was given, or what it gave, above 0 where the slope is 1. Without it, ReLU was given
    /// what the normalization makes of x, which its backward computes once more, to the same bits.
    pub output: Option<Act>,
    /// `[batch, channels, spatial]`: the gradient of what ReLU was given, `=`, where others need it too.
    pub gradient: Option<Act>,
}

impl Operand for Rectified {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.output.uses(visit);
        self.gradient.uses(visit);
    }
}

op! {
    /// Batch normalization in training. The variance that normalizes divides by n, the running one by n - 1.
    BatchNormForward => batch_norm_forward {
        /// `[batch, channels, spatial]`.
        x: Act,
        /// `[channels]`.
        weight: Param,
        /// `[channels]`.
        bias: Param,
        /// `[channels]`: `running = (1 - momentum) running + momentum batch`.
        running_mean: State,
        /// `[channels]`, likewise.
        running_var: State,
        /// `[batch, channels, spatial]`, `=`.
        y: Act,
        /// What follows before y is written.
        epilogue: Epilogue,
        /// `[channels]`: the batch's mean, `=`.
        mean: Act,
        /// `[channels]`: `1 / sqrt(variance + epsilon)`, `=`.
        reciprocal_std: Act,
        /// Samples.
        batch: usize,
        /// Channels.
        channels: usize,
        /// Positions a channel (height times width; 1 after a linear layer).
        spatial: usize,
        /// Added to the variance.
        epsilon: f64,
        /// Share of the batch in the running statistics.
        momentum: f64,
    }
    flops(a) (8 + a.epilogue.flops()) * a.batch * a.channels * a.spatial
}

op! {
    /// Batch normalization by running statistics.
    BatchNormInference => batch_norm_inference {
        /// `[batch, channels, spatial]`.
        x: Act,
        /// `[channels]`.
        weight: Param,
        /// `[channels]`.
        bias: Param,
        /// `[channels]`.
        running_mean: State,
        /// `[channels]`.
        running_var: State,
        /// `[batch, channels, spatial]`, `=`.
        y: Act,
        /// What follows before y is written.
        epilogue: Epilogue,
        /// Samples.
        batch: usize,
        /// Channels.
        channels: usize,
        /// Positions a channel.
        spatial: usize,
        /// Added to the variance.
        epsilon: f64,
    }
    flops(a) (2 + a.epilogue.flops()) * a.batch * a.channels * a.spatial
}

op! {
    /// Gradients of [`BatchNormForward`].
    BatchNormBackward => batch_norm_backward {
        /// `[batch, channels, spatial]`.
        x: Act,
        /// `[batch, channels, spatial]`.
        dy: Act,
        /// ReLU between y and what `dy` is the gradient of, if there is one.
        rectified: Option<Rectified>,
        /// `[channels]`.
        weight: Param,
        /// `[channels]`.
        bias: Param,
        /// `[channels]`.
        mean: Act,
        /// `[channels]`.
        reciprocal_std: Act,
        /// `[batch, channels, spatial]`, `=`.
        dx: Option<Act>,
        /// `[channels]`.
        dweight: Grad,
        /// `[channels]`.
        dbias: Grad,
        /// Samples.
        batch: usize,
        /// Channels.
        channels: usize,
        /// Positions a channel.
        spatial: usize,
    }
    flops(a) (11 + usize::from(a.rectified.is_some())) * a.batch * a.channels * a.spatial
}

/// A sum that a normalization takes as it reads, so that it need not be read again: what is normalized is `x + other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowSum {
    /// `[rows, width]`.
    pub other: Act,
    /// `[rows, width]`: `x + other`, `=`.
    pub sum: Act,
}

impl Operand for RowSum {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.other.uses(visit);
        self.sum.uses(visit);
    }
}

op! {
    /// Layer normalization over the last dimension.
    LayerNormForward => layer_norm_forward {
        /// `[rows, width]`.
        x: Act,
        /// Taken first, where given.
        sum: Option<RowSum>,
        /// `[width]`.
        weight: Param,
        /// `[width]`.
        bias: Option<Param>,
        /// `[rows, width]`, `=`.
        y: Act,
        /// `[rows]`, `=`.
        mean: Act,
        /// `[rows]`: `1 / sqrt(variance + epsilon)`, `=`.
        reciprocal_std: Act,
        /// Number of rows.
        rows: usize,
        /// Width of a row.
        width: usize,
        /// Added to the variance.
        epsilon: f64,
    }
    flops(a) (8 + usize::from(a.sum.is_some())) * a.rows * a.width
}

op! {
    /// Gradients of [`LayerNormForward`].
    LayerNormBackward => layer_norm_backward {
        /// `[rows, width]`: what was normalized.
        x: Act,
        /// `[rows, width]`.
        dy: Act,
        /// `[width]`.
        weight: Param,
        /// `[rows]`.
        mean: Act,
        /// `[rows]`.
        reciprocal_std: Act,
        /// `[rows, width]`: added to dx, where given: what reaches x past the normalization.
        residual: Option<Act>,
        /// `[rows, width]`, `=`.
        dx: Option<Act>,
        /// `[width]`.
        dweight: Grad,
        /// `[width]`.
        dbias: Option<Grad>,
        /// Number of rows.
        rows: usize,
        /// Width of a row.
        width: usize,
    }
    flops(a) (13 + usize::from(a.residual.is_some())) * a.rows * a.width
}

op! {
    /// Root-mean-square normalization over the last dimension.
    RmsNormForward => rms_norm_forward {
        /// `[rows, width]`.
        x: Act,
        /// Taken first, where given.
        sum: Option<RowSum>,
        /// `[width]`.
        weight: Param,
        /// `[rows, width]`, `=`.
        y: Act,
        /// `[rows]`: `1 / sqrt(mean of x^2 + epsilon)`, `=`.
        reciprocal_rms: Act,
        /// Number of rows.
        rows: usize,
        /// Width of a row.
        width: usize,
        /// Added to the mean of squares.
        epsilon: f64,
    }
    flops(a) (4 + usize::from(a.sum.is_some())) * a.rows * a.width
}

op! {
    /// Gradients of [`RmsNormForward`].
    RmsNormBackward => rms_norm_backward {
        /// `[rows, width]`: what was normalized.
        x: Act,
        /// `[rows, width]`.
        dy: Act,
        /// `[width]`.
        weight: Param,
        /// `[rows]`.
        reciprocal_rms: Act,
        /// `[rows, width]`: added to dx, where given: what reaches x past the normalization.
        residual: Option<Act>,
        /// `[rows, width]`, `=`.
        dx: Option<Act>,
        /// `[width]`.
        dweight: Grad,
        /// Number of rows.
        rows: usize,
        /// Width of a row.
        width: usize,
    }
    flops(a) (9 + usize::from(a.residual.is_some())) * a.rows * a.width
}
