//! The works in candle.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Module, Tensor, Var};
use candle_nn::loss::cross_entropy;
use candle_nn::{
    AdamW, Conv2d, Conv2dConfig, Embedding, LayerNorm, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap, conv2d,
    embedding, layer_norm_no_bias, linear, linear_no_bias, ops,
};

use crate::framework::{
    Asked, BETAS, DECAY, EPSILON, HEADS, LAYERS, LEARNING_RATE, MAX_NORM, MOMENTUM, Step, VOCABULARY, WIDTH,
};

/// The work that is asked for.
pub fn open(asked: &Asked) -> Result<Box<dyn Step>> {
    let device = Device::Cpu;
    if asked.work == "update" {
        return Ok(Box::new(UpdateAlone::new(asked, &device)?));
    }
    let variables = VarMap::new();
    let builder = VarBuilder::from_varmap(&variables, DType::F32, &device);
    let model = match asked.work.as_str() {
        "mlp" => Model::Mlp(Mlp::new(&builder)?),
        "cnn" => Model::Cnn(Cnn::new(&builder)?),
        _ => Model::Gpt(Gpt::new(asked.context, &builder, &device)?),
    };
    let (samples, classes) = (asked.samples, |samples| indices((samples, 1), 10, &device));
    let (x, y) = match asked.work.as_str() {
        "gpt_cpu" => {
            let shape = (samples, asked.context);
            (indices(shape, VOCABULARY, &device)?, indices(shape, VOCABULARY, &device)?)
        }
        "mlp" => (Tensor::rand(0f32, 1f32, (samples, 784), &device)?, classes(samples)?),
        _ => (Tensor::rand(0f32, 1f32, (samples, 1, 28, 28), &device)?, classes(samples)?),
    };
    let order = asked.order().into_iter().map(|rows| Tensor::new(rows, &device)).collect::<candle_core::Result<_>>()?;
    let update = Update::new(asked, variables.all_vars())?;
    Ok(Box::new(WholeStep { model, x, y, order, next: 0, update, loss: None }))
}

fn indices(shape: (usize, usize), bound: usize, device: &Device) -> Result<Tensor> {
    Ok(Tensor::rand(0f32, bound as f32, shape, device)?.floor()?.clamp(0f32, bound as f32 - 1.0)?.to_dtype(DType::U32)?)
}

enum Model {
    Mlp(Mlp),
    Cnn(Cnn),
    Gpt(Gpt),
}

struct Mlp([Linear; 3]);

impl Mlp {
    fn new(builder: &VarBuilder) -> Result<Self> {
        Ok(Mlp([
            linear(784, 256, builder.pp("0"))?,
            linear(256, 128, builder.pp("2"))?,
            linear(128, 10, builder.pp("4"))?,
        ]))
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let [first, second, last] = &self.0;
        last.forward(&second.forward(&first.forward(x)?.relu()?)?.relu()?)
    }
}

struct Cnn {
    convolutions: [Conv2d; 2],
    hidden: Linear,
    out: Linear,
}

impl Cnn {
    fn new(builder: &VarBuilder) -> Result<Self> {
        let padded = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
        let convolutions = [conv2d(1, 32, 3, padded, builder.pp("0"))?, conv2d(32, 64, 3, padded, builder.pp("3"))?];
        let (hidden, out) = (linear(64 * 49, 128, builder.pp("hidden"))?, linear(128, 10, builder.pp("out"))?);
        Ok(Cnn { convolutions, hidden, out })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for convolution in &self.convolutions {
            x = convolution.forward(&x)?.relu()?.max_pool2d(2)?;
        }
        self.out.forward(&self.hidden.forward(&x.flatten_from(1)?)?.relu()?)
    }
}

struct Block {
    norms: [LayerNorm; 2],
    packed: Linear,
    projection: Linear,
    up: Linear,
    down: Linear,
}

struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    /// 0 where a position may look, minus infinity where not. [context, context]
    mask: Tensor,
    places: Tensor,
}

impl Gpt {
    fn new(context: usize, builder: &VarBuilder, device: &Device) -> Result<Self> {
        let block = |number: usize| -> Result<Block> {
            let builder = builder.pp(format!("blocks.{number}"));
            let norm = |name| layer_norm_no_bias(WIDTH, 1e-5, builder.pp(name));
            Ok(Block {
                norms: [norm("norm_1")?, norm("norm_2")?],
                packed: linear_no_bias(WIDTH, 3 * WIDTH, builder.pp("packed"))?,
                projection: linear_no_bias(WIDTH, WIDTH, builder.pp("projection"))?,
                up: linear_no_bias(WIDTH, 4 * WIDTH, builder.pp("up"))?,
                down: linear_no_bias(4 * WIDTH, WIDTH, builder.pp("down"))?,
            })
        };
        let rows = (0..context).flat_map(|i| (0..context).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }));
        Ok(Gpt {
            tokens: embedding(VOCABULARY, WIDTH, builder.pp("tokens"))?,
            positions: embedding(context, WIDTH, builder.pp("positions"))?,
            blocks: (0..LAYERS).map(block).collect::<Result<_>>()?,
            norm: layer_norm_no_bias(WIDTH, 1e-5, builder.pp("norm"))?,
            mask: Tensor::from_iter(rows, device)?.reshape((context, context))?,
            places: Tensor::arange(0u32, context as u32, device)?,
        })
    }

    /// x: [batch, time]; logits: [batch * time, vocabulary].
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut hidden = self.tokens.forward(x)?.broadcast_add(&self.positions.forward(&self.places)?)?;
        for block in &self.blocks {
            let mixed = self.attend(block, &block.norms[0].forward(&hidden)?)?;
            hidden = (hidden + block.projection.forward(&mixed)?)?;
            let up = block.up.forward(&block.norms[1].forward(&hidden)?)?.gelu()?;
            hidden = (hidden + block.down.forward(&up)?)?;
        }
        let rows = self.norm.forward(&hidden)?.flatten_to(1)?;
        rows.matmul(&self.tokens.embeddings().t()?)
    }

    fn attend(&self, block: &Block, x: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, time, _) = x.dims3()?;
        let packed = block.packed.forward(x)?;
        let part = |number: usize| {
            let part = packed.narrow(D::Minus1, number * WIDTH, WIDTH)?;
            part.reshape((batch, time, HEADS, WIDTH / HEADS))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (part(0)?, part(1)?, part(2)?);
        let scores = (query.matmul(&key.t()?)? * (1.0 / ((WIDTH / HEADS) as f64).sqrt()))?;
        let shares = ops::softmax(&scores.broadcast_add(&self.mask)?, D::Minus1)?;
        shares.matmul(&value)?.transpose(1, 2)?.reshape((batch, time, WIDTH))
    }
}

struct WholeStep {
    model: Model,
    /// All samples.
    x: Tensor,
    y: Tensor,
    /// The samples of each batch, and which is next.
    order: Vec<Tensor>,
    next: usize,
    update: Update,
    /// The last loss.
    loss: Option<Tensor>,
}

impl Step for WholeStep {
    fn step(&mut self) -> Result<()> {
        let rows = &self.order[self.next];
        self.next = (self.next + 1) % self.order.len();
        let (x, y) = (self.x.index_select(rows, 0)?, self.y.index_select(rows, 0)?.flatten_all()?);
        let logits = match &self.model {
            Model::Mlp(model) => model.forward(&x)?,
            Model::Cnn(model) => model.forward(&x)?,
            Model::Gpt(model) => model.forward(&x)?,
        };
        let loss = cross_entropy(&logits, &y)?;
        let mut gradients = loss.backward()?;
        self.loss = Some(loss.detach());
        self.update.step(&mut gradients)
    }

    fn parameters(&self) -> usize {
        self.update.variables.iter().map(|variable| variable.elem_count()).sum()
    }

    fn inputs(&self) -> Vec<usize> {
        let batch = self.order[0].elem_count();
        std::iter::once(batch).chain(self.x.dims()[1..].iter().copied()).collect()
    }

    fn samples(&self) -> usize {
        self.x.dims()[0]
    }

    fn finite(&self) -> Result<bool> {
        let loss = self.loss.as_ref().map(|loss| loss.to_scalar::<f32>()).transpose()?;
        Ok(loss.is_some_and(f32::is_finite) && self.update.finite()?)
    }
}

struct UpdateAlone {
    gradients: Vec<Tensor>,
    update: Update,
}

impl UpdateAlone {
    fn new(asked: &Asked, device: &Device) -> Result<Self> {
        let random = |len: usize| Tensor::randn(0f32, 1f32, len, device);
        let sizes = asked.pieces();
        let variables = sizes.iter().map(|&len| Var::from_tensor(&random(len)?)).collect::<candle_core::Result<_>>()?;
        let gradients = sizes.iter().map(|&len| random(len)).collect::<candle_core::Result<_>>()?;
        Ok(UpdateAlone { gradients, update: Update::new(asked, variables)? })
    }
}

impl Step for UpdateAlone {
    fn step(&mut self) -> Result<()> {
        // A store of gradients comes from a backward alone.
        let mut store = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
        for (variable, gradient) in self.update.variables.iter().zip(&self.gradients) {
            store.insert(variable.as_tensor(), gradient.clone());
        }
        self.update.step(&mut store)
    }

    fn parameters(&self) -> usize {
        self.update.variables.iter().map(|variable| variable.elem_count()).sum()
    }

    fn inputs(&self) -> Vec<usize> {
        vec![self.parameters()]
    }

    fn finite(&self) -> Result<bool> {
        self.update.finite()
    }
}

/// Clip by the global norm, then the rule.
struct Update {
    variables: Vec<Var>,
    rule: Rule,
}

enum Rule {
    /// candle's own SGD has no momentum.
    Momentum(Vec<Tensor>),
    /// With decay for matrices, without for the rest.
    Adam([AdamW; 2]),
}

impl Update {
    fn new(asked: &Asked, variables: Vec<Var>) -> Result<Self> {
        let rule = if asked.uses_adamw() {
            let (matrices, rest): (Vec<Var>, Vec<Var>) = variables.iter().cloned().partition(|v| v.rank() >= 2);
            let adam = |variables, weight_decay| {
                let [beta1, beta2] = BETAS;
                AdamW::new(variables, ParamsAdamW { lr: LEARNING_RATE, beta1, beta2, eps: EPSILON, weight_decay })
            };
            Rule::Adam([adam(matrices, DECAY)?, adam(rest, 0.0)?])
        } else {
            Rule::Momentum(variables.iter().map(|variable| variable.zeros_like()).collect::<candle_core::Result<_>>()?)
        };
        Ok(Update { variables, rule })
    }

    /// Whether all parameters are: what is not leaves its sum so too.
    fn finite(&self) -> Result<bool> {
        let mut sum = 0.0;
        for variable in &self.variables {
            sum += variable.sum_all()?.to_scalar::<f32>()?;
        }
        Ok(sum.is_finite())
    }

    fn step(&mut self, gradients: &mut GradStore) -> Result<()> {
        self.clip(gradients)?;
        match &mut self.rule {
            Rule::Adam(parts) => parts.iter_mut().try_for_each(|part| part.step(gradients))?,
            Rule::Momentum(velocities) => {
                for (variable, velocity) in self.variables.iter().zip(velocities) {
                    let Some(gradient) = gradients.get(variable) else { continue };
                    *velocity = ((&*velocity * MOMENTUM)? + gradient)?;
                    variable.set(&variable.sub(&(&*velocity * LEARNING_RATE)?)?)?;
                }
            }
        }
        Ok(())
    }

    fn clip(&self, gradients: &mut GradStore) -> Result<()> {
        let mut sum = 0.0;
        for variable in &self.variables {
            if let Some(gradient) = gradients.get(variable) {
                sum += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let factor = (MAX_NORM / (sum.sqrt() + 1e-6)).min(1.0);
        if factor < 1.0 {
            for variable in &self.variables {
                if let Some(gradient) = gradients.remove(variable) {
                    gradients.insert(variable, (gradient * factor)?);
                }
            }
        }
        Ok(())
    }
}
