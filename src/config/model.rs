//! `[model]`.

use super::section::Section;
use super::tree::Node;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::layers::{HiddenActivation, NormKind, RotaryOptions, Window};
use crate::model::presets::{
    AudioCnnOptions, CnnOptions, GptOptions, GptPositions, LayerOptions, LinearOptions, LossKind, MlpOptions,
    ModelOptions, Preset, ResNetOptions, ResNetStem, TextCnnOptions, TextEncoderOptions,
};

const PRESETS: [(&str, Name); 13] = [
    ("linear", Name::Linear),
    ("logistic", Name::Logistic),
    ("mlp", Name::Mlp),
    ("cnn", Name::Cnn),
    ("resnet", Name::ResNet),
    ("gpt", Name::Gpt("")),
    ("gpt2", Name::Gpt("gpt2")),
    ("gpt2-medium", Name::Gpt("gpt2-medium")),
    ("gpt2-large", Name::Gpt("gpt2-large")),
    ("gpt2-xl", Name::Gpt("gpt2-xl")),
    ("text_cnn", Name::TextCnn),
    ("text_encoder", Name::TextEncoder),
    ("audio_cnn", Name::AudioCnn),
];

#[derive(Clone, Copy)]
enum Name {
    Linear,
    Logistic,
    Mlp,
    Cnn,
    ResNet,
    Gpt(&'static str),
    TextCnn,
    TextEncoder,
    AudioCnn,
}

/// Functions by name.
fn activations() -> [(&'static str, ActivationKind); 6] {
    ActivationKind::ALL.map(|kind| (kind.name(), kind))
}

/// Reads `[model]`.
///
/// # Errors
/// A key that is unknown, of another type, or missing.
pub fn model(section: &mut Section) -> Result<ModelOptions> {
    let preset = match (matches!(section.node("layers"), Some(Node::Array(_))), section.has("preset")) {
        (true, true) => {
            return Err(section.error("preset", "found both a preset and [[model.layers]], expected one of them"));
        }
        (true, false) => {
            let mut tables = section.sections("layers")?.unwrap_or_default();
            let list = tables.iter_mut().map(layer).collect::<Result<Vec<_>>>()?;
            section.close_all("layers", tables)?;
            Preset::Layers(list)
        }
        (false, _) => preset(section)?,
    };
    let loss = section.choice(
        "loss",
        &[
            ("cross_entropy", LossKind::CrossEntropy),
            ("mean_squared_error", LossKind::MeanSquaredError),
            ("binary_cross_entropy", LossKind::BinaryCrossEntropy),
        ],
    )?;
    let options = ModelOptions { preset, loss, label_smoothing: section.or("label_smoothing", 0.0)? };
    // Models are made layer by layer, before anything of them is found too large.
    match &options.preset {
        Preset::Gpt(gpt) => at_most(section, "layers", gpt.layers)?,
        Preset::TextEncoder(encoder) => at_most(section, "layers", encoder.layers)?,
        Preset::Cnn(cnn) => at_most(section, "convolutions", cnn.convolutions)?,
        Preset::ResNet(resnet) => at_most(section, "blocks", resnet.blocks.iter().copied().max().unwrap_or(0))?,
        _ => {}
    }
    Ok(options)
}

/// More layers than any model has.
const MOST_LAYERS: usize = 10_000;

fn at_most(section: &Section, key: &str, found: usize) -> Result<()> {
    if found <= MOST_LAYERS {
        return Ok(());
    }
    Err(section.error(key, format!("found {found}, expected at most {MOST_LAYERS}")))
}

fn preset(section: &mut Section) -> Result<Preset> {
    let Some(name) = section.choice("preset", &PRESETS)? else {
        let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
        return Err(section.missing("preset", &format!("one of {}, or [[model.layers]]", names.join(", "))));
    };
    if let Some(Node::String(name)) = section.node("preset").cloned() {
        section.decides("preset", &name);
    }
    let linear = |section: &mut Section| -> Result<LinearOptions> {
        let LinearOptions { bias, zero_init } = LinearOptions::default();
        Ok(LinearOptions { bias: section.or("bias", bias)?, zero_init: section.or("zero_init", zero_init)? })
    };
    Ok(match name {
        Name::Linear => Preset::Linear(linear(section)?),
        Name::Logistic => Preset::Logistic(linear(section)?),
        Name::Mlp => {
            let d = MlpOptions::default();
            Preset::Mlp(MlpOptions {
                hidden: section.or("hidden", d.hidden)?,
                activation: section.choice_or("activation", &activations(), "relu")?,
                dropout: section.or("dropout", d.dropout)?,
                batch_norm: section.or("batch_norm", d.batch_norm)?,
            })
        }
        Name::Cnn => {
            let d = CnnOptions::default();
            Preset::Cnn(CnnOptions {
                channels: section.or("channels", d.channels)?,
                kernel: section.or("kernel", d.kernel)?,
                convolutions: section.or("convolutions", d.convolutions)?,
                hidden: section.or("hidden", d.hidden)?,
                activation: section.choice_or("activation", &activations(), "relu")?,
                batch_norm: section.or("batch_norm", d.batch_norm)?,
                dropout: section.or("dropout", d.dropout)?,
            })
        }
        Name::ResNet => Preset::ResNet(resnet(section)?),
        Name::Gpt(size) => Preset::Gpt(gpt(section, size)?),
        Name::TextCnn => {
            let d = TextCnnOptions::default();
            Preset::TextCnn(TextCnnOptions {
                width: section.or("width", d.width)?,
                kernels: section.or("kernels", d.kernels)?,
                filters: section.or("filters", d.filters)?,
                dropout: section.or("dropout", d.dropout)?,
            })
        }
        Name::TextEncoder => {
            let d = TextEncoderOptions::default();
            Preset::TextEncoder(TextEncoderOptions {
                layers: section.or("layers", d.layers)?,
                heads: section.or("heads", d.heads)?,
                width: section.or("width", d.width)?,
                hidden: section.optional("hidden")?,
                dropout: section.or("dropout", d.dropout)?,
                label_smoothing: d.label_smoothing,
                recompute: section.or("recompute", d.recompute)?,
            })
        }
        Name::AudioCnn => {
            let d = AudioCnnOptions::default();
            Preset::AudioCnn(AudioCnnOptions {
                channels: section.or("channels", d.channels)?,
                dropout: section.or("dropout", d.dropout)?,
            })
        }
    })
}

fn resnet(section: &mut Section) -> Result<ResNetOptions> {
    let defaults = match section.optional::<usize>("depth")? {
        Some(depth) => ResNetOptions::of_depth(depth).ok_or_else(|| {
            section.error("depth", format!("found {depth}, expected 18 or 34, or 6 n + 2 as in 20, 32, 44, 56, 110"))
        })?,
        None => ResNetOptions::default(),
    };
    let stem = match defaults.stem {
        ResNetStem::Imagenet => "imagenet",
        ResNetStem::Cifar => "cifar",
    };
    Ok(ResNetOptions {
        stem: section.choice_or("stem", &[("imagenet", ResNetStem::Imagenet), ("cifar", ResNetStem::Cifar)], stem)?,
        blocks: section.or("blocks", defaults.blocks)?,
        channels: section.or("channels", defaults.channels)?,
        zero_init_residual: section.or("zero_init_residual", defaults.zero_init_residual)?,
        recompute: section.or("recompute", defaults.recompute)?,
    })
}

fn gpt(section: &mut Section, size: &str) -> Result<GptOptions> {
    let d = GptOptions::named(size).unwrap_or_default();
    let positions = section.choice_or("positions", &[("learned", 0), ("rotary", 1), ("none", 2)], "learned")?;
    let positions = match positions {
        0 => GptPositions::Learned,
        1 => GptPositions::Rotary(RotaryOptions {
            base: section.or("rotary_base", RotaryOptions::default().base)?,
            interleaved: section.or("rotary_interleaved", false)?,
        }),
        _ => GptPositions::None,
    };
    section.reject(&["rotary_base", "rotary_interleaved"], "goes with positions = \"rotary\" alone")?;
    let activations: Vec<(&str, HiddenActivation)> = activations()
        .into_iter()
        .map(|(name, kind)| (name, HiddenActivation::Pointwise(kind)))
        .chain([("swiglu", HiddenActivation::Swiglu)])
        .collect();
    let mut optional = |key: &str, default: Option<usize>| match default {
        Some(default) => section.or(key, default).map(Some),
        None => section.optional(key),
    };
    let (context, vocabulary) = (optional("context", d.context)?, optional("vocabulary", d.vocabulary)?);
    Ok(GptOptions {
        layers: section.or("layers", d.layers)?,
        heads: section.or("heads", d.heads)?,
        kv_heads: section.optional("kv_heads")?,
        width: section.or("width", d.width)?,
        hidden: section.optional("hidden")?,
        context,
        vocabulary,
        bias: section.or("bias", d.bias)?,
        dropout: section.or("dropout", d.dropout)?,
        norm: section.choice_or(
            "norm",
            &[("layer_norm", NormKind::LayerNorm), ("rms_norm", NormKind::RmsNorm)],
            "layer_norm",
        )?,
        norm_epsilon: section.or("norm_epsilon", d.norm_epsilon)?,
        positions,
        activation: section.choice_or("activation", &activations, "gelu_tanh")?,
        tied: section.or("tied", d.tied)?,
        label_smoothing: d.label_smoothing,
        recompute: section.or("recompute", d.recompute)?,
    })
}

const LAYERS: [&str; 18] = [
    "linear",
    "conv2d",
    "max_pool2d",
    "average_pool2d",
    "batch_norm",
    "layer_norm",
    "rms_norm",
    "embedding",
    "positions",
    "attention",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
    "swiglu",
    "dropout",
];
const MORE_LAYERS: [&str; 3] = ["flatten", "mean_over_time", "residual"];

fn layer(section: &mut Section) -> Result<LayerOptions> {
    let names: Vec<(&str, &str)> = LAYERS.iter().chain(&MORE_LAYERS).map(|name| (*name, *name)).collect();
    let Some(kind) = section.choice("kind", &names)? else {
        return Err(section.missing("kind", "the layer's name, as in kind = \"linear\""));
    };
    section.decides("kind", kind);
    Ok(match kind {
        "linear" => LayerOptions::Linear { outputs: section.optional("outputs")?, bias: section.or("bias", true)? },
        "conv2d" => LayerOptions::Conv2d {
            filters: section.required("filters")?,
            kernel: pair(section, "kernel", None)?,
            stride: pair(section, "stride", Some(1))?,
            padding: pair(section, "padding", Some(0))?,
            groups: section.or("groups", 1usize)?,
            bias: section.or("bias", true)?,
        },
        "max_pool2d" => LayerOptions::MaxPool2d(window(section)?),
        "average_pool2d" => LayerOptions::AveragePool2d(window(section)?),
        "batch_norm" => {
            LayerOptions::BatchNorm { epsilon: section.or("epsilon", 1e-5)?, momentum: section.or("momentum", 0.1)? }
        }
        "layer_norm" => {
            LayerOptions::LayerNorm { epsilon: section.or("epsilon", 1e-5)?, bias: section.or("bias", true)? }
        }
        "rms_norm" => LayerOptions::RmsNorm { epsilon: section.or("epsilon", 1e-6)? },
        "embedding" => LayerOptions::Embedding { width: section.required("width")? },
        "positions" => LayerOptions::Positions,
        "attention" => LayerOptions::Attention {
            heads: section.required("heads")?,
            kv_heads: section.optional("kv_heads")?,
            causal: section.or("causal", false)?,
            bias: section.or("bias", true)?,
            dropout: section.or("dropout", 0.0)?,
            rotary: section.or("rotary", false)?,
        },
        "swiglu" => LayerOptions::Swiglu,
        "dropout" => LayerOptions::Dropout { probability: section.or("probability", 0.5)? },
        "flatten" => LayerOptions::Flatten,
        "mean_over_time" => LayerOptions::MeanOverTime,
        "residual" => {
            let mut nested = |key: &str| -> Result<Vec<LayerOptions>> {
                let Some(mut tables) = section.sections(key)? else { return Ok(Vec::new()) };
                let layers = tables.iter_mut().map(layer).collect::<Result<Vec<_>>>()?;
                section.close_all(key, tables)?;
                Ok(layers)
            };
            let (layers, shortcut) = (nested("layers")?, nested("shortcut")?);
            LayerOptions::Residual { layers, shortcut, recompute: section.or("recompute", false)? }
        }
        activation => {
            let kind = ActivationKind::ALL.into_iter().find(|kind| kind.name() == activation);
            LayerOptions::Activation(kind.unwrap_or(ActivationKind::Relu))
        }
    })
}

/// `key = 3` or `key = [3, 5]`: height and width.
fn pair(section: &mut Section, key: &str, default: Option<usize>) -> Result<[usize; 2]> {
    let single = !matches!(section.node(key), Some(Node::Array(_)));
    if !single {
        return section.required(key);
    }
    let side = match default {
        Some(default) => section.or(key, default)?,
        None => section.required(key)?,
    };
    Ok([side, side])
}

fn window(section: &mut Section) -> Result<Window> {
    if !section.has("kernel") {
        return Ok(Window::global());
    }
    let kernel = pair(section, "kernel", None)?;
    let stride = if section.has("stride") { pair(section, "stride", None)? } else { kernel };
    Ok(Window { kernel, stride, padding: pair(section, "padding", Some(0))? })
}
