//! `[[model.layers]]`: a model as a list of layers in the run file.

use super::{Fit, Goal, check, check_dropout, recomputed};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::{Error, Result};
use crate::model::layers::{
    Activation, AveragePool2d, BatchNorm, Conv2d, Dropout, Embedding, Flatten, LayerNorm, Linear, MaxPool2d,
    MeanOverTime, Positions, Residual, RmsNorm, RotaryOptions, SelfAttention, SelfAttentionOptions, Sequential, Swiglu,
    Window,
};

/// One `[[model.layers]]` table: `kind` and its keys.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerOptions {
    /// `linear`: `outputs` (the data's where not given), `bias`.
    Linear {
        /// Width of the output.
        outputs: Option<usize>,
        /// Whether there is a bias.
        bias: bool,
    },
    /// `conv2d`: `filters`, `kernel`, `stride`, `padding`, `groups`, `bias`.
    Conv2d {
        /// Channels of the output.
        filters: usize,
        /// Height and width.
        kernel: [usize; 2],
        /// Step.
        stride: [usize; 2],
        /// Zeros around the input.
        padding: [usize; 2],
        /// Groups of channels that do not mix.
        groups: usize,
        /// Whether there is a bias.
        bias: bool,
    },
    /// `max_pool2d`: `kernel` (the whole picture where not given), `stride`, `padding`.
    MaxPool2d(Window),
    /// `average_pool2d`, likewise.
    AveragePool2d(Window),
    /// `batch_norm`: `epsilon`, `momentum`.
    BatchNorm {
        /// Added to the variance.
        epsilon: f64,
        /// Share of the batch in running statistics.
        momentum: f64,
    },
    /// `layer_norm`: `epsilon`, `bias`.
    LayerNorm {
        /// Added to the variance.
        epsilon: f64,
        /// Whether there is a bias.
        bias: bool,
    },
    /// `rms_norm`: `epsilon`.
    RmsNorm {
        /// Added to the mean of squares.
        epsilon: f64,
    },
    /// `embedding`: `width`.
    Embedding {
        /// Width of a vector.
        width: usize,
    },
    /// `positions`: a learned vector for each position.
    Positions,
    /// `attention`: `heads`, `kv_heads`, `causal`, `bias`, `dropout`, `rotary`.
    Attention {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: Option<usize>,
        /// Whether a position sees itself and earlier ones only.
        causal: bool,
        /// Whether there are biases.
        bias: bool,
        /// Dropout of probabilities.
        dropout: f64,
        /// Rotary positions with base 10,000.
        rotary: bool,
    },
    /// `relu`, `gelu`, `gelu_tanh`, `silu`, `sigmoid`, `tanh`.
    Activation(ActivationKind),
    /// `swiglu`.
    Swiglu,
    /// `dropout`: `probability`.
    Dropout {
        /// Probability of a 0.
        probability: f64,
    },
    /// `flatten`.
    Flatten,
    /// `mean_over_time`.
    MeanOverTime,
    /// `residual`: `layers`, `shortcut` where the shape changes, and `recompute`.
    Residual {
        /// The branch.
        layers: Vec<LayerOptions>,
        /// The other path.
        shortcut: Vec<LayerOptions>,
        /// Whether it keeps its input alone, and computes the rest again in the backward.
        recompute: bool,
    },
}

impl LayerOptions {
    /// Whether it is a convolution, or holds one.
    pub(super) fn has_convolutions(&self) -> bool {
        match self {
            LayerOptions::Conv2d { .. } => true,
            LayerOptions::Residual { layers, shortcut, .. } => {
                layers.iter().chain(shortcut).any(LayerOptions::has_convolutions)
            }
            _ => false,
        }
    }
}

/// The list as a model; layers are named by their number.
///
/// # Errors
/// A layer whose options are out of their range.
pub(super) fn build<B: Backend>(list: &[LayerOptions], fit: &Fit) -> Result<Sequential<B>> {
    check("layers", !list.is_empty(), "no layer", "one or more")?;
    sequence(list, fit)
}

/// Layers, or none, one after another.
fn sequence<B: Backend>(list: &[LayerOptions], fit: &Fit) -> Result<Sequential<B>> {
    let mut layers = Sequential::new();
    for (number, options) in list.iter().enumerate() {
        push(&mut layers, number.to_string(), options, fit).map_err(|e| match e {
            Error::Config { place, problem } => {
                let key = place.strip_prefix("model.").unwrap_or(&place).to_owned();
                Error::config(format!("model.layers[{number}].{key}"), problem)
            }
            other => other,
        })?;
    }
    Ok(layers)
}

fn push<B: Backend>(layers: &mut Sequential<B>, name: String, options: &LayerOptions, fit: &Fit) -> Result<()> {
    match options {
        LayerOptions::Linear { outputs, bias } => {
            let outputs = outputs.unwrap_or(fit.outputs);
            check("outputs", outputs > 0, outputs, "1 or more")?;
            let layer = Linear::new(outputs);
            layers.push(name, Box::new(if *bias { layer } else { layer.without_bias() }));
        }
        LayerOptions::Conv2d { filters, kernel, stride, padding, groups, bias } => {
            check("filters", *filters > 0, filters, "1 or more")?;
            check("kernel", kernel.iter().all(|&k| k > 0), "0", "1 or more")?;
            check("stride", stride.iter().all(|&k| k > 0), "0", "1 or more")?;
            check("groups", *groups > 0, groups, "1 or more")?;
            let layer = Conv2d::new(*filters, *kernel).with_stride(*stride).with_padding(*padding).with_groups(*groups);
            layers.push(name, Box::new(if *bias { layer } else { layer.without_bias() }));
        }
        LayerOptions::MaxPool2d(window) => layers.push(name, Box::new(MaxPool2d::new(checked(window)?))),
        LayerOptions::AveragePool2d(window) => layers.push(name, Box::new(AveragePool2d::new(checked(window)?))),
        LayerOptions::BatchNorm { epsilon, momentum } => {
            check("epsilon", *epsilon > 0.0, epsilon, "a number above 0")?;
            check("momentum", (0.0..=1.0).contains(momentum), momentum, "a number from 0 to 1")?;
            layers.push(name, Box::new(BatchNorm::new().with_constants(*epsilon, *momentum)));
        }
        LayerOptions::LayerNorm { epsilon, bias } => {
            check("epsilon", *epsilon > 0.0, epsilon, "a number above 0")?;
            let layer = LayerNorm::new(*epsilon);
            layers.push(name, Box::new(if *bias { layer } else { layer.without_bias() }));
        }
        LayerOptions::RmsNorm { epsilon } => {
            check("epsilon", *epsilon > 0.0, epsilon, "a number above 0")?;
            layers.push(name, Box::new(RmsNorm::new(*epsilon)));
        }
        LayerOptions::Embedding { width } => {
            check("width", *width > 0, width, "1 or more")?;
            let Some(vocabulary) = fit.vocabulary else {
                return Err(Error::config(
                    "kind",
                    "found \"embedding\", which takes tokens, with data of real values; leave the layer out",
                ));
            };
            let table = Embedding::new(vocabulary, *width);
            layers.push(
                name,
                Box::new(match fit.padding {
                    Some(pad) => table.with_padding(pad),
                    None => table,
                }),
            );
        }
        LayerOptions::Positions => {
            let context = fit.context.unwrap_or(0);
            check("kind", context > 0, "\"positions\"", "data of tokens for it")?;
            layers.push(name, Box::new(Positions::new(context)));
        }
        LayerOptions::Attention { heads, kv_heads, causal, bias, dropout, rotary } => {
            check("heads", *heads > 0, heads, "1 or more")?;
            let shared = kv_heads.unwrap_or(*heads);
            let divides = shared > 0 && heads.is_multiple_of(shared);
            check("kv_heads", divides, shared, &format!("a divisor of heads ({heads})"))?;
            check_dropout(*dropout)?;
            let sees_targets = fit.goal == Goal::NextToken && !causal;
            let expected =
                "true with data of text or tokens: a position that sees those after it sees what it is to tell";
            check("causal", !sees_targets, "false", expected)?;
            layers.push(
                name,
                Box::new(SelfAttention::new(SelfAttentionOptions {
                    heads: *heads,
                    kv_heads: shared,
                    causal: *causal,
                    bias: *bias,
                    dropout: *dropout,
                    rotary: rotary.then(RotaryOptions::default),
                    init: None,
                })),
            );
        }
        LayerOptions::Activation(kind) => layers.push(name, Box::new(Activation::new(*kind))),
        LayerOptions::Swiglu => layers.push(name, Box::new(Swiglu::new())),
        LayerOptions::Dropout { probability } => {
            check_dropout(*probability)?;
            layers.push(name, Box::new(Dropout::new(*probability)));
        }
        LayerOptions::Flatten => layers.push(name, Box::new(Flatten::new())),
        LayerOptions::MeanOverTime => layers.push(name, Box::new(MeanOverTime::new())),
        LayerOptions::Residual { layers: branch, shortcut, recompute } => {
            let residual = Residual::new("layers", sequence(branch, fit)?);
            let residual = if shortcut.is_empty() {
                residual
            } else {
                residual.with_shortcut("shortcut", sequence(shortcut, fit)?)
            };
            layers.push(name, recomputed(residual, *recompute));
        }
    }
    Ok(())
}

fn checked(window: &Window) -> Result<Window> {
    check("stride", window.stride.iter().all(|&s| s > 0), "0", "1 or more")?;
    Ok(*window)
}
