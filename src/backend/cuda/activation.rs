//! Functions of single values, and SwiGLU (kernels/activation.cu).

use super::launch::{Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{
    Activation, ActivationBackward, ActivationForward, ActivationKind, SwigluBackward, SwigluForward,
};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

const FILE: &str = "activation";

/// As the kernels number them.
pub(super) fn number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Relu => 0,
        ActivationKind::GeluTanh => 1,
        ActivationKind::Gelu => 2,
        ActivationKind::Silu => 3,
        ActivationKind::Sigmoid => 4,
        ActivationKind::Tanh => 5,
    }
}

impl<S: Storage> Activation for Cuda<S> {
    fn activation_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationForward,
        _: &StepContext,
    ) -> Result<()> {
        self.apply(args.kind, Self::act(memory, args.x), Self::act(memory, args.y), args.len)
    }

    fn activation_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationBackward,
        _: &StepContext,
    ) -> Result<()> {
        let [x, dy, dx] = [args.x, args.dy, args.dx].map(|act| Self::act(memory, act));
        self.apply_slope(args.kind, x, dy, dx, args.len)
    }

    fn swiglu_forward(&self, memory: &mut Memory<'_, Self>, args: &SwigluForward, _: &StepContext) -> Result<()> {
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let grid = Grid::elements(self.device(), args.rows * args.width, 1);
        // SAFETY: x holds `rows * 2 * width` values, y half as many.
        unsafe { self.launch(FILE, "swiglu", grid, args![x, y, args.rows, args.width]) }
    }

    fn swiglu_backward(&self, memory: &mut Memory<'_, Self>, args: &SwigluBackward, _: &StepContext) -> Result<()> {
        let [x, dy, dx] = [args.x, args.dy, args.dx].map(|act| Self::act(memory, act));
        let grid = Grid::elements(self.device(), args.rows * args.width, 1);
        // SAFETY: x and dx hold `rows * 2 * width` values, dy half as many.
        unsafe { self.launch(FILE, "swiglu_backward", grid, args![x, dy, dx, args.rows, args.width]) }
    }
}

impl<S: Storage> Cuda<S> {
    /// `y = f(x)`, `len` values in `S`; y may be x.
    pub(super) fn apply(&self, kind: ActivationKind, x: u64, y: u64, len: usize) -> Result<()> {
        let grid = Grid::elements(self.device(), len, 16 / size_of::<S>());
        // SAFETY: the callers hand on activations of `len` values each; a thread reads its values before it writes them.
        unsafe { self.launch(FILE, "activation", grid, args![x, y, number(kind), len]) }
    }

    /// `dx = dy f'(x)`, `len` values in `S`; dx may be dy.
    pub(super) fn apply_slope(&self, kind: ActivationKind, x: u64, dy: u64, dx: u64, len: usize) -> Result<()> {
        let grid = Grid::elements(self.device(), len, 16 / size_of::<S>());
        // SAFETY: as above.
        unsafe { self.launch(FILE, "activation_backward", grid, args![x, dy, dx, number(kind), len]) }
    }
}
