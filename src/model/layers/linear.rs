//! Affine maps.

use crate::backend::ops::{LinearBackward, LinearForward};
use crate::backend::{Act, Backend, Param};
use crate::error::{Error, Result};
use crate::model::{Init, Layer, Planner, Tensor};

/// `y = x W^T + b` over the last dimension; parameters `weight` `[outputs, inputs]` and `bias` `[outputs]`.
///
/// Both start uniform within `1 / sqrt(inputs)`, as `torch.nn.Linear`'s, unless told otherwise.
#[derive(Debug)]
pub struct Linear {
    outputs: usize,
    bias: bool,
    weight_init: Option<Init>,
    bias_init: Option<Init>,
    saved: Option<Saved>,
}

#[derive(Clone, Copy, Debug)]
struct Saved {
    x: Act,
    needs_gradient: bool,
    weight: Param,
    bias: Option<Param>,
    rows: usize,
    inputs: usize,
}

impl Linear {
    /// A layer of `outputs` outputs with a bias; the number of inputs is what it is given.
    pub fn new(outputs: usize) -> Self {
        Linear { outputs, bias: true, weight_init: None, bias_init: None, saved: None }
    }

    /// Without a bias.
    #[must_use]
    pub fn without_bias(mut self) -> Self {
        self.bias = false;
        self
    }

    /// With other initial values.
    #[must_use]
    pub fn with_init(mut self, weight: Init, bias: Init) -> Self {
        self.weight_init = Some(weight);
        self.bias_init = Some(bias);
        self
    }
}

impl<B: Backend> Layer<B> for Linear {
    fn kind(&self) -> &'static str {
        "linear"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let (rows, inputs, outputs) = (x.rows(), x.width(), self.outputs);
        if outputs == 0 {
            return Err(Error::shape("linear", "1 output or more", "0"));
        }
        let default = Init::torch_default(inputs);
        let weight = planner.parameter("weight", &[outputs, inputs], self.weight_init.unwrap_or(default))?;
        let bias = if self.bias {
            Some(planner.parameter("bias", &[outputs], self.bias_init.unwrap_or(default))?)
        } else {
            None
        };
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        let (y, output) = planner.tensor(&shape, true);
        let saved = Saved { x: x.real("linear")?, needs_gradient: x.needs_gradient, weight, bias, rows, inputs };
        planner.emit(LinearForward { x: saved.x, weight, bias, y, rows, inputs, outputs, activation: None });
        self.saved = Some(saved);
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let saved = super::planned(self.saved.take(), "linear")?;
        backward(planner, &saved, self.outputs, dy)
    }
}

/// `y = x W^T` with a parameter W that a layer before declared: GPT-2's output, which shares the table of token vectors.
#[derive(Debug)]
pub struct TiedLinear {
    path: String,
    saved: Option<Saved>,
    outputs: usize,
}

impl TiedLinear {
    /// Shares the parameter `[outputs, inputs]` of this whole dotted name.
    pub fn new(path: impl Into<String>) -> Self {
        TiedLinear { path: path.into(), saved: None, outputs: 0 }
    }
}

impl<B: Backend> Layer<B> for TiedLinear {
    fn kind(&self) -> &'static str {
        "tied_linear"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let (rows, inputs) = (x.rows(), x.width());
        let (weight, shape) = planner.shared(&self.path)?;
        let &[outputs, width] = shape.as_slice() else {
            return Err(Error::shape("tied_linear", "a shared matrix", format!("`{}` of {shape:?}", self.path)));
        };
        if width != inputs {
            return Err(Error::shape("tied_linear", format!("rows of {width} values"), format!("{:?}", x.shape)));
        }
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        let (y, output) = planner.tensor(&shape, true);
        let saved = Saved { x: x.real("linear")?, needs_gradient: x.needs_gradient, weight, bias: None, rows, inputs };
        planner.emit(LinearForward { x: saved.x, weight, bias: None, y, rows, inputs, outputs, activation: None });
        self.saved = Some(saved);
        self.outputs = outputs;
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let saved = super::planned(self.saved.take(), "tied_linear")?;
        backward(planner, &saved, self.outputs, dy)
    }
}

/// Emits the backward of a layer of `outputs` outputs.
fn backward<B: Backend>(
    planner: &mut Planner<'_, B>,
    saved: &Saved,
    outputs: usize,
    dy: Tensor,
) -> Result<Option<Tensor>> {
    let mut shape = dy.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = saved.inputs;
    }
    let dx = saved.needs_gradient.then(|| planner.tensor(&shape, true));
    let dbias = saved.bias.map(|bias| planner.gradient(bias));
    let dweight = planner.gradient(saved.weight);
    planner.emit(LinearBackward {
        x: saved.x,
        dy: dy.real("linear")?,
        weight: saved.weight,
        dx: dx.as_ref().map(|(act, _)| *act),
        dweight,
        dbias,
        rows: saved.rows,
        inputs: saved.inputs,
        outputs,
        slope: None,
    });
    Ok(dx.map(|(_, tensor)| tensor))
}
