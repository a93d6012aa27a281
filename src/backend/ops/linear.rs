use super::ActivationKind;
use crate::backend::op::{Operand, op};
use crate::backend::{Act, Backend, Grad, Memory, Param, StepContext, Use};
use crate::error::Result;

/// The affine map of `torch.nn.Linear`.
pub trait Linear: Sized {
    /// `y = f(x W^T + b)`.
    fn linear_forward(&self, memory: &mut Memory<'_, Self>, args: &LinearForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// `dx = (dy W) f'(u)`, `dW = dy^T x`, `db = sum of dy over rows`.
    fn linear_backward(&self, memory: &mut Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

/// The function that is applied to what an affine map gives, in the same operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedActivation {
    /// The function f.
    pub kind: ActivationKind,
    /// `[rows, outputs]`, `=`: `x W^T + b`, which the backward of f is given; none where nothing reads it.
    pub kept: Option<Act>,
}

impl Operand for FusedActivation {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.kept.uses(visit);
    }
}

/// The slope of the function whose value an affine map was given, by which the gradient of its input is multiplied in the
/// same operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedSlope {
    /// The function f.
    pub kind: ActivationKind,
    /// u, `[rows, inputs]`: what f was given, or what it gave where that has the same slopes (`Relu`). It may be the x of the
    /// affine map.
    pub of: Act,
}

impl Operand for FusedSlope {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.of.uses(visit);
    }
}

op! {
    /// `y = f(x W^T + b)`, f the identity where no activation is given.
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
        /// f.
        activation: Option<FusedActivation>,
    }
    flops(a) 2 * a.rows * a.inputs * a.outputs + if a.activation.is_some() { a.rows * a.outputs } else { 0 }
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
        /// Turns dx into the gradient of what came before f; only with a dx.
        slope: Option<FusedSlope>,
    }
    flops(a) 2 * a.rows * a.inputs * a.outputs * (1 + usize::from(a.dx.is_some()))
        + if a.slope.is_some() { a.rows * a.inputs } else { 0 }
}
