use crate::backend::ops::{LinearBackward, LinearForward};
use crate::backend::{Act, Backend, Param};
use crate::error::Result;
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
        planner.emit(LinearForward { x: saved.x, weight, bias, y, rows, inputs, outputs });
        self.saved = Some(saved);
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let saved = super::planned(self.saved.take(), "linear")?;
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
            outputs: self.outputs,
        });
        Ok(dx.map(|(_, tensor)| tensor))
    }
}
