use crate::backend::op::{op, plain_operand};
use crate::backend::{Act, Backend, Grad, Memory, Param, StepContext};
use crate::error::Result;

/// Two-dimensional convolution (cross-correlation, as `torch.nn.Conv2d`).
pub trait Conv: Sized {
    /// Elements of workspace that the forward, or the backward, wants.
    fn conv2d_workspace(geometry: &Conv2dGeometry, backward: bool) -> usize;
    /// `y = x * w + b`.
    fn conv2d_forward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// Gradients of x, w and b.
    fn conv2d_backward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dBackward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

/// Sizes of a convolution. Pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2dGeometry {
    /// Samples.
    pub batch: usize,
    /// Channels of the input; a multiple of `groups`.
    pub channels: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Channels of the output; a multiple of `groups`.
    pub filters: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Step of the kernel.
    pub stride: [usize; 2],
    /// Zeros on each side of the input.
    pub padding: [usize; 2],
    /// Groups of channels that do not mix.
    pub groups: usize,
}

impl Conv2dGeometry {
    /// Output height and width; none where the kernel does not fit into the padded input.
    pub fn output(&self) -> Option<[usize; 2]> {
        let side = |i: usize| {
            let padded = self.padding[i].checked_mul(2)?.checked_add(self.input[i])?;
            let room = padded.checked_sub(self.kernel[i])?;
            Some(room.checked_div(self.stride[i])? + 1)
        };
        Some([side(0)?, side(1)?])
    }

    /// Values of the weight.
    pub fn weights(&self) -> usize {
        self.filters * (self.channels / self.groups) * self.kernel[0] * self.kernel[1]
    }

    /// Floating-point operations of one product with the weights.
    pub fn flops(&self) -> usize {
        let [h, w] = self.output().unwrap_or([0, 0]);
        2 * self.batch * h * w * self.weights()
    }
}

plain_operand!(Conv2dGeometry);

op! {
    /// `y = x * w + b`.
    Conv2dForward => conv2d_forward {
        /// `[batch, channels, height, width]`.
        x: Act,
        /// `[filters, channels / groups, kernel height, kernel width]`.
        weight: Param,
        /// `[filters]`.
        bias: Option<Param>,
        /// `[batch, filters, output height, output width]`, `=`.
        y: Act,
        /// [`Conv::conv2d_workspace`] elements; what is left there means nothing.
        workspace: Act,
        /// Sizes.
        geometry: Conv2dGeometry,
    }
    flops(a) a.geometry.flops();
    moved { workspace: Some(0) }
}

op! {
    /// Gradients of [`Conv2dForward`].
    Conv2dBackward => conv2d_backward {
        /// `[batch, channels, height, width]`.
        x: Act,
        /// `[batch, filters, output height, output width]`.
        dy: Act,
        /// `[filters, channels / groups, kernel height, kernel width]`.
        weight: Param,
        /// `[batch, channels, height, width]`, `=`; none when nothing before this layer is trained.
        dx: Option<Act>,
        /// [`Conv::conv2d_workspace`] elements; what is left there means nothing.
        workspace: Act,
        /// As the weight.
        dweight: Grad,
        /// `[filters]`.
        dbias: Option<Grad>,
        /// Sizes.
        geometry: Conv2dGeometry,
    }
    flops(a) a.geometry.flops() * (1 + usize::from(a.dx.is_some()));
    moved { workspace: Some(0) }
}
