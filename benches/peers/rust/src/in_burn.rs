//! The works in burn, on its backend for CPUs.

use anyhow::Result;
use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{MaxPool2d, MaxPool2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d,
};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::activation::{gelu_approximate, relu};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Int, Tensor};

use crate::framework::{
    Asked, BETAS, DECAY, EPSILON, HEADS, LAYERS, LEARNING_RATE, MAX_NORM, MOMENTUM, Step, VOCABULARY, WIDTH,
};

/// The work that is asked for.
pub fn open(asked: &Asked) -> Result<Box<dyn Step>> {
    let device = Device::flex().autodiff();
    let samples = asked.samples;
    let classes = || integers([samples, 1], 10, &device);
    Ok(match asked.work.as_str() {
        "update" => Box::new(UpdateAlone::new(asked, &device)),
        "mlp" => {
            let x = Tensor::<2>::random([samples, 784], Distribution::Default, &device);
            let sample = x.dims()[1..].to_vec();
            let forward = move |model: &Mlp, rows| model.forward(x.clone().select(0, rows));
            WholeStep::boxed(asked, Mlp::new(&device), forward, classes(), sample)
        }
        "cnn" => {
            let x = Tensor::<4>::random([samples, 1, 28, 28], Distribution::Default, &device);
            let sample = x.dims()[1..].to_vec();
            let forward = move |model: &Cnn, rows| model.forward(x.clone().select(0, rows));
            WholeStep::boxed(asked, Cnn::new(&device), forward, classes(), sample)
        }
        _ => {
            let shape = [samples, asked.context];
            let x: Tensor<2, Int> = integers(shape, VOCABULARY, &device);
            let (y, sample) = (integers(shape, VOCABULARY, &device), x.dims()[1..].to_vec());
            let forward = move |model: &Gpt, rows| model.forward(x.clone().select(0, rows));
            WholeStep::boxed(asked, Gpt::new(asked.context, &device), forward, y, sample)
        }
    })
}

fn integers<const D: usize>(shape: [usize; D], bound: usize, device: &Device) -> Tensor<D, Int> {
    Tensor::<D>::random(shape, Distribution::Uniform(0.0, bound as f64), device).clamp(0.0, bound as f64 - 0.5).int()
}

#[derive(Module, Debug)]
struct Mlp {
    first: Linear,
    second: Linear,
    last: Linear,
}

impl Mlp {
    fn new(device: &Device) -> Self {
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).init(device);
        Mlp { first: linear(784, 256), second: linear(256, 128), last: linear(128, 10) }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.last.forward(relu(self.second.forward(relu(self.first.forward(x)))))
    }
}

#[derive(Module, Debug)]
struct Cnn {
    convolutions: Vec<Conv2d>,
    pool: MaxPool2d,
    hidden: Linear,
    out: Linear,
}

impl Cnn {
    fn new(device: &Device) -> Self {
        let convolution = |channels| {
            let padding = PaddingConfig2d::Explicit(1, 1, 1, 1);
            Conv2dConfig::new(channels, [3, 3]).with_padding(padding).init(device)
        };
        Cnn {
            convolutions: vec![convolution([1, 32]), convolution([32, 64])],
            pool: MaxPool2dConfig::new([2, 2]).with_strides([2, 2]).init(),
            hidden: LinearConfig::new(64 * 49, 128).init(device),
            out: LinearConfig::new(128, 10).init(device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let x = self.convolutions.iter().fold(x, |x, convolution| self.pool.forward(relu(convolution.forward(x))));
        self.out.forward(relu(self.hidden.forward(x.flatten(1, 3))))
    }
}

#[derive(Module, Debug)]
struct Block {
    norm_1: LayerNorm,
    norm_2: LayerNorm,
    packed: Linear,
    projection: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Gpt {
    tokens: Embedding,
    positions: Param<Tensor<2>>,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Gpt {
    fn new(context: usize, device: &Device) -> Self {
        let norm = || LayerNormConfig::new(WIDTH).with_bias(false).init(device);
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).with_bias(false).init(device);
        let block = |_| Block {
            norm_1: norm(),
            norm_2: norm(),
            packed: linear(WIDTH, 3 * WIDTH),
            projection: linear(WIDTH, WIDTH),
            up: linear(WIDTH, 4 * WIDTH),
            down: linear(4 * WIDTH, WIDTH),
        };
        let positions = Tensor::random([context, WIDTH], Distribution::Normal(0.0, 0.02), device);
        Gpt {
            tokens: EmbeddingConfig::new(VOCABULARY, WIDTH).init(device),
            positions: Param::from_tensor(positions),
            blocks: (0..LAYERS).map(block).collect(),
            norm: norm(),
        }
    }

    /// x: [batch, time]; logits: [batch * time, vocabulary].
    fn forward(&self, x: Tensor<2, Int>) -> Tensor<2> {
        let [batch, time] = x.dims();
        let mut hidden = self.tokens.forward(x) + self.positions.val().unsqueeze::<3>();
        for block in &self.blocks {
            let packed = block.packed.forward(block.norm_1.forward(hidden.clone()));
            let mut heads = packed
                .chunk(3, 2)
                .into_iter()
                .map(|part| part.reshape([batch, time, HEADS, WIDTH / HEADS]).swap_dims(1, 2));
            let (Some(query), Some(key), Some(value)) = (heads.next(), heads.next(), heads.next()) else { break };
            let causal = AttentionModuleOptions { is_causal: true, ..AttentionModuleOptions::default() };
            let mixed = attention(query, key, value, None, None, causal);
            hidden = hidden + block.projection.forward(mixed.swap_dims(1, 2).reshape([batch, time, WIDTH]));
            let up = gelu_approximate(block.up.forward(block.norm_2.forward(hidden.clone())));
            hidden = hidden + block.down.forward(up);
        }
        let rows = self.norm.forward(hidden).reshape([batch * time, WIDTH]);
        rows.matmul(self.tokens.weight.val().transpose())
    }
}

fn optimizer<M: Module>(asked: &Asked, model: &M) -> ModuleOptimizer {
    if !asked.uses_adamw() {
        let momentum = MomentumConfig::new().with_momentum(MOMENTUM).with_dampening(0.0);
        return SgdConfig::new().with_momentum(Some(momentum)).init();
    }
    let adam = |decay: f64| {
        let [one, two] = BETAS.map(|beta| beta as f32);
        let config = AdamWConfig::new().with_beta_1(one).with_beta_2(two).with_epsilon(EPSILON as f32);
        config.with_weight_decay(decay as f32)
    };
    let mut vectors = Vectors(Vec::new());
    model.visit(&mut vectors);
    adam(DECAY).init().with_group(ParamGroup::from_ids(vectors.0), adam(0.0).build(), None)
}

/// The parameters that are no matrices, which are not decayed.
struct Vectors(Vec<ParamId>);

impl ModuleVisitor for Vectors {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D < 2 {
            self.0.push(param.id);
        }
    }
}

/// The gradients scaled so that their norm is at most [`MAX_NORM`]: burn's own clip takes each tensor's norm by itself.
fn clipped<M: Module>(model: &M, gradients: GradientsParams) -> GradientsParams {
    let mut squares = Squares { gradients: &gradients, sum: 0.0 };
    model.visit(&mut squares);
    let factor = MAX_NORM / (squares.sum.sqrt() + 1e-6);
    if factor >= 1.0 {
        return gradients;
    }
    let mut scale = Scale { gradients, scaled: GradientsParams::new(), factor };
    model.visit(&mut scale);
    scale.scaled
}

struct Squares<'a> {
    gradients: &'a GradientsParams,
    sum: f64,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.sum += f64::from((gradient.clone() * gradient).sum().into_scalar::<f32>());
        }
    }
}

struct Scale {
    gradients: GradientsParams,
    scaled: GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.scaled.register(param.id, gradient * self.factor);
        }
    }
}

/// The sum of all parameters, which is not finite where one of them is not.
struct Sum(f32);

impl ModuleVisitor for Sum {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0 += param.val().sum().into_scalar::<f32>();
    }
}

fn finite<M: Module>(model: Option<&M>) -> bool {
    let mut sum = Sum(0.0);
    model.map(|model| model.visit(&mut sum)).is_some() && sum.0.is_finite()
}

/// `forward` takes a batch of samples by their numbers.
struct WholeStep<M, F> {
    /// None only while the optimizer holds it.
    model: Option<M>,
    forward: F,
    /// The targets of all samples.
    y: Tensor<2, Int>,
    /// The samples of each batch, and which is next.
    order: Vec<Tensor<1, Int>>,
    next: usize,
    optimizer: ModuleOptimizer,
    /// The shape of a sample.
    sample: Vec<usize>,
    /// The last loss.
    loss: Option<Tensor<1>>,
}

impl<M: Module + 'static, F: Fn(&M, Tensor<1, Int>) -> Tensor<2> + 'static> WholeStep<M, F> {
    fn boxed(asked: &Asked, model: M, forward: F, y: Tensor<2, Int>, sample: Vec<usize>) -> Box<dyn Step> {
        let optimizer = optimizer(asked, &model);
        let rows = |rows: Vec<u32>| Tensor::from_ints(rows.as_slice(), &y.device());
        let order = asked.order().into_iter().map(rows).collect();
        Box::new(WholeStep { model: Some(model), forward, y, order, next: 0, optimizer, sample, loss: None })
    }
}

impl<M: Module, F: Fn(&M, Tensor<1, Int>) -> Tensor<2>> Step for WholeStep<M, F> {
    fn step(&mut self) -> Result<()> {
        let Some(model) = self.model.take() else { anyhow::bail!("an earlier step failed") };
        let rows = self.order[self.next].clone();
        self.next = (self.next + 1) % self.order.len();
        let targets = self.y.clone().select(0, rows.clone()).flatten(0, 1);
        let logits = (self.forward)(&model, rows);
        let loss = CrossEntropyLossConfig::new().init(&logits.device()).forward(logits, targets);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        self.loss = Some(loss.detach());
        let gradients = clipped(&model, gradients);
        self.model = Some(self.optimizer.step(LEARNING_RATE, model, gradients));
        Ok(())
    }

    fn parameters(&self) -> usize {
        self.model.as_ref().map_or(0, Module::num_params)
    }

    fn inputs(&self) -> Vec<usize> {
        self.order[0].dims().into_iter().chain(self.sample.iter().copied()).collect()
    }

    fn samples(&self) -> usize {
        self.y.dims()[0]
    }

    fn finite(&self) -> Result<bool> {
        let loss = self.loss.as_ref().map(|loss| loss.clone().into_scalar::<f32>());
        Ok(loss.is_some_and(f32::is_finite) && finite(self.model.as_ref()))
    }
}

#[derive(Module, Debug)]
struct Tensors {
    all: Vec<Param<Tensor<1>>>,
}

struct UpdateAlone {
    model: Option<Tensors>,
    gradients: Vec<Tensor<1>>,
    optimizer: ModuleOptimizer,
}

impl UpdateAlone {
    fn new(asked: &Asked, device: &Device) -> Self {
        let random = |len: &usize, device: &Device| Tensor::<1>::random([*len], Distribution::Normal(0.0, 1.0), device);
        let sizes = asked.pieces();
        let model = Tensors { all: sizes.iter().map(|len| Param::from_tensor(random(len, device))).collect() };
        let inner = device.clone().inner();
        let gradients = sizes.iter().map(|len| random(len, &inner)).collect();
        UpdateAlone { optimizer: optimizer(asked, &model), model: Some(model), gradients }
    }
}

impl Step for UpdateAlone {
    fn step(&mut self) -> Result<()> {
        let Some(model) = self.model.take() else { anyhow::bail!("an earlier step failed") };
        let mut gradients = GradientsParams::new();
        for (param, gradient) in model.all.iter().zip(&self.gradients) {
            gradients.register(param.id, gradient.clone());
        }
        let gradients = clipped(&model, gradients);
        self.model = Some(self.optimizer.step(LEARNING_RATE, model, gradients));
        Ok(())
    }

    fn parameters(&self) -> usize {
        self.model.as_ref().map_or(0, Module::num_params)
    }

    fn inputs(&self) -> Vec<usize> {
        vec![self.parameters()]
    }

    fn finite(&self) -> Result<bool> {
        Ok(finite(self.model.as_ref()))
    }
}
