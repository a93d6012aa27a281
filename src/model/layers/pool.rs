//! Pooling.

use super::planned;
use crate::backend::ops::{AveragePoolBackward, AveragePoolForward, MaxPoolBackward, MaxPoolForward, PoolGeometry};
use crate::backend::{Backend, Indices};
use crate::error::{Error, Result};
use crate::model::{Layer, Planner, Tensor};

/// Window, stride and padding of a pooling layer; (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Height and width; 0 stands for the whole side of the input.
    pub kernel: [usize; 2],
    /// Step.
    pub stride: [usize; 2],
    /// Padding on each side, at most half the window.
    pub padding: [usize; 2],
}

impl Window {
    /// Windows side by side, without padding.
    pub fn tiled(kernel: [usize; 2]) -> Self {
        Window { kernel, stride: kernel.map(|k| k.max(1)), padding: [0, 0] }
    }

    /// One window over the whole picture.
    pub fn global() -> Self {
        Self::tiled([0, 0])
    }
}

/// Sizes for `x` `[batch, channels, height, width]`, and the shape of the output.
fn geometry(window: Window, x: &Tensor, layer: &str) -> Result<(PoolGeometry, [usize; 4])> {
    let [batch, channels, height, width] = x.dimensions(layer, "[batch, channels, height, width]")?;
    let input = [height, width];
    let kernel = [0, 1].map(|i| if window.kernel[i] == 0 { input[i] } else { window.kernel[i] });
    let Window { stride, padding, .. } = window;
    let geometry = PoolGeometry { planes: batch * channels, input, kernel, stride, padding };
    let fits = (0..2).all(|i| 2 * padding[i] <= kernel[i] && kernel[i] > 0);
    match geometry.output().filter(|_| fits) {
        Some([h, w]) => Ok((geometry, [batch, channels, h, w])),
        None => Err(Error::shape(
            layer,
            format!("a picture that a {kernel:?} window at stride {stride:?} fits, padding at most half of it"),
            format!("{height} x {width} with padding {padding:?}"),
        )),
    }
}

/// The largest value of each window.
#[derive(Debug)]
pub struct MaxPool2d {
    window: Window,
    saved: Option<(PoolGeometry, Indices, Vec<usize>)>,
}

impl MaxPool2d {
    /// The layer of this window.
    pub fn new(window: Window) -> Self {
        MaxPool2d { window, saved: None }
    }
}

impl<B: Backend> Layer<B> for MaxPool2d {
    fn kind(&self) -> &'static str {
        "max_pool2d"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let (geometry, shape) = geometry(self.window, &x, "max_pool2d")?;
        let (y, output) = planner.tensor(&shape, x.needs_gradient);
        let positions = planner.indices(shape.iter().product());
        planner.emit(MaxPoolForward { x: x.real("max_pool2d")?, y, positions, geometry });
        self.saved = Some((geometry, positions, x.shape));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (geometry, positions, shape) = planned(self.saved.take(), "max_pool2d")?;
        let (dx, tensor) = planner.tensor(&shape, true);
        planner.emit(MaxPoolBackward { dy: dy.real("max_pool2d")?, positions, dx, geometry });
        Ok(Some(tensor))
    }
}

/// The mean of each window; padding counts as zeros.
#[derive(Debug)]
pub struct AveragePool2d {
    window: Window,
    saved: Option<(PoolGeometry, Vec<usize>)>,
}

impl AveragePool2d {
    /// The layer of this window.
    pub fn new(window: Window) -> Self {
        AveragePool2d { window, saved: None }
    }
}

impl<B: Backend> Layer<B> for AveragePool2d {
    fn kind(&self) -> &'static str {
        "average_pool2d"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let (geometry, shape) = geometry(self.window, &x, "average_pool2d")?;
        let (y, output) = planner.tensor(&shape, x.needs_gradient);
        planner.emit(AveragePoolForward { x: x.real("average_pool2d")?, y, geometry });
        self.saved = Some((geometry, x.shape));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (geometry, shape) = planned(self.saved.take(), "average_pool2d")?;
        let (dx, tensor) = planner.tensor(&shape, true);
        planner.emit(AveragePoolBackward { dy: dy.real("average_pool2d")?, dx, geometry });
        Ok(Some(tensor))
    }
}
