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
fn number(kind: ActivationKind) -> i32 {
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
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let grid = Grid::elements(self.device(), args.len, 16 / size_of::<S>());
        // SAFETY: two activations of `len` values each, as the operation says.
        unsafe { self.launch(FILE, "activation", grid, args![x, y, number(args.kind), args.len]) }
    }

    fn activation_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationBackward,
        _: &StepContext,
    ) -> Result<()> {
        let [x, dy, dx] = [args.x, args.dy, args.dx].map(|act| Self::act(memory, act));
        let grid = Grid::elements(self.device(), args.len, 16 / size_of::<S>());
        // SAFETY: three activations of `len` values each, as the operation says.
        unsafe { self.launch(FILE, "activation_backward", grid, args![x, dy, dx, number(args.kind), args.len]) }
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
