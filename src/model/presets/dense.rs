//! Linear and logistic regression, and the multi-layer perceptron.

use super::{Fit, check, check_dropout, push_numbered};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::Init;
use crate::model::layers::{BatchNorm, Flatten, Linear, Sequential};

/// `preset = "linear"` and `preset = "logistic"`: one affine map. The loss decides which of the two it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearOptions {
    /// `model.bias` (default true).
    pub bias: bool,
    /// `model.zero_init`: start from zero rather than uniform within `1 / sqrt(inputs)` (default true).
    pub zero_init: bool,
}

impl Default for LinearOptions {
    fn default() -> Self {
        LinearOptions { bias: true, zero_init: true }
    }
}

impl LinearOptions {
    /// Parameters `weight` `[outputs, inputs]` and `bias` `[outputs]`.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Sequential<B>> {
        let mut layer = Linear::new(fit.outputs);
        if !self.bias {
            layer = layer.without_bias();
        }
        if self.zero_init {
            layer = layer.with_init(Init::Constant(0.0), Init::Constant(0.0));
        }
        Ok(Sequential::new().then("flatten", Flatten::new()).then("", layer))
    }
}

/// `preset = "mlp"`: linear layers with an activation between them. PyTorch's default initialization.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpOptions {
    /// `model.hidden`: widths of the hidden layers (default `[256, 128]`).
    pub hidden: Vec<usize>,
    /// `model.activation` (default `relu`).
    pub activation: ActivationKind,
    /// `model.dropout` after each activation (default 0).
    pub dropout: f64,
    /// `model.batch_norm` before each activation (default false).
    pub batch_norm: bool,
}

impl Default for MlpOptions {
    fn default() -> Self {
        MlpOptions { hidden: vec![256, 128], activation: ActivationKind::Relu, dropout: 0.0, batch_norm: false }
    }
}

impl MlpOptions {
    /// Parameters `0.weight`, `0.bias`, `2.weight`, .., as in `torch.nn.Sequential(Linear, ReLU, Linear, ..)`.
    ///
    /// # Errors
    /// A width of 0, or a dropout that is no probability.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Sequential<B>> {
        check_dropout(self.dropout)?;
        let mut layers = Sequential::new().then("flatten", Flatten::new());
        let mut number = 0;
        for &width in &self.hidden {
            check("hidden", width > 0, width, "widths of 1 or more")?;
            layers.push(number.to_string(), Box::new(Linear::new(width)));
            number += 1;
            if self.batch_norm {
                layers.push(number.to_string(), Box::new(BatchNorm::new()));
                number += 1;
            }
            push_numbered(&mut layers, &mut number, self.activation, self.dropout);
        }
        layers.push(number.to_string(), Box::new(Linear::new(fit.outputs)));
        Ok(layers)
    }
}
