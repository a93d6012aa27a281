//! The works that are timed as a whole: models, their batches, their optimizers; and updates alone.
//!
//! Peers do the same, in `benches/peers/`: shapes, data types and optimizers are told by [`super::results::Work`], which both
//! sides must agree on.

use super::place::Bed;
use super::results::Work;
use super::samples;
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::backend::profile::Kind;
use crate::data::{Batch, InputSpec, Inputs, LogMelOptions, TargetSpec, Targets};
use crate::error::{Error, Result};
use crate::log_mel::LogMel as Transform;
use crate::model::layers::LogMel;
use crate::model::presets::{
    AudioCnnOptions, CnnOptions, Fit, Goal, GptOptions, MlpOptions, ModelOptions, Preset, ResNetOptions,
};
use crate::model::{Input, Model};
use crate::optim::{Clip, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule};
use crate::random::{Philox, Purpose};

/// The models, smallest first.
pub const MODELS: [&str; 6] = ["mlp", "cnn", "gpt_cpu", "audio_cnn", "resnet18", "gpt2"];

/// Samples a second of the recordings that `audio_cnn` hears.
const SAMPLE_RATE: u32 = 16_000;

/// A model, a batch, and how it is trained.
#[derive(Clone, Debug)]
pub struct Training {
    /// One of [`MODELS`].
    pub name: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    preset: Preset,
    fit: Fit,
    /// A sample's input.
    pub input: Input,
    /// Samples of a batch.
    pub batch: usize,
    /// Rule, clip, decay.
    pub optimizer: OptimizerOptions,
}

/// Momentum as PyTorch has it.
pub fn momentum(nesterov: bool) -> Rule {
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov, gamma: 1.0 }
}

/// Every rule by its name.
pub fn rules() -> [(&'static str, Rule); 9] {
    let betas = [0.9, 0.95];
    [
        ("sgd", Rule::Sgd),
        ("momentum", momentum(false)),
        ("nesterov", momentum(true)),
        ("adam", Rule::Adam { betas, epsilon: 1e-8 }),
        ("adamw", Rule::Adam { betas, epsilon: 1e-8 }),
        ("lion", Rule::Lion { betas: [0.9, 0.99] }),
        ("lamb", Rule::Lamb { betas, epsilon: 1e-6 }),
        ("lars", Rule::Lars { momentum: 0.9, trust: 1e-3 }),
        ("muon", Rule::Muon { momentum: 0.95, nesterov: true, steps: 5, scale: MuonScale::Original }),
    ]
}

/// Every clip by its name. Bounds are such that each of them bites.
pub fn clips() -> [(&'static str, Clip); 5] {
    let norm = |norm| Clip { value: None, norm };
    [
        ("none", Clip::default()),
        ("value", Clip { value: Some(0.5), norm: NormClip::Off }),
        ("global_norm", norm(NormClip::Global { max_norm: 1.0 })),
        ("tensor_norm", norm(NormClip::Tensor { max_norm: 1.0 })),
        ("adaptive", norm(NormClip::Adaptive { clipping: 1e-2, epsilon: 1e-3 })),
    ]
}

fn clipped(rule: Rule, learning_rate: f64) -> OptimizerOptions {
    let clip = Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } };
    OptimizerOptions { clip, ..OptimizerOptions::new(rule, learning_rate) }
}

fn adamw(betas: [f64; 2], learning_rate: f64) -> OptimizerOptions {
    OptimizerOptions {
        weight_decay: 0.1,
        decoupled: true,
        decay_matrices_only: true,
        ..clipped(Rule::Adam { betas, epsilon: 1e-8 }, learning_rate)
    }
}

/// Threads that a backend computes with; 0 on a GPU.
pub fn threads<B: Bed>(backend: &B) -> usize {
    if backend.kind() == Kind::Host { rayon::current_num_threads() } else { 0 }
}

/// The model of this name, at the size that suits the device: that of the peers, a small one on the emulated device.
///
/// # Errors
/// Another name than [`MODELS`].
pub fn training<B: Bed>(backend: &B, name: &str) -> Result<Training> {
    let kind = backend.kind();
    let classes =
        |outputs| Fit { vocabulary: None, context: None, goal: Goal::Classes(outputs), padding: None, outputs };
    let tokens = |vocabulary, context| Fit {
        vocabulary: Some(vocabulary),
        context: Some(context),
        goal: Goal::NextToken,
        padding: None,
        outputs: vocabulary,
    };
    // Samples on a host, on a GPU, on the emulated device.
    let batch = |host, gpu, emulated| match kind {
        Kind::Host => host,
        Kind::Gpu => gpu,
        Kind::Emulated => emulated,
    };
    let small = kind == Kind::Emulated;
    let work = |name, what, preset, fit, input, batch, optimizer| Training {
        name,
        what,
        preset,
        fit,
        input,
        batch,
        optimizer,
    };
    let found = match name {
        "mlp" => {
            let (side, hidden) = if small { (8, vec![16]) } else { (28, vec![256, 128]) };
            let preset = Preset::Mlp(MlpOptions { hidden, activation: ActivationKind::Relu, ..MlpOptions::default() });
            let what = "MNIST's perceptron, 784-256-128-10, 128 samples";
            let input = Input::Real(vec![side * side]);
            work("mlp", what, preset, classes(10), input, batch(128, 128, 8), clipped(momentum(false), 0.05))
        }
        "cnn" => {
            let (side, channels) = if small { (8, vec![2, 4]) } else { (28, vec![32, 64]) };
            let hidden = if small { 8 } else { 128 };
            let preset = Preset::Cnn(CnnOptions { channels, hidden, ..CnnOptions::default() });
            let what = "MNIST's small CNN, two convolutions of 32 and 64, 128 pictures";
            let input = Input::Real(vec![1, side, side]);
            work("cnn", what, preset, classes(10), input, batch(128, 128, 2), clipped(momentum(false), 0.01))
        }
        "gpt_cpu" => {
            let (layers, heads, width, context) = if small { (1, 2, 32, 8) } else { (4, 4, 128, 64) };
            let preset = Preset::Gpt(GptOptions { layers, heads, width, ..GptOptions::default() });
            let what = "nanoGPT's configuration for CPUs, 4 layers, 128 wide, 12 x 64 tokens";
            let input = Input::Tokens(context);
            work("gpt_cpu", what, preset, tokens(65, context), input, batch(12, 12, 2), adamw([0.9, 0.99], 1e-3))
        }
        "gpt2" => {
            let (layers, heads, width) = if small { (1, 2, 32) } else { (12, 12, 768) };
            let (context, vocabulary) = (batch(128, 1024, 16), if small { 256 } else { 50_304 });
            let preset = Preset::Gpt(GptOptions { layers, heads, width, bias: true, ..GptOptions::default() });
            let what = match kind {
                Kind::Host => "GPT-2 124M, 1 x 128 tokens",
                Kind::Gpu => "GPT-2 124M, 64 x 1024 tokens",
                Kind::Emulated => "GPT-2's form, small",
            };
            let fit = tokens(vocabulary, context);
            work("gpt2", what, preset, fit, Input::Tokens(context), batch(1, 64, 2), adamw([0.9, 0.95], 6e-4))
        }
        "resnet18" => {
            let side = if small { 32 } else { 224 };
            let mut options = ResNetOptions::of_depth(18).unwrap_or_default();
            if small {
                options.blocks = vec![1];
                options.channels = vec![4];
            }
            let what = match kind {
                Kind::Host => "ResNet-18, 4 pictures of 224 x 224",
                Kind::Gpu => "ResNet-18, 256 pictures of 224 x 224",
                Kind::Emulated => "ResNet's form, small",
            };
            let input = Input::Real(vec![3, side, side]);
            let fit = classes(if small { 10 } else { 1000 });
            work(
                "resnet18",
                what,
                Preset::ResNet(options),
                fit,
                input,
                batch(4, 256, 1),
                clipped(momentum(false), 0.01),
            )
        }
        "audio_cnn" => {
            let options = AudioCnnOptions::default();
            let preset =
                Preset::AudioCnn(if small { AudioCnnOptions { channels: vec![2], ..options } } else { options });
            let what = "spoken digits, 32 waveforms of half a second, log-mel pictures made within the step";
            let input = Input::Real(vec![if small { 1600 } else { 8000 }]);
            work("audio_cnn", what, preset, classes(10), input, batch(32, 256, 1), adamw([0.9, 0.99], 1e-3))
        }
        other => {
            return Err(Error::config("bench", format!("found {other:?}, expected one of {}", MODELS.join(", "))));
        }
    };
    Ok(found)
}

impl Training {
    /// The model, on any backend.
    ///
    /// # Errors
    /// Options that do not fit.
    pub fn model<B: Backend>(&self) -> Result<Model<B>> {
        let model: Model<B> =
            ModelOptions { preset: self.preset.clone(), loss: None, label_smoothing: 0.0 }.build(&self.fit)?;
        match (&self.preset, &self.input) {
            (Preset::AudioCnn(_), Input::Real(shape)) => {
                let samples = shape.iter().product();
                let transform = Transform::new(&LogMelOptions::default(), SAMPLE_RATE, samples)?;
                Ok(model.preceded_by("log_mel", LogMel::new(transform).normalized(0.25, 1.0)))
            }
            _ => Ok(model),
        }
    }

    /// What a sample's input and target are.
    pub fn specs(&self) -> (InputSpec, TargetSpec) {
        match &self.input {
            Input::Real(shape) => {
                let names = (0..self.fit.outputs).map(|class| class.to_string()).collect();
                (InputSpec::Real { shape: shape.clone() }, TargetSpec::Class { names })
            }
            &Input::Tokens(context) => {
                let vocabulary = self.fit.vocabulary.unwrap_or(1);
                (InputSpec::Tokens { context, vocabulary }, TargetSpec::NextToken)
            }
        }
    }

    /// A batch of random values; each number gives another.
    pub fn random_batch(&self, number: u32) -> Batch {
        let values = Philox::new(1, Purpose::Sampling, 2 * number);
        let others = Philox::new(1, Purpose::Sampling, 2 * number + 1);
        let below = |stream: &Philox, len: usize, bound: usize| -> Vec<i32> {
            (0..len as u64).map(|at| stream.below(at, bound as u64) as i32).collect()
        };
        let (inputs, rows) = match &self.input {
            Input::Real(shape) => {
                let len = self.batch * shape.iter().product::<usize>();
                let real = (0..len as u64).map(|at| 2.0 * values.uniform(at) - 1.0).collect();
                (Inputs::Real(real), self.batch)
            }
            Input::Tokens(context) => {
                let len = self.batch * context;
                (Inputs::Tokens(below(&values, len, self.fit.vocabulary.unwrap_or(1))), len)
            }
        };
        let targets = Targets::Index(below(&others, rows, self.fit.outputs));
        Batch { inputs, targets, samples: self.batch }
    }

    /// How much a step does, and of what.
    pub fn amount(&self) -> (f64, String) {
        match self.input {
            Input::Real(_) => (self.batch as f64, "sample".to_owned()),
            Input::Tokens(context) => ((self.batch * context) as f64, "token".to_owned()),
        }
    }

    /// What peers must do too.
    pub fn work(&self, parameters: usize, precision: &str, threads: usize) -> Work {
        let inputs = match &self.input {
            Input::Real(shape) => std::iter::once(self.batch).chain(shape.iter().copied()).map(|n| n as u64).collect(),
            Input::Tokens(context) => vec![self.batch as u64, *context as u64],
        };
        let rule = match self.optimizer.rule {
            Rule::Adam { .. } => "adamw",
            _ => "momentum",
        };
        Work {
            name: self.name.to_owned(),
            parameters: parameters as u64,
            inputs,
            samples: (samples::count(self) * self.batch) as u64,
            precision: precision.to_owned(),
            update: format!("{rule}+global_norm"),
            threads,
        }
    }
}

/// Parameters of an update that is timed alone, where no other number is asked for.
pub const USUAL: usize = 50_000_000;
/// The same on a GPU: those of GPT-2.
pub const USUAL_ON_GPUS: usize = 124_000_000;

/// An update alone.
#[derive(Clone, Debug)]
pub struct Updating {
    /// The rule's name.
    pub rule: &'static str,
    /// The clip's name.
    pub clip: &'static str,
    /// Parameters: matrices of [`Updating::SIDE`] x [`Updating::SIDE`], and one smaller where that does not divide them.
    pub parameters: usize,
    /// Whether parameters are kept in the storage type alone.
    pub alone: bool,
    /// Rule, clip, decay.
    pub optimizer: OptimizerOptions,
}

impl Updating {
    /// Rows and columns of each matrix.
    pub const SIDE: usize = 1000;

    /// The update of a rule and a clip by their names; none for others.
    pub fn new(rule: &str, clip: &str, parameters: usize, alone: bool) -> Option<Self> {
        let (name, found) = rules().into_iter().find(|(name, _)| *name == rule)?;
        let (clip_name, clip) = clips().into_iter().find(|(name, _)| *name == clip)?;
        let optimizer = OptimizerOptions {
            clip,
            weight_decay: if matches!(name, "adamw" | "lamb" | "lars") { 0.01 } else { 0.0 },
            decoupled: name == "adamw" || found.decouples_decay(),
            master: !alone,
            ..OptimizerOptions::new(found, 1e-2)
        };
        Some(Updating { rule: name, clip: clip_name, parameters, alone, optimizer })
    }

    /// Shapes of the tensors.
    pub fn shapes(&self) -> Vec<Vec<usize>> {
        let each = Self::SIDE * Self::SIDE;
        let mut shapes = vec![vec![Self::SIDE; 2]; self.parameters / each];
        let rest = self.parameters % each;
        if rest > 0 {
            let side = (rest as f64).sqrt() as usize;
            shapes.push(vec![side.max(1), rest / side.max(1)]);
        }
        shapes
    }

    /// What peers must do too.
    pub fn work(&self, precision: &str, threads: usize) -> Work {
        Work {
            name: "update".to_owned(),
            parameters: self.parameters as u64,
            inputs: vec![self.parameters as u64],
            samples: 0,
            precision: precision.to_owned(),
            update: if self.clip == "none" { self.rule.to_owned() } else { format!("{}+{}", self.rule, self.clip) },
            threads,
        }
    }
}

/// The update that peers do: global-norm clip and momentum over 50M parameters, 124M on a GPU.
pub fn update<B: Bed>(backend: &B) -> Updating {
    let parameters = match backend.kind() {
        Kind::Host => USUAL,
        Kind::Gpu => USUAL_ON_GPUS,
        Kind::Emulated => 4096,
    };
    let optimizer = clipped(momentum(false), 1e-2);
    Updating { rule: "momentum", clip: "global_norm", parameters, alone: false, optimizer }
}
