//! A transformer encoder that tells the class of a text.

use super::recomputed;
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::{Error, Result};
use crate::model::layers::{
    BlockOptions, Dropout, Embedding, HiddenActivation, Linear, MeanOverTime, NormKind, Positions,
    SelfAttentionOptions, Sequential, TransformerBlock,
};
use crate::model::{Init, Loss, Model};

/// Options of a text classifier: token vectors and learned positions, pre-norm blocks whose attention sees the whole text
/// but its padding, layer norm, the mean over the text, dropout, a linear layer. The run file's key stands in the text of
/// each field.
///
/// Parameters: `embedding.weight`, `positions.weight`, `blocks.N.{ln_1, attn.c_attn, attn.c_proj, ln_2, mlp.c_fc,
/// mlp.c_proj}.{weight, bias}`, `norm.{weight, bias}`, `head.{weight, bias}`. Weights start normal with deviation 0.02,
/// `0.02 / sqrt(2 layers)` where a branch ends (GPT-2's); biases 0, norms 1.
#[derive(Clone, Debug, PartialEq)]
pub struct TextEncoderOptions {
    /// `model.layers`: blocks.
    pub layers: usize,
    /// `model.heads`.
    pub heads: usize,
    /// `model.width`: values a token; a multiple of `heads`.
    pub width: usize,
    /// `model.hidden`: values between the feed-forward layer's linear layers; `4 width` where not given.
    pub hidden: Option<usize>,
    /// `model.dropout`: of the embedding, of attention probabilities, of what each branch adds, and of the mean.
    pub dropout: f64,
    /// `model.label_smoothing`: in `[0, 1)`.
    pub label_smoothing: f64,
    /// `model.recompute`: whether blocks keep their input alone, and compute the rest again in the backward.
    pub recompute: bool,
}

impl Default for TextEncoderOptions {
    fn default() -> Self {
        TextEncoderOptions {
            layers: 2,
            heads: 4,
            width: 128,
            hidden: None,
            dropout: 0.1,
            label_smoothing: 0.0,
            recompute: false,
        }
    }
}

/// The target that does not count, as PyTorch's `ignore_index`.
const IGNORE: i32 = -100;

impl TextEncoderOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// The run file's key, what was found, what was expected.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key: &str, found: String, expected: String| {
            Err(Error::config(format!("model.{key}"), format!("found {found}, expected {expected}")))
        };
        let counts = [
            ("layers", Some(self.layers)),
            ("heads", Some(self.heads)),
            ("width", Some(self.width)),
            ("hidden", self.hidden),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == Some(0)) {
            return wrong(key, "0".into(), "1 or more".into());
        }
        if !self.width.is_multiple_of(self.heads) {
            return wrong("width", self.width.to_string(), format!("a multiple of model.heads ({})", self.heads));
        }
        for (key, value) in [("dropout", self.dropout), ("label_smoothing", self.label_smoothing)] {
            if !(0.0..1.0).contains(&value) {
                return wrong(key, value.to_string(), "a number from 0 to below 1".into());
            }
        }
        Ok(())
    }

    /// The model for texts of `context` tokens below `vocabulary`, of which `pad` stands for nothing, in `classes` classes.
    ///
    /// # Errors
    /// As [`TextEncoderOptions::validate`].
    pub fn build<B: Backend>(
        &self,
        vocabulary: usize,
        context: usize,
        pad: Option<i32>,
        classes: usize,
    ) -> Result<Model<B>> {
        self.validate()?;
        let normal = Init::Normal { std: 0.02 };
        let residual = Init::Normal { std: 0.02 / (2.0 * self.layers as f64).sqrt() };
        let table = Embedding::new(vocabulary, self.width).with_init(normal);
        let mut layers = Sequential::new()
            .then("embedding", if let Some(pad) = pad { table.with_padding(pad) } else { table })
            .then("positions", Positions::new(context).with_init(normal))
            .then("embedding_dropout", Dropout::new(self.dropout));
        for block in 0..self.layers {
            let options = BlockOptions {
                norm: NormKind::LayerNorm,
                epsilon: 1e-5,
                attention: SelfAttentionOptions {
                    heads: self.heads,
                    kv_heads: self.heads,
                    causal: false,
                    bias: true,
                    dropout: self.dropout,
                    rotary: None,
                    init: Some([normal, residual]),
                },
                hidden: self.hidden.unwrap_or(4 * self.width),
                activation: HiddenActivation::Pointwise(ActivationKind::GeluTanh),
                bias: true,
                dropout: self.dropout,
                init: Some([normal, residual]),
            };
            layers.push(format!("blocks.{block}"), recomputed(TransformerBlock::new(options), self.recompute));
        }
        layers.push("norm", NormKind::LayerNorm.layer(1e-5, true));
        let layers = layers
            .then("mean", MeanOverTime::new())
            .then("dropout", Dropout::new(self.dropout))
            .then("head", Linear::new(classes).with_init(normal, Init::Constant(0.0)));
        let loss = Loss::CrossEntropy { label_smoothing: self.label_smoothing, ignore_index: IGNORE };
        Ok(Model::new(Box::new(layers), loss))
    }
}
