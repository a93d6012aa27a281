use crate::backend::op::op;
use crate::backend::{Act, Backend, Grad, Memory, Param, StepContext};
use crate::error::Result;

/// The affine map of `torch.nn.Linear`.
pub trait Linear: Sized {
    /// `y = x W^T + b`.
    fn linear_forward(&self, memory: &mut Memory<'_, Self>, args: &LinearForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// `dx = dy W`, `dW = dy^T x`, `db = sum of dy over rows`.
    fn linear_backward(&self, memory: &mut Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

op! {
    /// `y = x W^T + b`.
    LinearForward => linear_forward {
        /// `[rows, inputs]`.
        x: Act,
        /// `[outputs, inputs]`.
        weight: Param,
        /// `[outputs]`.
        bias: Option<Param>,
        /// `[rows, outputs]`, `=`.
        y: Act,
        /// Number of rows.
        rows: usize,
        /// Width of x.
        inputs: usize,
        /// Width of y.
        outputs: usize,
    }
    flops(a) 2 * a.rows * a.inputs * a.outputs
}

op! {
    /// Gradients of [`LinearForward`].
    LinearBackward => linear_backward {
        /// `[rows, inputs]`.
        x: Act,
        /// `[rows, outputs]`.
        dy: Act,
        /// `[outputs, inputs]`.
        weight: Param,
        /// `[rows, inputs]`, `=`; none when nothing before this layer is trained.
        dx: Option<Act>,
        /// `[outputs, inputs]`.
        dweight: Grad,
        /// `[outputs]`.
        dbias: Option<Grad>,
        /// Number of rows.
        rows: usize,
        /// Width of x.
        inputs: usize,
        /// Width of y.
        outputs: usize,
    }
    flops(a) 2 * a.rows * a.inputs * a.outputs * (1 + usize::from(a.dx.is_some()))
}
