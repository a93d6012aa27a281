use crate::backend::op::{op, plain_operand};
use crate::backend::{Act, Backend, Indices, Memory, StepContext};
use crate::error::Result;

/// Pooling over windows of a picture, as `torch.nn.MaxPool2d` and `torch.nn.AvgPool2d` (padding counted in the average).
pub trait Pool: Sized {
    /// The largest value of each window, and where it stood.
    fn max_pool_forward(&self, memory: &mut Memory<'_, Self>, args: &MaxPoolForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// The gradient goes to where the largest value stood.
    fn max_pool_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MaxPoolBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// The mean of each window.
    fn average_pool_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AveragePoolForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// The gradient is spread over each window.
    fn average_pool_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AveragePoolBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
}

/// Sizes of a pooling. Pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolGeometry {
    /// Samples times channels.
    pub planes: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Step of the window.
    pub stride: [usize; 2],
    /// Padding on each side: less than any value for the maximum, 0 for the mean; at most half the window.
    pub padding: [usize; 2],
}

impl PoolGeometry {
    /// Output height and width; none where the window does not fit into the padded input.
    pub fn output(&self) -> Option<[usize; 2]> {
        let side = |i: usize| {
            let padded = self.padding[i].checked_mul(2)?.checked_add(self.input[i])?;
            let room = padded.checked_sub(self.kernel[i])?;
            Some(room.checked_div(self.stride[i])? + 1)
        };
        Some([side(0)?, side(1)?])
    }

    fn operations(&self) -> usize {
        let [h, w] = self.output().unwrap_or([0, 0]);
        self.planes * h * w * self.kernel[0] * self.kernel[1]
    }
}

plain_operand!(PoolGeometry);

op! {
    /// The largest value of each window.
    MaxPoolForward => max_pool_forward {
        /// `[planes, height, width]`.
        x: Act,
        /// `[planes, output height, output width]`, `=`.
        y: Act,
        /// As y: position of the maximum within its plane (the first of equals; a NaN counts as the largest), `=`.
        positions: Indices,
        /// Sizes.
        geometry: PoolGeometry,
    }
    flops(a) a.geometry.operations()
}

op! {
    /// Gradient of [`MaxPoolForward`].
    MaxPoolBackward => max_pool_backward {
        /// `[planes, output height, output width]`.
        dy: Act,
        /// As dy.
        positions: Indices,
        /// `[planes, height, width]`, `=`.
        dx: Act,
        /// Sizes.
        geometry: PoolGeometry,
    }
    flops(a) a.geometry.operations()
}

op! {
    /// The mean of each window.
    AveragePoolForward => average_pool_forward {
        /// `[planes, height, width]`.
        x: Act,
        /// `[planes, output height, output width]`, `=`.
        y: Act,
        /// Sizes.
        geometry: PoolGeometry,
    }
    flops(a) a.geometry.operations()
}

op! {
    /// Gradient of [`AveragePoolForward`].
    AveragePoolBackward => average_pool_backward {
        /// `[planes, output height, output width]`.
        dy: Act,
        /// `[planes, height, width]`, `=`.
        dx: Act,
        /// Sizes.
        geometry: PoolGeometry,
    }
    flops(a) a.geometry.operations()
}
