//! The convolutional sentence classifier of Kim 2014.

use super::{Fit, check, check_dropout};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::layers::{
    Activation, AsPicture, Conv2d, Dropout, Embedding, Flatten, Linear, MaxPool2d, Parallel, Sequential, Window,
};
use crate::model::{Init, Layer};

/// `preset = "text_cnn"`: word vectors, convolutions over 3, 4 and 5 words, the maximum over time of each filter, dropout, a
/// linear layer.
///
/// Word vectors start uniform within 0.25, as the paper's random ones; convolutions and the linear layer as PyTorch's. The
/// paper's bound of 3 on the norm of the output weights is left out: weight decay serves in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TextCnnOptions {
    /// `model.width`: of a word vector (default 300).
    pub width: usize,
    /// `model.kernels`: words a filter sees (default `[3, 4, 5]`).
    pub kernels: Vec<usize>,
    /// `model.filters`: of each kernel (default 100).
    pub filters: usize,
    /// `model.dropout` before the output (default 0.5).
    pub dropout: f64,
}

impl Default for TextCnnOptions {
    fn default() -> Self {
        TextCnnOptions { width: 300, kernels: vec![3, 4, 5], filters: 100, dropout: 0.5 }
    }
}

impl TextCnnOptions {
    /// Parameters `embedding.weight`, `convs.0.weight` `[filters, 1, words, width]`, .., `fc.weight`.
    ///
    /// # Errors
    /// An option out of its range, data without tokens, or sentences shorter than a kernel.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Sequential<B>> {
        check_dropout(self.dropout)?;
        check("width", self.width > 0, self.width, "1 or more")?;
        check("filters", self.filters > 0, self.filters, "1 or more")?;
        check("kernels", !self.kernels.is_empty(), "none", "one or more")?;
        let vocabulary = fit.tokens("text_cnn")?;
        let words = fit.context.unwrap_or(0);
        let branches = self.kernels.iter().enumerate().map(|(i, &kernel)| {
            check("kernels", (1..=words).contains(&kernel), kernel, &format!("1 to the {words} words of a line"))?;
            let branch = Sequential::new()
                .then("", Conv2d::new(self.filters, [kernel, self.width]))
                .then("relu", Activation::new(ActivationKind::Relu))
                .then("max", MaxPool2d::new(Window::global()))
                .then("flatten", Flatten::new());
            let branch: Box<dyn Layer<B>> = Box::new(branch);
            Ok((format!("convs.{i}"), branch))
        });
        let branches = branches.collect::<Result<Vec<_>>>()?;
        let table = Embedding::new(vocabulary, self.width).with_init(Init::Uniform { bound: 0.25 });
        Ok(Sequential::new()
            .then("embedding", table)
            .then("picture", AsPicture::new())
            .then("", Parallel::new(branches))
            .then("dropout", Dropout::new(self.dropout))
            .then("fc", Linear::new(fit.outputs)))
    }
}
