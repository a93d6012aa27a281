//! Two-dimensional convolution.

use super::planned;
use crate::backend::ops::{Conv2dBackward, Conv2dForward, Conv2dGeometry};
use crate::backend::{Act, Backend, Param};
use crate::error::{Error, Result};
use crate::model::{Init, Layer, Planner, Tensor};

/// `torch.nn.Conv2d`: `[batch, channels, height, width] -> [batch, filters, ..]`; parameters `weight`
/// `[filters, channels / groups, kernel height, kernel width]` and `bias` `[filters]`.
///
/// Both start uniform within `1 / sqrt(fan in)`, as PyTorch's, unless told otherwise.
#[derive(Debug)]
pub struct Conv2d {
    filters: usize,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    groups: usize,
    bias: bool,
    init: Option<Init>,
    saved: Option<Saved>,
}

#[derive(Clone, Copy, Debug)]
struct Saved {
    x: Act,
    needs_gradient: bool,
    weight: Param,
    bias: Option<Param>,
    geometry: Conv2dGeometry,
}

impl Conv2d {
    /// `filters` kernels of `[height, width]`, stride 1, no padding, one group, with a bias.
    pub fn new(filters: usize, kernel: [usize; 2]) -> Self {
        Conv2d { filters, kernel, stride: [1, 1], padding: [0, 0], groups: 1, bias: true, init: None, saved: None }
    }

    /// With this stride.
    #[must_use]
    pub fn with_stride(mut self, stride: [usize; 2]) -> Self {
        self.stride = stride;
        self
    }

    /// With zeros around the input.
    #[must_use]
    pub fn with_padding(mut self, padding: [usize; 2]) -> Self {
        self.padding = padding;
        self
    }

    /// With groups of channels that do not mix.
    #[must_use]
    pub fn with_groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// Without a bias.
    #[must_use]
    pub fn without_bias(mut self) -> Self {
        self.bias = false;
        self
    }

    /// With other initial weights.
    #[must_use]
    pub fn with_init(mut self, init: Init) -> Self {
        self.init = Some(init);
        self
    }
}

impl<B: Backend> Layer<B> for Conv2d {
    fn kind(&self) -> &'static str {
        "conv2d"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let [batch, channels, height, width] = x.dimensions("conv2d", "[batch, channels, height, width]")?;
        let Conv2d { filters, kernel, padding, groups, .. } = *self;
        if groups == 0 || channels % groups != 0 || filters % groups != 0 || filters == 0 {
            return Err(Error::shape(
                "conv2d",
                "channels and filters that are multiples of the groups",
                format!("{channels} channels, {filters} filters, {groups} groups"),
            ));
        }
        // A step beyond the padded picture is one to its end: backends keep memory for what lies between two positions.
        let input = [height, width];
        let stride = [0, 1].map(|i| self.stride[i].min(padding[i].saturating_mul(2).saturating_add(input[i])));
        let geometry = Conv2dGeometry { batch, channels, input, filters, kernel, stride, padding, groups };
        let output = geometry.output().filter(|_| kernel[0] > 0 && kernel[1] > 0);
        let Some([out_height, out_width]) = output else {
            return Err(Error::shape(
                "conv2d",
                format!(
                    "a picture that a {kernel:?} kernel at stride {:?} fits, with {padding:?} padding",
                    self.stride
                ),
                format!("{height} x {width}"),
            ));
        };
        planner.countable(&[batch, filters, out_height, out_width])?;
        let fan_in = channels / groups * kernel[0] * kernel[1];
        let default = Init::torch_default(fan_in);
        let shape = [filters, channels / groups, kernel[0], kernel[1]];
        let weight = planner.parameter("weight", &shape, self.init.unwrap_or(default))?;
        let bias = if self.bias { Some(planner.parameter("bias", &[filters], default)?) } else { None };
        let (y, tensor) = planner.tensor(&[batch, filters, out_height, out_width], true);
        let workspace = planner.activation(B::conv2d_workspace(&geometry, false));
        let saved = Saved { x: x.real("conv2d")?, needs_gradient: x.needs_gradient, weight, bias, geometry };
        planner.emit(Conv2dForward { x: saved.x, weight, bias, y, workspace, geometry });
        self.saved = Some(saved);
        Ok(tensor)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let Saved { x, needs_gradient, weight, bias, geometry } = planned(self.saved.take(), "conv2d")?;
        let shape = [geometry.batch, geometry.channels, geometry.input[0], geometry.input[1]];
        let dx = needs_gradient.then(|| planner.tensor(&shape, true));
        let workspace = planner.activation(B::conv2d_workspace(&geometry, true));
        let dweight = planner.gradient(weight);
        let dbias = bias.map(|bias| planner.gradient(bias));
        planner.emit(Conv2dBackward {
            x,
            dy: dy.real("conv2d")?,
            weight,
            dx: dx.as_ref().map(|(act, _)| *act),
            workspace,
            dweight,
            dbias,
            geometry,
        });
        Ok(dx.map(|(_, tensor)| tensor))
    }
}
