use crate::backend::op::{op, plain_operand};
use crate::backend::{Act, Backend, Memory, StepContext};
use crate::error::Result;

/// Functions of single values, and the gated form of two halves.
pub trait Activation: Sized {
    /// `y = f(x)`.
    fn activation_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// `dx = dy f'(x)`.
    fn activation_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// `y = silu(first half of x) * second half of x`, row by row.
    fn swiglu_forward(&self, memory: &mut Memory<'_, Self>, args: &SwigluForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// Gradient of [`SwigluForward`].
    fn swiglu_backward(&self, memory: &mut Memory<'_, Self>, args: &SwigluBackward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationKind {
    /// `max(x, 0)`; its derivative at 0 is 0.
    Relu,
    /// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016).
    GeluTanh,
    /// `x / 2 (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `x / (1 + e^-x)`.
    Silu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// The hyperbolic tangent.
    Tanh,
}

impl ActivationKind {
    /// All of them.
    pub const ALL: [ActivationKind; 6] = [
        ActivationKind::Relu,
        ActivationKind::Gelu,
        ActivationKind::GeluTanh,
        ActivationKind::Silu,
        ActivationKind::Sigmoid,
        ActivationKind::Tanh,
    ];

    /// The name that run files and layers have for it.
    pub const fn name(self) -> &'static str {
        match self {
            ActivationKind::Relu => "relu",
            ActivationKind::Gelu => "gelu",
            ActivationKind::GeluTanh => "gelu_tanh",
            ActivationKind::Silu => "silu",
            ActivationKind::Sigmoid => "sigmoid",
            ActivationKind::Tanh => "tanh",
        }
    }
}

plain_operand!(ActivationKind);

op! {
    /// `y = f(x)`.
    ActivationForward => activation_forward {
        /// `[len]`.
        x: Act,
        /// `[len]`, `=`.
        y: Act,
        /// The function.
        kind: ActivationKind,
        /// Number of values.
        len: usize,
    }
    flops(a) a.len
}

op! {
    /// `dx = dy f'(x)`.
    ActivationBackward => activation_backward {
        /// `[len]`: what the forward was given.
        x: Act,
        /// `[len]`.
        dy: Act,
        /// `[len]`, `=`.
        dx: Act,
        /// The function.
        kind: ActivationKind,
        /// Number of values.
        len: usize,
    }
    flops(a) a.len
}

op! {
    /// SwiGLU (Shazeer 2020).
    SwigluForward => swiglu_forward {
        /// `[rows, 2 width]`.
        x: Act,
        /// `[rows, width]`, `=`.
        y: Act,
        /// Number of rows.
        rows: usize,
        /// Width of a half.
        width: usize,
    }
    flops(a) 4 * a.rows * a.width
}

op! {
    /// Gradient of [`SwigluForward`].
    SwigluBackward => swiglu_backward {
        /// `[rows, 2 width]`.
        x: Act,
        /// `[rows, width]`.
        dy: Act,
        /// `[rows, 2 width]`, `=`.
        dx: Act,
        /// Number of rows.
        rows: usize,
        /// Width of a half.
        width: usize,
    }
    flops(a) 10 * a.rows * a.width
}
