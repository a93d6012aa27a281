//! A convolutional classifier of log-mel pictures.

use super::{Fit, check, check_dropout};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::Init;
use crate::model::layers::{
    Activation, AveragePool2d, BatchNorm, Conv2d, Dropout, Flatten, Linear, MaxPool2d, Sequential, Window,
};

/// `preset = "audio_cnn"`: stages of 3 x 3 convolution, batch norm, ReLU and 2 x 2 max pooling over `[1, mels, frames]`, the
/// mean over the frames that are left, dropout, a linear layer over channels and mels. Convolutions start normal by fan out (He et al. 2015).
#[derive(Clone, Debug, PartialEq)]
pub struct AudioCnnOptions {
    /// `model.channels`: filters of each stage (default `[16, 32, 64]`).
    pub channels: Vec<usize>,
    /// `model.dropout` before the output (default 0.2).
    pub dropout: f64,
}

impl Default for AudioCnnOptions {
    fn default() -> Self {
        AudioCnnOptions { channels: vec![16, 32, 64], dropout: 0.2 }
    }
}

impl AudioCnnOptions {
    /// Parameters `stages.0.conv.weight`, `stages.0.bn.weight`, .., `fc.weight`.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Sequential<B>> {
        check_dropout(self.dropout)?;
        check("channels", !self.channels.is_empty(), "no stage", "one or more")?;
        let mut stages = Sequential::new();
        for (stage, &channels) in self.channels.iter().enumerate() {
            check("channels", channels > 0, channels, "numbers of 1 or more")?;
            let convolution = Conv2d::new(channels, [3, 3])
                .with_padding([1, 1])
                .without_bias()
                .with_init(Init::kaiming_normal(channels * 9));
            let layers = Sequential::new()
                .then("conv", convolution)
                .then("bn", BatchNorm::new())
                .then("relu", Activation::new(ActivationKind::Relu))
                .then("pool", MaxPool2d::new(Window::tiled([2, 2])));
            stages.push(stage.to_string(), Box::new(layers));
        }
        Ok(Sequential::new()
            .then("stages", stages)
            .then("mean", AveragePool2d::new(Window::tiled([1, 0])))
            .then("flatten", Flatten::new())
            .then("dropout", Dropout::new(self.dropout))
            .then("fc", Linear::new(fit.outputs)))
    }
}
