use super::attention::Padding;
use crate::backend::op::op;
use crate::backend::{Act, Backend, Memory, StepContext};
use crate::error::Result;

/// Dropout (Srivastava et al. 2014), scaled in training.
pub trait Dropout: Sized {
    /// `y = 0` with probability p, `x / (1 - p)` otherwise. The backward is the same with dy in place of x.
    fn dropout(&self, memory: &mut Memory<'_, Self>, args: &DropoutApply, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

/// Sums, joins and means.
pub trait Elementwise: Sized {
    /// `y = a + b`.
    fn add(&self, memory: &mut Memory<'_, Self>, args: &Add, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// Puts rows side by side.
    fn concatenate(&self, memory: &mut Memory<'_, Self>, args: &Concatenate, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// Takes rows apart again.
    fn split(&self, memory: &mut Memory<'_, Self>, args: &Split, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// The mean over the positions of a sample.
    fn mean_time_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanTimeForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Gradient of [`MeanTimeForward`].
    fn mean_time_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanTimeBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
}

op! {
    /// Dropout. The word that decides on element i of micro-batch m stands in the layer's stream of
    /// [`Purpose::Dropout`](crate::random::Purpose::Dropout) at position `m 2^40 + i`: the element is kept when the
    /// word's upper 24 bits, as a value in `[0, 1)`, are p or more.
    DropoutApply => dropout {
        /// `[len]`.
        x: Act,
        /// `[len]`, `=`.
        y: Act,
        /// Probability of a 0, in `[0, 1)`.
        probability: f64,
        /// The layer's own stream.
        stream: u32,
        /// Number of values.
        len: usize,
    }
    flops(a) a.len
}

op! {
    /// `y = a + b`.
    Add => add {
        /// `[len]`.
        a: Act,
        /// `[len]`.
        b: Act,
        /// `[len]`, `=`.
        y: Act,
        /// Number of values.
        len: usize,
    }
    flops(a) a.len
}

op! {
    /// `y[row] = [parts[0][row], parts[1][row], ..]`.
    Concatenate => concatenate {
        /// `[rows, widths[i]]` each.
        parts: Vec<Act>,
        /// Width of each part.
        widths: Vec<usize>,
        /// `[rows, sum of widths]`, `=`.
        y: Act,
        /// Number of rows.
        rows: usize,
    }
    flops(_a) 0
}

op! {
    /// The inverse of [`Concatenate`].
    Split => split {
        /// `[rows, sum of widths]`.
        x: Act,
        /// `[rows, widths[i]]` each, `=`.
        parts: Vec<Act>,
        /// Width of each part.
        widths: Vec<usize>,
        /// Number of rows.
        rows: usize,
    }
    flops(_a) 0
}

op! {
    /// The mean over the positions of a sample that are not padding; 0 where all are.
    MeanTimeForward => mean_time_forward {
        /// `[batch, time, width]`.
        x: Act,
        /// `[batch, width]`, `=`.
        y: Act,
        /// Samples.
        batch: usize,
        /// Positions a sample.
        time: usize,
        /// Width of a position.
        width: usize,
        /// Positions that are not counted.
        padding: Option<Padding>,
    }
    flops(a) a.batch * a.time * a.width
}

op! {
    /// Gradient of [`MeanTimeForward`].
    MeanTimeBackward => mean_time_backward {
        /// `[batch, width]`.
        dy: Act,
        /// `[batch, time, width]`, `=`.
        dx: Act,
        /// Samples.
        batch: usize,
        /// Positions a sample.
        time: usize,
        /// Width of a position.
        width: usize,
        /// Positions that are not counted.
        padding: Option<Padding>,
    }
    flops(a) a.batch * a.time * a.width
}
