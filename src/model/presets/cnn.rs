//! A small convolutional network for pictures.

use super::{Fit, check, check_dropout, push_numbered};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::layers::{BatchNorm, Conv2d, Dropout, Flatten, Linear, MaxPool2d, Sequential, Window};

/// `preset = "cnn"`: stages of convolution, activation and 2 x 2 max pooling; then a hidden linear layer and the output.
/// PyTorch's default initialization.
#[derive(Clone, Debug, PartialEq)]
pub struct CnnOptions {
    /// `model.channels`: filters of each stage (default `[32, 64]`).
    pub channels: Vec<usize>,
    /// `model.kernel`: side of each kernel, padded to keep the size (default 3).
    pub kernel: usize,
    /// `model.convolutions`: convolutions a stage (default 1).
    pub convolutions: usize,
    /// `model.hidden`: width of the hidden linear layer; 0 for none (default 128).
    pub hidden: usize,
    /// `model.activation` (default `relu`).
    pub activation: ActivationKind,
    /// `model.batch_norm` after each convolution (default false).
    pub batch_norm: bool,
    /// `model.dropout` before the linear layers (default 0).
    pub dropout: f64,
}

impl Default for CnnOptions {
    fn default() -> Self {
        CnnOptions {
            channels: vec![32, 64],
            kernel: 3,
            convolutions: 1,
            hidden: 128,
            activation: ActivationKind::Relu,
            batch_norm: false,
            dropout: 0.0,
        }
    }
}

impl CnnOptions {
    /// Parameters under PyTorch's running numbers: `features.0.weight`, .., `classifier.1.weight`, ..
    ///
    /// # Errors
    /// An option out of its range.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Sequential<B>> {
        check_dropout(self.dropout)?;
        check("kernel", self.kernel % 2 == 1, self.kernel, "an odd number")?;
        check("convolutions", self.convolutions > 0, self.convolutions, "1 or more")?;
        check("channels", !self.channels.is_empty(), "no stage", "one or more")?;
        let mut features = Sequential::new();
        let mut number = 0;
        for &channels in &self.channels {
            check("channels", channels > 0, channels, "numbers of 1 or more")?;
            for _ in 0..self.convolutions {
                let padding = [self.kernel / 2; 2];
                let convolution = Conv2d::new(channels, [self.kernel; 2]).with_padding(padding);
                features.push(number.to_string(), Box::new(convolution));
                number += 1;
                if self.batch_norm {
                    features.push(number.to_string(), Box::new(BatchNorm::new()));
                    number += 1;
                }
                push_numbered(&mut features, &mut number, self.activation, 0.0);
            }
            features.push(number.to_string(), Box::new(MaxPool2d::new(Window::tiled([2, 2]))));
            number += 1;
        }
        let mut classifier = Sequential::new().then("0", Flatten::new());
        let mut number = 1;
        if self.dropout > 0.0 {
            classifier.push(number.to_string(), Box::new(Dropout::new(self.dropout)));
            number += 1;
        }
        if self.hidden > 0 {
            classifier.push(number.to_string(), Box::new(Linear::new(self.hidden)));
            number += 1;
            push_numbered(&mut classifier, &mut number, self.activation, self.dropout);
        }
        classifier.push(number.to_string(), Box::new(Linear::new(fit.outputs)));
        Ok(Sequential::new().then("features", features).then("classifier", classifier))
    }
}
