//! Whole models, each from options that a run file can give. Each preset's options stand beside its builder.

mod audio_cnn;
mod cnn;
mod dense;
mod gpt;
mod list;
mod resnet;
mod text_cnn;
mod text_encoder;

pub use audio_cnn::AudioCnnOptions;
pub use cnn::CnnOptions;
pub use dense::{LinearOptions, MlpOptions};
pub use gpt::{GptOptions, GptPositions};
pub use list::LayerOptions;
pub use resnet::{ResNetOptions, ResNetStem};
pub use text_cnn::TextCnnOptions;
pub use text_encoder::TextEncoderOptions;

use std::fmt;

use super::asked::{Asked, Made};
use super::layers::{Activation, Dropout, Recompute, Sequential};
use super::{Layer, Loss, Model};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::{Error, Result};

/// What a model is to tell of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// One of so many classes.
    Classes(usize),
    /// So many values.
    Values(usize),
    /// The token after each token.
    NextToken,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Goal::Classes(classes) => write!(f, "{classes} classes"),
            Goal::Values(1) => write!(f, "1 real value a sample"),
            Goal::Values(width) => write!(f, "{width} real values a sample"),
            Goal::NextToken => write!(f, "the next token"),
        }
    }
}

impl Goal {
    /// The losses that fit, as `model.loss` has them.
    fn losses(self) -> &'static str {
        match self {
            Goal::Classes(2) => "\"cross_entropy\" or \"binary_cross_entropy\"",
            Goal::Classes(_) | Goal::NextToken => "\"cross_entropy\"",
            Goal::Values(_) => "\"mean_squared_error\" or \"binary_cross_entropy\", or data whose targets are classes",
        }
    }
}

/// What a preset has to fit: the data on one side, the targets on the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Number of distinct tokens, where inputs are tokens.
    pub vocabulary: Option<usize>,
    /// Tokens a sample, where inputs are tokens.
    pub context: Option<usize>,
    /// What is to be told.
    pub goal: Goal,
    /// The token that stands for nothing, where there is one.
    pub padding: Option<i32>,
    /// Outputs a sample; set by [`ModelOptions::build`] by goal and loss.
    pub outputs: usize,
}

/// A preset with its options, or a list of layers.
#[derive(Clone, Debug, PartialEq)]
pub enum Preset {
    /// `linear`: linear regression.
    Linear(LinearOptions),
    /// `logistic`: logistic regression.
    Logistic(LinearOptions),
    /// `mlp`.
    Mlp(MlpOptions),
    /// `cnn`.
    Cnn(CnnOptions),
    /// `resnet`.
    ResNet(ResNetOptions),
    /// `gpt`, `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`.
    Gpt(GptOptions),
    /// `text_cnn`.
    TextCnn(TextCnnOptions),
    /// `text_encoder`.
    TextEncoder(TextEncoderOptions),
    /// `audio_cnn`.
    AudioCnn(AudioCnnOptions),
    /// `[[model.layers]]`.
    Layers(Vec<LayerOptions>),
}

impl Preset {
    /// The name as `model.preset` has it; `layers` for a list of them.
    pub fn name(&self) -> &'static str {
        match self {
            Preset::Linear(_) => "linear",
            Preset::Logistic(_) => "logistic",
            Preset::Mlp(_) => "mlp",
            Preset::Cnn(_) => "cnn",
            Preset::ResNet(_) => "resnet",
            Preset::Gpt(_) => "gpt",
            Preset::TextCnn(_) => "text_cnn",
            Preset::TextEncoder(_) => "text_encoder",
            Preset::AudioCnn(_) => "audio_cnn",
            Preset::Layers(_) => "layers",
        }
    }

    /// Fails where it tells of whole samples, and the next token is asked for, or takes real values, and is given tokens.
    fn takes(&self, fit: &Fit) -> Result<()> {
        use Preset::{AudioCnn, Cnn, Linear, Logistic, Mlp, ResNet, TextCnn, TextEncoder};
        let next_token = fit.goal == Goal::NextToken;
        let wrong = |problem: String| Err(Error::config("model.preset", problem));
        let name = self.name();
        if next_token && matches!(self, Linear(_) | Logistic(_) | Mlp(_) | TextCnn(_) | TextEncoder(_)) {
            return wrong(format!("found \"{name}\", which tells of whole samples, expected \"gpt\" for text"));
        }
        let values = matches!(self, Linear(_) | Logistic(_) | Mlp(_) | Cnn(_) | ResNet(_) | AudioCnn(_));
        if values && fit.vocabulary.is_some() {
            let fitting = if next_token { "\"gpt\"" } else { "\"text_cnn\" or \"text_encoder\"" };
            return wrong(format!(
                "found \"{name}\", which takes real values, with data of tokens; expected {fitting}"
            ));
        }
        Ok(())
    }
}

/// `model.loss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossKind {
    /// `cross_entropy`: for classes and tokens.
    CrossEntropy,
    /// `mean_squared_error`: for values.
    MeanSquaredError,
    /// `binary_cross_entropy`: for values from 0 to 1, or two classes.
    BinaryCrossEntropy,
}

/// As `model.loss` has it.
impl fmt::Display for LossKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LossKind::CrossEntropy => "cross_entropy",
            LossKind::MeanSquaredError => "mean_squared_error",
            LossKind::BinaryCrossEntropy => "binary_cross_entropy",
        })
    }
}

/// The `[model]` table.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelOptions {
    /// `model.preset` and its options.
    pub preset: Preset,
    /// `model.loss`; where not given, cross-entropy for classes (binary for `logistic` with two), squares for values.
    pub loss: Option<LossKind>,
    /// `model.label_smoothing` (default 0).
    pub label_smoothing: f64,
}

/// The target that does not count, as PyTorch's `ignore_index`.
const IGNORE: i32 = -100;

impl ModelOptions {
    /// Whether it holds convolutions, which some devices need a library for.
    pub fn has_convolutions(&self) -> bool {
        match &self.preset {
            Preset::Cnn(_) | Preset::ResNet(_) | Preset::TextCnn(_) | Preset::AudioCnn(_) => true,
            Preset::Layers(layers) => layers.iter().any(LayerOptions::has_convolutions),
            Preset::Linear(_) | Preset::Logistic(_) | Preset::Mlp(_) | Preset::Gpt(_) | Preset::TextEncoder(_) => false,
        }
    }

    /// The model for this data.
    ///
    /// # Errors
    /// An option out of its range, or a preset that does not fit the data.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Model<B>> {
        check(
            "label_smoothing",
            (0.0..1.0).contains(&self.label_smoothing),
            self.label_smoothing,
            "a number from 0 to below 1",
        )?;
        let binary = matches!(
            (&self.preset, self.loss, fit.goal),
            (_, Some(LossKind::BinaryCrossEntropy), _) | (Preset::Logistic(_), None, Goal::Classes(2))
        );
        let (loss, outputs) = match (fit.goal, self.loss) {
            (Goal::Classes(2), _) if binary => (Loss::BinaryCrossEntropy, 1),
            (Goal::Values(width), _) if binary => (Loss::BinaryCrossEntropy, width),
            (Goal::Classes(classes), None | Some(LossKind::CrossEntropy)) => (self.cross_entropy(), classes),
            (Goal::Values(width), None | Some(LossKind::MeanSquaredError)) => (Loss::MeanSquaredError, width),
            (Goal::NextToken, None | Some(LossKind::CrossEntropy)) => (self.cross_entropy(), fit.tokens("layers")?),
            (goal, Some(loss)) => {
                return Err(Error::config(
                    "model.loss",
                    format!("found \"{loss}\", which does not fit targets of {goal}; expected {}", goal.losses()),
                ));
            }
        };
        if self.label_smoothing > 0.0 && !matches!(loss, Loss::CrossEntropy { .. }) {
            let by_default = if self.loss.is_none() { " by default" } else { "" };
            return Err(Error::config(
                "model.label_smoothing",
                format!(
                    "found {}, but the loss is{by_default} another than \"cross_entropy\", which alone spreads targets over classes; \
                     leave the key out, or set model.loss = \"cross_entropy\" where targets are classes",
                    self.label_smoothing
                ),
            ));
        }
        let fit = Fit { outputs, ..*fit };
        self.preset.takes(&fit)?;
        let layers = match &self.preset {
            Preset::Linear(options) | Preset::Logistic(options) => options.build(&fit)?,
            Preset::Mlp(options) => options.build(&fit)?,
            Preset::Cnn(options) => options.build(&fit)?,
            Preset::ResNet(options) => options.build(&fit)?,
            Preset::TextCnn(options) => options.build(&fit)?,
            Preset::AudioCnn(options) => options.build(&fit)?,
            Preset::Layers(list) => list::build(list, &fit)?,
            Preset::TextEncoder(options) => {
                let options = TextEncoderOptions { label_smoothing: self.label_smoothing, ..options.clone() };
                let context = fit.context.unwrap_or(0);
                let model = options.build(fit.tokens("text_encoder")?, context, fit.padding, fit.outputs)?;
                return Ok(Model { loss, ..model });
            }
            Preset::Gpt(options) => return self.gpt(options, &fit),
        };
        let made = match &self.preset {
            Preset::Layers(list) => Made::of_layers(list),
            preset => Made::Preset {
                name: preset.name(),
                pictures: matches!(preset, Preset::Cnn(_) | Preset::ResNet(_) | Preset::AudioCnn(_)),
            },
        };
        Ok(Model::new(Box::new(layers), loss).asked_by(Asked { made, goal: fit.goal, outputs }))
    }

    fn gpt<B: Backend>(&self, options: &GptOptions, fit: &Fit) -> Result<Model<B>> {
        if fit.goal != Goal::NextToken {
            return Err(Error::config(
                "model.preset",
                "found \"gpt\", which tells the next token, expected data of format \"text\" or \"tokens\"",
            ));
        }
        let options = GptOptions { label_smoothing: self.label_smoothing, ..options.clone() };
        options.build(fit.tokens("gpt")?, fit.context.unwrap_or(0))
    }

    fn cross_entropy(&self) -> Loss {
        Loss::CrossEntropy { label_smoothing: self.label_smoothing, ignore_index: IGNORE }
    }
}

impl Fit {
    /// The vocabulary.
    ///
    /// # Errors
    /// The data holds no tokens.
    pub fn tokens(&self, preset: &str) -> Result<usize> {
        self.vocabulary.ok_or_else(|| {
            Error::config(
                "model.preset",
                format!("found \"{preset}\", which takes tokens, with data of real values; expected another preset"),
            )
        })
    }
}

/// The layer, computed again in the backward where that is asked for.
fn recomputed<B: Backend>(layer: impl Layer<B> + 'static, recompute: bool) -> Box<dyn Layer<B>> {
    if recompute { Box::new(Recompute::new(layer)) } else { Box::new(layer) }
}

/// Checks a preset's number.
fn check(key: &str, fits: bool, found: impl std::fmt::Display, expected: &str) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::config(format!("model.{key}"), format!("found {found}, expected {expected}")))
}

/// Checks a probability of dropout.
fn check_dropout(dropout: f64) -> Result<()> {
    check("dropout", (0.0..1.0).contains(&dropout), dropout, "a number from 0 to below 1")
}

/// Appends an activation, and dropout where there is some, under PyTorch's running numbers.
fn push_numbered<B: Backend>(layers: &mut Sequential<B>, number: &mut usize, kind: ActivationKind, dropout: f64) {
    layers.push(number.to_string(), Box::new(Activation::new(kind)));
    *number += 1;
    if dropout > 0.0 {
        layers.push(number.to_string(), Box::new(Dropout::new(dropout)));
        *number += 1;
    }
}
