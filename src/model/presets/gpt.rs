//! GPT-2 (Radford et al. 2019) in nanoGPT's layout and names, with the options that make it Llama-like.

use super::recomputed;
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::{Error, Result};
use crate::model::layers::{
    BlockOptions, Dropout, Embedding, HiddenActivation, Linear, NormKind, RotaryOptions, SelfAttentionOptions,
    Sequential, TiedLinear, TokenAndPosition, TransformerBlock,
};
use crate::model::{Init, Loss, Model};

/// How positions are told apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GptPositions {
    /// A learned vector for each position, added at the foot.
    Learned,
    /// Queries and keys turned by an angle that grows with the position.
    Rotary(RotaryOptions),
    /// Not at all: causal attention alone.
    None,
}

/// Options of a GPT. The run file's key stands in the text of each field.
///
/// Parameters: `transformer.wte.weight`, `transformer.wpe.weight` (learned positions), `transformer.h.N.{ln_1, attn.c_attn,
/// attn.c_proj, ln_2, mlp.c_fc, mlp.c_proj}.{weight, bias}`, `transformer.ln_f.{weight, bias}`, and `lm_head.weight` where the
/// output is not tied. Linear weights are `[outputs, inputs]`.
///
/// Initialization as GPT-2's: normal with deviation 0.02, the projections that end in a residual sum with
/// `0.02 / sqrt(2 layers)`; biases 0, norms 1.
#[derive(Clone, Debug, PartialEq)]
pub struct GptOptions {
    /// `model.layers`: blocks.
    pub layers: usize,
    /// `model.heads`: query heads.
    pub heads: usize,
    /// `model.kv_heads`: key and value heads, which divide `heads`; as many as `heads` where not given.
    pub kv_heads: Option<usize>,
    /// `model.width`: values a token; a multiple of `heads`.
    pub width: usize,
    /// `model.hidden`: values between the feed-forward layer's linear layers; `4 width` where not given, and with SwiGLU
    /// `8/3 width` rounded up to a multiple of 32.
    pub hidden: Option<usize>,
    /// `model.context`: most tokens a sample; that of the data where not given.
    pub context: Option<usize>,
    /// `model.vocabulary`: rows of the token table, at least as many as the data has tokens; as many where not given.
    pub vocabulary: Option<usize>,
    /// `model.bias`: biases in linear layers and layer norms.
    pub bias: bool,
    /// `model.dropout`: of the embedding, of attention probabilities and of what each branch adds.
    pub dropout: f64,
    /// `model.norm`: `layer_norm` or `rms_norm`.
    pub norm: NormKind,
    /// `model.norm_epsilon`.
    pub norm_epsilon: f64,
    /// `model.positions`: `learned`, `rotary` (with `model.rotary_base`, `model.rotary_interleaved`) or `none`.
    pub positions: GptPositions,
    /// `model.activation`: `gelu_tanh`, `gelu`, `relu`, `silu`, .. or `swiglu`.
    pub activation: HiddenActivation,
    /// `model.tied`: whether the output shares the table of token vectors.
    pub tied: bool,
    /// `model.label_smoothing`: in `[0, 1)`.
    pub label_smoothing: f64,
    /// `model.recompute`: whether blocks keep their input alone, and compute the rest again in the backward.
    pub recompute: bool,
}

impl Default for GptOptions {
    /// nanoGPT's defaults: GPT-2 124M without biases and dropout.
    fn default() -> Self {
        GptOptions {
            layers: 12,
            heads: 12,
            kv_heads: None,
            width: 768,
            hidden: None,
            context: None,
            vocabulary: None,
            bias: false,
            dropout: 0.0,
            norm: NormKind::LayerNorm,
            norm_epsilon: 1e-5,
            positions: GptPositions::Learned,
            activation: HiddenActivation::Pointwise(ActivationKind::GeluTanh),
            tied: true,
            label_smoothing: 0.0,
            recompute: false,
        }
    }
}

/// The target that does not count, as PyTorch's `ignore_index`.
const IGNORE: i32 = -100;

impl GptOptions {
    /// The names that [`GptOptions::named`] knows.
    pub const NAMES: [&'static str; 4] = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"];

    /// OpenAI's four sizes: biases, 1,024 positions, 50,257 tokens. None for another name.
    pub fn named(name: &str) -> Option<Self> {
        let [layers, heads, width] = match name {
            "gpt2" => [12, 12, 768],
            "gpt2-medium" => [24, 16, 1024],
            "gpt2-large" => [36, 20, 1280],
            "gpt2-xl" => [48, 25, 1600],
            _ => return None,
        };
        let sizes = GptOptions { layers, heads, width, bias: true, ..GptOptions::default() };
        Some(GptOptions { context: Some(1024), vocabulary: Some(50_257), ..sizes })
    }

    /// Values between the feed-forward layer's linear layers.
    pub fn hidden_width(&self) -> usize {
        self.hidden.unwrap_or(match self.activation {
            HiddenActivation::Swiglu => (8 * self.width).div_ceil(3).next_multiple_of(32),
            HiddenActivation::Pointwise(_) => 4 * self.width,
        })
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The run file's key, what was found, what was expected.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key: &str, found: String, expected: String| {
            Err(Error::config(format!("model.{key}"), format!("found {found}, expected {expected}")))
        };
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        let counts = [
            ("layers", Some(self.layers)),
            ("heads", Some(self.heads)),
            ("kv_heads", self.kv_heads),
            ("width", Some(self.width)),
            ("hidden", self.hidden),
            ("context", self.context),
            ("vocabulary", self.vocabulary),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == Some(0)) {
            return wrong(key, "0".into(), "1 or more".into());
        }
        if !self.width.is_multiple_of(self.heads) {
            return wrong("width", self.width.to_string(), format!("a multiple of model.heads ({})", self.heads));
        }
        if !self.heads.is_multiple_of(kv_heads) {
            return wrong("kv_heads", kv_heads.to_string(), format!("a divisor of model.heads ({})", self.heads));
        }
        for (key, value) in [("dropout", self.dropout), ("label_smoothing", self.label_smoothing)] {
            if !(0.0..1.0).contains(&value) {
                return wrong(key, value.to_string(), "a number from 0 to below 1".into());
            }
        }
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon.is_finite()) {
            return wrong("norm_epsilon", self.norm_epsilon.to_string(), "a number above 0".into());
        }
        if let GptPositions::Rotary(rotary) = self.positions {
            if !(self.width / self.heads).is_multiple_of(2) {
                let heads = format!("an even width a head for rotary positions ({} heads)", self.heads);
                return wrong("width", self.width.to_string(), heads);
            }
            if !(rotary.base > 1.0 && rotary.base.is_finite()) {
                return wrong("rotary_base", rotary.base.to_string(), "a number above 1".into());
            }
        }
        Ok(())
    }

    /// The model for data of `vocabulary` tokens and samples of `context` tokens.
    ///
    /// # Errors
    /// As [`GptOptions::validate`]; a vocabulary or context that is smaller than the data's.
    pub fn build<B: Backend>(&self, vocabulary: usize, context: usize) -> Result<Model<B>> {
        self.validate()?;
        let at_least = |key: &str, own: Option<usize>, of_data: usize| match own {
            Some(own) if own < of_data => Err(Error::config(
                format!("model.{key}"),
                format!("found {own}, expected at least the {of_data} of the data"),
            )),
            own => Ok(own.unwrap_or(of_data)),
        };
        let vocabulary = at_least("vocabulary", self.vocabulary, vocabulary)?;
        let context = at_least("context", self.context, context)?;
        let normal = Init::Normal { std: 0.02 };
        let foot: Sequential<B> = match self.positions {
            GptPositions::Learned => {
                Sequential::new().then("transformer", TokenAndPosition::new(vocabulary, context, self.width))
            }
            GptPositions::Rotary(_) | GptPositions::None => {
                Sequential::new().then("transformer.wte", Embedding::new(vocabulary, self.width).with_init(normal))
            }
        };
        let mut layers =
            if self.dropout > 0.0 { foot.then("transformer.drop", Dropout::new(self.dropout)) } else { foot };
        for block in 0..self.layers {
            layers.push(
                format!("transformer.h.{block}"),
                recomputed(TransformerBlock::new(self.block()), self.recompute),
            );
        }
        layers.push("transformer.ln_f", self.norm.layer(self.norm_epsilon, self.bias));
        let head: Box<dyn crate::model::Layer<B>> = if self.tied {
            Box::new(TiedLinear::new("transformer.wte.weight"))
        } else {
            Box::new(Linear::new(vocabulary).without_bias().with_init(normal, Init::Constant(0.0)))
        };
        layers.push("lm_head", head);
        let loss = Loss::CrossEntropy { label_smoothing: self.label_smoothing, ignore_index: IGNORE };
        Ok(Model::new(Box::new(layers), loss))
    }

    fn block(&self) -> BlockOptions {
        let normal = Init::Normal { std: 0.02 };
        let residual = Init::Normal { std: 0.02 / (2.0 * self.layers as f64).sqrt() };
        let rotary = match self.positions {
            GptPositions::Rotary(rotary) => Some(rotary),
            GptPositions::Learned | GptPositions::None => None,
        };
        BlockOptions {
            norm: self.norm,
            epsilon: self.norm_epsilon,
            attention: SelfAttentionOptions {
                heads: self.heads,
                kv_heads: self.kv_heads.unwrap_or(self.heads),
                causal: true,
                bias: self.bias,
                dropout: self.dropout,
                rotary,
                init: Some([normal, residual]),
            },
            hidden: self.hidden_width(),
            activation: self.activation,
            bias: self.bias,
            dropout: self.dropout,
            init: Some([normal, residual]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::model::{Input, Mode};

    fn planned(options: &GptOptions, vocabulary: usize, context: usize) -> Model<Cpu<f32>> {
        let mut model = options.build::<Cpu<f32>>(vocabulary, context).unwrap();
        model.plan(&Input::Tokens(context.min(8)), 1, Mode::Training).unwrap();
        model
    }

    #[test]
    fn the_named_sizes_have_openai_s_numbers_of_parameters() {
        for (name, parameters) in [
            ("gpt2", 124_439_808),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
        ] {
            let model = planned(&GptOptions::named(name).unwrap(), 50_257, 1024);
            assert_eq!(model.parameters().elements(), parameters, "{name}");
        }
    }

    #[test]
    fn parameters_are_called_as_nanogpt_calls_them() {
        let options = GptOptions { layers: 1, heads: 2, width: 8, bias: true, ..GptOptions::default() };
        let model = planned(&options, 5, 4);
        let found: Vec<_> = model.parameters().specs().map(|s| (s.name.as_str(), s.shape.as_slice())).collect();
        let expected: [(&str, &[usize]); 16] = [
            ("transformer.wte.weight", &[5, 8]),
            ("transformer.wpe.weight", &[4, 8]),
            ("transformer.h.0.ln_1.weight", &[8]),
            ("transformer.h.0.ln_1.bias", &[8]),
            ("transformer.h.0.attn.c_attn.weight", &[24, 8]),
            ("transformer.h.0.attn.c_attn.bias", &[24]),
            ("transformer.h.0.attn.c_proj.weight", &[8, 8]),
            ("transformer.h.0.attn.c_proj.bias", &[8]),
            ("transformer.h.0.ln_2.weight", &[8]),
            ("transformer.h.0.ln_2.bias", &[8]),
            ("transformer.h.0.mlp.c_fc.weight", &[32, 8]),
            ("transformer.h.0.mlp.c_fc.bias", &[32]),
            ("transformer.h.0.mlp.c_proj.weight", &[8, 32]),
            ("transformer.h.0.mlp.c_proj.bias", &[8]),
            ("transformer.ln_f.weight", &[8]),
            ("transformer.ln_f.bias", &[8]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_llama_like_model_can_be_made() {
        let options = GptOptions {
            layers: 2,
            heads: 4,
            kv_heads: Some(2),
            width: 16,
            norm: NormKind::RmsNorm,
            positions: GptPositions::Rotary(RotaryOptions::default()),
            activation: HiddenActivation::Swiglu,
            tied: false,
            ..GptOptions::default()
        };
        assert_eq!(options.hidden_width(), 64);
        let model = planned(&options, 11, 8);
        let shape = |name: &str| model.parameters().find(name).map(|(_, spec)| spec.shape.clone());
        assert_eq!(shape("transformer.h.1.attn.c_attn.weight"), Some(vec![32, 16]));
        assert_eq!(shape("transformer.h.1.mlp.c_fc.weight"), Some(vec![128, 16]));
        assert_eq!(shape("lm_head.weight"), Some(vec![11, 16]));
        assert_eq!(shape("transformer.wpe.weight"), None);
        assert_eq!(shape("transformer.ln_f.bias"), None);
    }

    #[test]
    fn norms_take_the_residual_sums_before_them_and_their_gradients() {
        for (norm, dropout) in [(NormKind::LayerNorm, 0.0), (NormKind::RmsNorm, 0.0), (NormKind::LayerNorm, 0.1)] {
            let options = GptOptions { layers: 3, heads: 2, width: 8, norm, dropout, ..GptOptions::default() };
            let mut model = options.build::<Cpu<f32>>(5, 4).unwrap();
            let program = model.plan(&Input::Tokens(4), 2, Mode::Training).unwrap();
            assert_eq!(program.ops.iter().filter(|op| op.name() == "add").count(), 0);
            // The sum counts to the block that it ends, whichever operation takes it.
            let [blocks, last] = ["transformer.h.", "transformer.ln_f"].map(|name| {
                program.rows.iter().filter(|row| row.name.starts_with(name)).map(|row| row.flops).collect::<Vec<_>>()
            });
            assert!(blocks.len() == 3 && blocks.iter().all(|&flops| flops == blocks[0]), "{blocks:?}");
            assert_eq!(last, [if norm == NormKind::LayerNorm { 8 } else { 4 } * 2 * 4 * 8]);
        }
    }

    #[test]
    fn options_that_cannot_be_are_refused_by_key() {
        let wrong = |change: fn(&mut GptOptions)| {
            let mut options = GptOptions::default();
            change(&mut options);
            options.validate().unwrap_err().to_string()
        };
        assert!(wrong(|o| o.heads = 5).starts_with("model.width"));
        assert!(wrong(|o| o.heads = 0).starts_with("model.heads"));
        assert!(wrong(|o| o.kv_heads = Some(5)).starts_with("model.kv_heads"));
        assert!(wrong(|o| o.dropout = 1.0).starts_with("model.dropout"));
        assert!(wrong(|o| o.norm_epsilon = f64::NAN).starts_with("model.norm_epsilon"));
        let small = GptOptions { vocabulary: Some(10), ..GptOptions::default() };
        let Err(error) = small.build::<Cpu<f32>>(11, 4) else { panic!("a vocabulary below the data's is refused") };
        assert_eq!(error.to_string(), "model.vocabulary: found 10, expected at least the 11 of the data");
    }
}
