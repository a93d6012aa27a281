//! The layers whose operations are timed alone, at the shapes that models have them.

mod single;

pub use single::More;

use single::{Form, Single};

use crate::backend::ops::ActivationKind;
use crate::backend::profile::Kind;
use crate::backend::{Act, Backend};
use crate::error::Result;
use crate::log_mel::{LogMel as Transform, LogMelOptions};
use crate::model::layers::{
    Activation, Attention, AveragePool2d, BatchNorm, Conv2d, Dropout, Embedding, LayerNorm, Linear, LogMel, MaxPool2d,
    MeanOverTime, Positions, RmsNorm, Sequential, Swiglu, TokenAndPosition, Window,
};
use crate::model::{Alone, Input, Mode, Value};

/// Which layer, or which operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    /// Outputs.
    Linear(usize),
    /// Likewise.
    LinearWithoutBias(usize),
    /// Outputs, and a function in the same operation.
    LinearGelu(usize),
    /// A function, and outputs of its values: on the way back, the function's slope in the same operation.
    LinearOfGelu(usize),
    /// Filters, side of the kernel, stride.
    Conv(usize, usize, usize),
    /// Likewise, with a bias.
    BiasedConv(usize, usize, usize),
    LayerNorm,
    RmsNorm,
    /// A sum, normalized in the same operation.
    AddLayerNorm,
    AddRmsNorm,
    BatchNorm,
    /// By running statistics.
    BatchNormInference,
    /// ReLU in the same operation.
    BatchNormRelu,
    /// The end of a residual block: the sum, and ReLU, in the same operation.
    BatchNormAddRelu,
    /// Query heads, key heads, whether causal.
    Attention(usize, usize, bool),
    /// Heads, of which each position sees all but padding, with dropout.
    EncoderAttention(usize),
    /// Query heads, key heads.
    Rotary(usize, usize),
    /// Rows of the table, their width.
    Embedding(usize, usize),
    /// Likewise, and a table of positions, in the same operation.
    EmbeddingPositions(usize, usize),
    Positions,
    CrossEntropy,
    MeanSquaredError,
    BinaryCrossEntropy,
    Dropout,
    MaxPool,
    AveragePool,
    MeanTime,
    Function(ActivationKind),
    Swiglu,
    Add,
    /// How many parts, each as wide as the input.
    Concatenate(usize),
    Mel,
}

/// A layer and a batch.
#[derive(Clone, Debug)]
pub struct Case {
    /// Family and shape: `linear/128x784x256`.
    pub name: String,
    what: What,
    /// A sample's input.
    pub input: Input,
    /// Samples.
    pub batch: usize,
    /// With a backward, or without.
    pub mode: Mode,
    /// What tokens and targets are below.
    pub below: usize,
    /// By how much fewer operations than are counted may do: convolutions of 3 x 3 by Winograd's method.
    pub fewer: f64,
}

/// By how much fewer operations than are counted a convolution of 3 x 3 may do, by Winograd's method over tiles of 2 x 2.
pub(super) const WINOGRAD: f64 = 2.25;

/// What tokens are below where one of them, 0, is padding.
const WITH_PADDING: usize = 8;

/// Samples a second of the recordings.
const SAMPLE_RATE: u32 = 16_000;

/// A layer's program, and what else it is given and leaves.
pub struct Planned<B: Backend> {
    /// The program.
    pub alone: Alone<B>,
    /// What else.
    pub more: More,
}

impl<B: Backend> Planned<B> {
    /// What is given, and the least of its values: the output's gradient, the input where it is real, then the rest.
    pub fn given(&self) -> Vec<(Act, f32)> {
        let input = match self.alone.program.input {
            Value::Real(act) => Some((act, -1.0)),
            Value::Tokens(_) => None,
        };
        std::iter::once((self.alone.dy, -1.0)).chain(input).chain(self.more.given.iter().copied()).collect()
    }
}

impl Case {
    /// Whether there is a way back: losses leave their gradient on the way forward, a sum's gradient is that of each part, pictures
    /// are made of given waveforms, and nothing is trained by running statistics.
    pub fn has_backward(&self) -> bool {
        let loss = matches!(self.what, What::CrossEntropy | What::MeanSquaredError | What::BinaryCrossEntropy);
        self.mode == Mode::Training && !loss && self.what != What::Add
    }

    /// Its program, on any backend.
    ///
    /// # Errors
    /// Options that do not fit.
    pub fn plan<B: Backend>(&self) -> Result<Planned<B>> {
        let mut single = Single::new(self.form()?);
        let alone = Alone::plan(&mut single, &self.input, self.batch, self.mode)?;
        Ok(Planned { alone, more: single.more })
    }

    fn form<B: Backend>(&self) -> Result<Form<B>> {
        let tiled = Window::tiled([2, 2]);
        let [relu, gelu] = [ActivationKind::Relu, ActivationKind::GeluTanh].map(|kind| move || Activation::new(kind));
        let conv = |filters, side: usize, stride| {
            Conv2d::new(filters, [side; 2]).with_stride([stride; 2]).with_padding([side / 2; 2])
        };
        let pair = Sequential::new;
        Ok(match self.what {
            What::Linear(outputs) => Form::layer(Linear::new(outputs)),
            What::LinearWithoutBias(outputs) => Form::layer(Linear::new(outputs).without_bias()),
            What::LinearGelu(outputs) => Form::layer(pair().then("0", Linear::new(outputs)).then("1", gelu())),
            What::LinearOfGelu(outputs) => Form::layer(pair().then("0", gelu()).then("1", Linear::new(outputs))),
            What::Conv(filters, side, stride) => Form::layer(conv(filters, side, stride).without_bias()),
            What::BiasedConv(filters, side, stride) => Form::layer(conv(filters, side, stride)),
            What::LayerNorm => Form::layer(LayerNorm::new(1e-5)),
            What::RmsNorm => Form::layer(RmsNorm::new(1e-5)),
            What::AddLayerNorm => Form::Added(Box::new(LayerNorm::new(1e-5))),
            What::AddRmsNorm => Form::Added(Box::new(RmsNorm::new(1e-5))),
            What::BatchNorm | What::BatchNormInference => Form::layer(BatchNorm::new()),
            What::BatchNormRelu => Form::layer(pair().then("0", BatchNorm::new()).then("1", relu())),
            What::BatchNormAddRelu => Form::Residual(Box::new(BatchNorm::new()), Box::new(relu())),
            What::Attention(heads, kv_heads, causal) => {
                Form::layer(Attention::new(heads, causal).with_kv_heads(kv_heads))
            }
            What::EncoderAttention(heads) => Form::Padded(Box::new(Attention::new(heads, false).with_dropout(0.1))),
            What::Rotary(heads, kv_heads) => Form::Rotary { heads: heads + 2 * kv_heads, turned: heads + kv_heads },
            What::Embedding(rows, width) => Form::layer(Embedding::new(rows, width)),
            What::EmbeddingPositions(rows, width) => {
                Form::layer(TokenAndPosition::new(rows, self.input_shape()[0], width))
            }
            What::Positions => Form::layer(Positions::new(self.input_shape()[0])),
            What::CrossEntropy => Form::CrossEntropy,
            What::MeanSquaredError => Form::MeanSquaredError,
            What::BinaryCrossEntropy => Form::BinaryCrossEntropy,
            What::Dropout => Form::layer(Dropout::new(0.1)),
            What::MaxPool => Form::layer(MaxPool2d::new(tiled)),
            What::AveragePool => Form::layer(AveragePool2d::new(tiled)),
            What::MeanTime => Form::Padded(Box::new(MeanOverTime::new())),
            What::Function(kind) => Form::layer(Activation::new(kind)),
            What::Swiglu => Form::layer(Swiglu::new()),
            What::Add => Form::Add,
            What::Concatenate(parts) => Form::Concatenate(parts),
            What::Mel => {
                let samples = self.input_shape().iter().product();
                Form::layer(LogMel::new(Transform::new(&LogMelOptions::default(), SAMPLE_RATE, samples)?))
            }
        })
    }

    /// Shape of a sample's input.
    fn input_shape(&self) -> &[usize] {
        match &self.input {
            Input::Real(shape) => shape,
            Input::Tokens(time) => std::slice::from_ref(time),
        }
    }
}

/// The cases for a kind of device.
pub fn cases(kind: Kind) -> Vec<Case> {
    // On a host, on a GPU, on the emulated device.
    let pick = |host, gpu, emulated| match kind {
        Kind::Host => host,
        Kind::Gpu => gpu,
        Kind::Emulated => emulated,
    };
    let mut cases = Vec::new();
    let mut add = |name: &str, what: What, batch: usize, shape: &[usize]| {
        let shape_text: Vec<String> = shape.iter().map(usize::to_string).collect();
        let more = match what {
            What::Linear(outputs)
            | What::LinearWithoutBias(outputs)
            | What::LinearGelu(outputs)
            | What::LinearOfGelu(outputs) => format!("x{outputs}"),
            What::Conv(filters, side, 1) | What::BiasedConv(filters, side, 1) => format!("_{filters}x{side}x{side}"),
            What::Conv(filters, side, stride) | What::BiasedConv(filters, side, stride) => {
                format!("_{filters}x{side}x{side}_by_{stride}")
            }
            What::Attention(heads, kv_heads, _) => format!("_{heads}of{kv_heads}_heads"),
            What::EncoderAttention(heads) => format!("_{heads}_heads"),
            What::Rotary(heads, kv_heads) => format!("_{}of{}_heads", heads + kv_heads, heads + 2 * kv_heads),
            What::Embedding(rows, width) | What::EmbeddingPositions(rows, width) => format!("_{rows}x{width}"),
            What::Concatenate(parts) => format!("_{parts}_parts"),
            _ => String::new(),
        };
        let below = match what {
            What::Embedding(rows, _) | What::EmbeddingPositions(rows, _) => rows,
            What::EncoderAttention(_) | What::MeanTime => WITH_PADDING,
            What::CrossEntropy => shape[shape.len() - 1],
            _ => 1,
        };
        let input = match what {
            What::Embedding(..) | What::EmbeddingPositions(..) => Input::Tokens(shape[0]),
            _ => Input::Real(shape.to_vec()),
        };
        let trained = !matches!(what, What::Mel | What::BatchNormInference);
        cases.push(Case {
            name: format!("{name}/{batch}x{}{more}", shape_text.join("x")),
            what,
            input,
            batch,
            mode: if trained { Mode::Training } else { Mode::Inference },
            below,
            fewer: if matches!(what, What::Conv(_, 3, 1) | What::BiasedConv(_, 3, 1)) { WINOGRAD } else { 1.0 },
        });
    };
    if kind != Kind::Emulated {
        add("linear", What::Linear(256), 128, &[784]);
        add("linear", What::Linear(384), 768, &[128]);
        add("conv", What::Conv(64, 3, 1), 128, &[32, 14, 14]);
        // ResNet-18's first, and those of its last stage.
        let pictures = pick(4, 256, 1);
        add("conv", What::Conv(64, 7, 2), pictures, &[3, 224, 224]);
        add("conv", What::Conv(512, 3, 2), pictures, &[256, 14, 14]);
        add("conv", What::Conv(512, 3, 1), pictures, &[512, 7, 7]);
    }
    let (rows, width) = (pick(512, 16_384, 4), pick(768, 768, 16));
    add("linear", What::Linear(3 * width), rows, &[width]);
    add("linear_without_bias", What::LinearWithoutBias(width), rows, &[width]);
    add("linear_gelu", What::LinearGelu(4 * width), rows, &[width]);
    add("linear_of_gelu", What::LinearOfGelu(width), rows, &[4 * width]);
    let side = pick(56, 56, 4);
    let picture = [pick(64, 64, 2), side, side];
    let pictures = pick(8, 256, 1);
    add("conv", What::Conv(picture[0], 3, 1), pictures, &picture);
    // The second of the CNN for digits.
    let digits = [pick(32, 32, 2), pick(14, 14, 4), pick(14, 14, 4)];
    add("biased_conv", What::BiasedConv(2 * digits[0], 3, 1), pick(128, 128, 1), &digits);
    add("batch_norm", What::BatchNorm, pictures, &picture);
    add("batch_norm_inference", What::BatchNormInference, pictures, &picture);
    add("batch_norm_relu", What::BatchNormRelu, pictures, &picture);
    add("batch_norm_add_relu", What::BatchNormAddRelu, pictures, &picture);
    add("max_pool", What::MaxPool, pictures, &picture);
    add("average_pool", What::AveragePool, pictures, &picture);
    let tokens = pick(4096, 16_384, 4);
    add("layer_norm", What::LayerNorm, tokens, &[width]);
    add("rms_norm", What::RmsNorm, tokens, &[width]);
    add("add_layer_norm", What::AddLayerNorm, tokens, &[width]);
    add("add_rms_norm", What::AddRmsNorm, tokens, &[width]);
    add("add", What::Add, tokens, &[width]);
    for kind in ActivationKind::ALL {
        add(kind.name(), What::Function(kind), tokens, &[width]);
    }
    add("swiglu", What::Swiglu, tokens, &[2 * width]);
    add("dropout", What::Dropout, tokens, &[width]);
    let (heads, head, time) = (pick(12, 12, 2), pick(64, 64, 16), pick(256, 1024, 8));
    let sequences = pick(4, 16, 1);
    add("attention", What::Attention(heads, heads, true), sequences, &[time, 3 * heads * head]);
    if kind != Kind::Emulated {
        add("attention", What::Attention(4, 4, true), 12, &[64, 3 * 128]);
        add("attention", What::Attention(12, 4, true), sequences, &[time, (12 + 2 * 4) * head]);
    }
    // Llama's form: a key head for three queries.
    let kv_heads = pick(4, 4, 1);
    add("rotary", What::Rotary(heads, kv_heads), sequences, &[time, (heads + 2 * kv_heads) * head]);
    // The encoder of texts, and the network of convolutions over words, which joins the filters of three kernels.
    let (texts, text, text_width) = (pick(64, 256, 2), pick(64, 256, 4), pick(128, 768, 8));
    add("encoder_attention", What::EncoderAttention(pick(4, 12, 2)), texts, &[text, 3 * text_width]);
    add("mean_time", What::MeanTime, texts, &[text, text_width]);
    add("concatenate", What::Concatenate(3), pick(4096, 16_384, 4), &[pick(100, 100, 3)]);
    let (vocabulary, sequences) = (pick(50_304, 50_304, 32), pick(8, 16, 1));
    add("embedding", What::Embedding(vocabulary, width), sequences, &[time]);
    add("embedding_positions", What::EmbeddingPositions(vocabulary, width), sequences, &[time]);
    add("positions", What::Positions, sequences, &[time, width]);
    add("cross_entropy", What::CrossEntropy, pick(256, 16_384, 2), &[vocabulary]);
    add("mean_squared_error", What::MeanSquaredError, tokens, &[width]);
    add("binary_cross_entropy", What::BinaryCrossEntropy, tokens, &[width]);
    add("log_mel", What::Mel, pick(128, 256, 1), &[pick(8000, 16_000, 800)]);
    cases
}
