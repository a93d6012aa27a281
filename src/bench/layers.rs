//! The layers whose operations are timed alone, at the shapes that models have them.

use crate::backend::Backend;
use crate::backend::ops::{ActivationKind, CrossEntropy};
use crate::backend::profile::Kind;
use crate::error::{Error, Result};
use crate::log_mel::{LogMel as Transform, LogMelOptions};
use crate::model::layers::{
    Activation, Attention, AveragePool2d, BatchNorm, Conv2d, Dropout, Embedding, LayerNorm, Linear, LogMel, MaxPool2d,
    RmsNorm, Sequential, Swiglu, Window,
};
use crate::model::{Input, Layer, Mode, Planner, Tensor};

/// Which layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    /// Outputs.
    Linear(usize),
    /// Outputs, and a function in the same operation.
    LinearGelu(usize),
    /// Filters, side of the kernel, stride.
    Conv(usize, usize, usize),
    LayerNorm,
    RmsNorm,
    BatchNorm,
    /// Query heads, key heads, whether causal.
    Attention(usize, usize, bool),
    /// Rows of the table, their width.
    Embedding(usize, usize),
    CrossEntropy,
    Dropout,
    MaxPool,
    AveragePool,
    Function(ActivationKind),
    Swiglu,
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

/// The cross-entropy alone: what a layer gives is the gradient of the logits.
struct Loss;

impl<B: Backend> Layer<B> for Loss {
    fn kind(&self) -> &'static str {
        "cross_entropy"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let (rows, classes) = (x.rows(), x.width());
        let targets = planner.indices(rows);
        planner.keep_indices(targets);
        let metrics = planner.statistic(crate::backend::ops::METRICS);
        planner.keep(metrics);
        let (dlogits, output) = planner.tensor(&x.shape, true);
        planner.emit(CrossEntropy {
            logits: x.real("cross_entropy")?,
            targets,
            metrics,
            dlogits: Some(dlogits),
            rows,
            classes,
            label_smoothing: 0.0,
            ignore_index: -100,
        });
        Ok(output)
    }

    fn backward(&mut self, _: &mut Planner<'_, B>, _: Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// Samples a second of the recordings.
const SAMPLE_RATE: u32 = 16_000;

impl Case {
    /// Whether there is a way back: the loss alone leaves its gradient on the way forward, and pictures are made of given waveforms.
    pub fn has_backward(&self) -> bool {
        !matches!(self.what, What::CrossEntropy | What::Mel)
    }

    /// The layer, on any backend.
    ///
    /// # Errors
    /// Options that do not fit.
    pub fn layer<B: Backend>(&self) -> Result<Box<dyn Layer<B>>> {
        let tiled = Window::tiled([2, 2]);
        Ok(match self.what {
            What::Linear(outputs) => Box::new(Linear::new(outputs)),
            What::LinearGelu(outputs) => Box::new(
                Sequential::new().then("0", Linear::new(outputs)).then("1", Activation::new(ActivationKind::GeluTanh)),
            ),
            What::Conv(filters, side, stride) => Box::new(
                Conv2d::new(filters, [side; 2]).with_stride([stride; 2]).with_padding([side / 2; 2]).without_bias(),
            ),
            What::LayerNorm => Box::new(LayerNorm::new(1e-5)),
            What::RmsNorm => Box::new(RmsNorm::new(1e-5)),
            What::BatchNorm => Box::new(BatchNorm::new()),
            What::Attention(heads, kv_heads, causal) => Box::new(Attention::new(heads, causal).with_kv_heads(kv_heads)),
            What::Embedding(rows, width) => Box::new(Embedding::new(rows, width)),
            What::CrossEntropy => Box::new(Loss),
            What::Dropout => Box::new(Dropout::new(0.1)),
            What::MaxPool => Box::new(MaxPool2d::new(tiled)),
            What::AveragePool => Box::new(AveragePool2d::new(tiled)),
            What::Function(kind) => Box::new(Activation::new(kind)),
            What::Swiglu => Box::new(Swiglu::new()),
            What::Mel => {
                let Input::Real(shape) = &self.input else {
                    return Err(Error::shape("log_mel", "waveforms", "tokens"));
                };
                let samples = shape.iter().product();
                Box::new(LogMel::new(Transform::new(&LogMelOptions::default(), SAMPLE_RATE, samples)?))
            }
        })
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
        let (more, below) = match what {
            What::Linear(outputs) | What::LinearGelu(outputs) => (format!("x{outputs}"), 1),
            What::Conv(filters, side, 1) => (format!("_{filters}x{side}x{side}"), 1),
            What::Conv(filters, side, stride) => (format!("_{filters}x{side}x{side}_by_{stride}"), 1),
            What::Attention(heads, kv_heads, _) => (format!("_{heads}/{kv_heads}_heads").replace('/', "of"), 1),
            What::Embedding(rows, width) => (format!("_{rows}x{width}"), rows),
            What::CrossEntropy => (String::new(), shape[shape.len() - 1]),
            _ => (String::new(), 1),
        };
        let input = match what {
            What::Embedding(..) => Input::Tokens(shape[0]),
            _ => Input::Real(shape.to_vec()),
        };
        cases.push(Case {
            name: format!("{name}/{batch}x{}{more}", shape_text.join("x")),
            what,
            input,
            batch,
            mode: if what == What::Mel { Mode::Inference } else { Mode::Training },
            below,
            fewer: if matches!(what, What::Conv(_, 3, 1)) { WINOGRAD } else { 1.0 },
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
    add("linear_gelu", What::LinearGelu(4 * width), rows, &[width]);
    let side = pick(56, 56, 4);
    let picture = [pick(64, 64, 2), side, side];
    let pictures = pick(8, 256, 1);
    add("conv", What::Conv(picture[0], 3, 1), pictures, &picture);
    add("batch_norm", What::BatchNorm, pictures, &picture);
    add("max_pool", What::MaxPool, pictures, &picture);
    add("average_pool", What::AveragePool, pictures, &picture);
    let tokens = pick(4096, 16_384, 4);
    add("layer_norm", What::LayerNorm, tokens, &[width]);
    add("rms_norm", What::RmsNorm, tokens, &[width]);
    add("relu", What::Function(ActivationKind::Relu), tokens, &[width]);
    add("gelu", What::Function(ActivationKind::GeluTanh), tokens, &[width]);
    add("swiglu", What::Swiglu, tokens, &[2 * width]);
    add("dropout", What::Dropout, tokens, &[width]);
    let (heads, head, time) = (pick(12, 12, 2), pick(64, 64, 16), pick(256, 1024, 8));
    let sequences = pick(4, 16, 1);
    add("attention", What::Attention(heads, heads, true), sequences, &[time, 3 * heads * head]);
    if kind != Kind::Emulated {
        add("attention", What::Attention(4, 4, true), 12, &[64, 3 * 128]);
        add("attention", What::Attention(12, 4, true), sequences, &[time, (12 + 2 * 4) * head]);
    }
    add("embedding", What::Embedding(pick(50_304, 50_304, 32), width), pick(8, 16, 1), &[pick(256, 1024, 8)]);
    add("cross_entropy", What::CrossEntropy, pick(256, 16_384, 2), &[pick(50_304, 50_304, 32)]);
    add("log_mel", What::Mel, pick(128, 256, 1), &[pick(8000, 16_000, 800)]);
    cases
}
