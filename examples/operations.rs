//! What each operation of a training step must move and compute, and, on a device, what it takes beside that.
//!
//! `cargo run --release --example operations` prints a table of floors on an H100, in Markdown;
//! `cargo run --release --example operations -- --device cuda gpt2` measures (`cpu` and `emulated` are devices too);
//! `--device cuda --groups gpt2` with attention's products of four warps together, `--device cuda --library mlp` with all products by
//! NVIDIA's library.
//!
//! Bytes are those of `Program::costs`: every operand once, as it is stored. The floor is the bytes at the speed of a copy, or
//! the arithmetic at that of the tensor cores, whichever takes longer.

use half::bf16;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{AttentionProducts, Cuda, Device, DeviceOptions, SmallProducts, emulated};
use warpstep::backend::ops::{ActivationKind, Update};
use warpstep::backend::profile::Profiled;
use warpstep::backend::{Backend, Memory, StepContext};
use warpstep::error::{Error, Result};
use warpstep::model::layers::{HiddenActivation, NormKind, RotaryOptions};
use warpstep::model::presets::{
    CnnOptions, Fit, Goal, GptOptions, GptPositions, LinearOptions, MlpOptions, ModelOptions, Preset, ResNetOptions,
    TextEncoderOptions,
};
use warpstep::model::{Input, Mode, Model, Value};
use warpstep::optim::{Clip, MomentumForm, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use warpstep::random::{Philox, Purpose};
use warpstep::train::profile::{Profile, Speed, update_bytes};

/// An H100 SXM: a copy within its memory, bf16 products without sparsity.
const H100: Speed = Speed { copy: 3.0e12, product: 989e12 };
/// The same for f32 products in tf32.
const H100_TF32: Speed = Speed { copy: 3.0e12, product: 494.5e12 };

/// A model, a batch, and how it is trained.
struct Work {
    name: &'static str,
    what: &'static str,
    preset: Preset,
    fit: Fit,
    input: Input,
    batch: usize,
    bf16: bool,
    rule: Rule,
}

fn works() -> Vec<Work> {
    let adam = Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 };
    let momentum =
        Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
    let fit = Fit { vocabulary: None, context: None, goal: Goal::Classes(10), padding: None, outputs: 0 };
    let tokens = |vocabulary, context, goal| Fit { vocabulary: Some(vocabulary), context: Some(context), goal, ..fit };
    let llama = GptOptions {
        norm: NormKind::RmsNorm,
        positions: GptPositions::Rotary(RotaryOptions::default()),
        activation: HiddenActivation::Swiglu,
        kv_heads: Some(4),
        tied: false,
        ..GptOptions::default()
    };
    let cnn = CnnOptions { batch_norm: true, dropout: 0.3, ..CnnOptions::default() };
    let mlp = MlpOptions { hidden: vec![256, 128], activation: ActivationKind::Relu, ..MlpOptions::default() };
    let work =
        |name, what, preset, fit, input, batch, bf16, rule| Work { name, what, preset, fit, input, batch, bf16, rule };
    let text = |preset| (preset, tokens(50_304, 1024, Goal::NextToken), Input::Tokens(1024));
    let (gpt2, gpt2_fit, gpt2_input) = text(Preset::Gpt(GptOptions { bias: true, ..GptOptions::default() }));
    let (llama, llama_fit, llama_input) = text(Preset::Gpt(llama));
    vec![
        work("gpt2", "GPT-2 124M, 16 x 1024 tokens a micro-batch, bf16", gpt2, gpt2_fit, gpt2_input, 16, true, adam),
        work(
            "llama",
            "the same size in Llama's form, 16 x 1024 tokens, bf16",
            llama,
            llama_fit,
            llama_input,
            16,
            true,
            adam,
        ),
        work(
            "resnet18",
            "ResNet-18, 256 pictures of 224 x 224, bf16",
            Preset::ResNet(ResNetOptions::of_depth(18).unwrap_or_default()),
            Fit { goal: Goal::Classes(1000), ..fit },
            Input::Real(vec![3, 224, 224]),
            256,
            true,
            momentum,
        ),
        work(
            "cnn",
            "MNIST's small CNN, 128 pictures, f32",
            Preset::Cnn(cnn),
            fit,
            Input::Real(vec![1, 28, 28]),
            128,
            false,
            momentum,
        ),
        work(
            "mlp",
            "784-256-128-10, 128 samples, f32",
            Preset::Mlp(mlp),
            fit,
            Input::Real(vec![784]),
            128,
            false,
            momentum,
        ),
        work(
            "text_encoder",
            "an encoder of text, 64 x 128 tokens, dropout, bf16",
            Preset::TextEncoder(TextEncoderOptions {
                layers: 2,
                heads: 4,
                width: 128,
                ..TextEncoderOptions::default()
            }),
            Fit { padding: Some(0), ..tokens(20_000, 128, Goal::Classes(2)) },
            Input::Tokens(128),
            64,
            true,
            adam,
        ),
        work(
            "linear",
            "linear regression, 1024 samples of 64 values, f32",
            Preset::Linear(LinearOptions::default()),
            Fit { goal: Goal::Values(1), ..fit },
            Input::Real(vec![64]),
            1024,
            false,
            Rule::Sgd,
        ),
    ]
}

impl Work {
    fn model<B: Backend>(&self) -> Result<Model<B>> {
        ModelOptions { preset: self.preset.clone(), loss: None, label_smoothing: 0.0 }.build(&self.fit)
    }

    fn optimizer(&self) -> OptimizerOptions {
        let clip = Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } };
        OptimizerOptions { clip, ..OptimizerOptions::new(self.rule, 1e-4) }
    }

    /// Prints what each operation costs: a line for each that differs in bytes or arithmetic.
    fn floors<B: Backend>(&self, speed: Speed, copy_bytes: usize) -> Result<()> {
        let mut model = self.model::<B>()?;
        let program = model.plan(&self.input, self.batch, Mode::Training)?;
        let (layout, _) = model.parameters().layout()?;
        let plan = UpdatePlan::new(&self.optimizer(), &layout)?;
        println!("\n### `{}`: {}, {:.1}M parameters\n", self.name, self.what, layout.parameters() as f64 / 1e6);
        println!("| operation | a step | MB a call | GFLOP a call | floor, us a call | floor, us a step |");
        println!("| --- | ---: | ---: | ---: | ---: | ---: |");
        let mut lines: Vec<(&str, u64, u64, u64)> = Vec::new();
        for cost in program.costs(model.parameters())? {
            match lines.iter_mut().find(|line| (line.0, line.1, line.2) == (cost.name, cost.bytes, cost.flops)) {
                Some(line) => line.3 += 1,
                None => lines.push((cost.name, cost.bytes, cost.flops, 1)),
            }
        }
        lines.push(("update", update_bytes(&plan, layout.parameters(), copy_bytes), 0, 1));
        let mut all = 0.0;
        for (name, bytes, flops, count) in lines {
            let floor = 1e3 * speed.floor_ms(bytes, flops);
            all += floor * count as f64;
            println!(
                "| {name} | {count} | {:.3} | {:.3} | {floor:.2} | {:.1} |",
                bytes as f64 / 1e6,
                flops as f64 / 1e9,
                floor * count as f64
            );
        }
        println!("| all of it | | | {:.1} | | {all:.1} |", program.flops() as f64 / 1e9);
        println!("\nMeasured by: `cargo run --release --example operations -- --device cuda {}`", self.name);
        Ok(())
    }

    /// Runs steps on random data, and prints what each operation took.
    fn measure<B: Profiled + Update>(&self, backend: &B, micro_batches: u64) -> Result<()> {
        let mut model = self.model::<B>()?;
        let profile = Profile::new(backend, &mut model, &self.optimizer(), micro_batches)?;
        let program = model.plan(&self.input, self.batch, Mode::Training)?;
        let (layout, _) = model.parameters().layout()?;
        let plan = UpdatePlan::new(&self.optimizer(), &layout)?;
        let (mut activations, mut arena) = (program.activations(backend)?, model.arena(backend, 1, plan.slots.len())?);
        let random = Philox::new(1, Purpose::Sampling, 0);
        for value in [Some(program.input), program.target].into_iter().flatten() {
            match value {
                Value::Real(act) => {
                    let range = activations.range(act);
                    let values: Vec<B::Storage> = (0..range.len() as u64).map(|at| real(random.uniform(at))).collect();
                    backend.upload(&mut activations.values, range.start, &values)?;
                }
                Value::Tokens(indices) => {
                    let range = activations.index_range(indices);
                    let bound = match self.fit.goal {
                        Goal::Classes(classes) if Some(value) == program.target => classes,
                        _ => self.fit.vocabulary.unwrap_or(1),
                    };
                    let values: Vec<i32> =
                        (0..range.len() as u64).map(|at| random.below(at, bound as u64) as i32).collect();
                    backend.upload(&mut activations.indices, range.start, &values)?;
                }
            }
        }
        // Some before to warm up, and one that ends the last that counts.
        for step in 1..=micro_batches + 3 {
            let mut memory = Memory { arena: &mut arena, activations: &mut activations };
            backend.run(&program.ops, &mut memory, &StepContext { micro_step: step, ..StepContext::default() })?;
            let params = StepParams { learning_rate: 1e-4, step, divisor: 1.0, zero_gradients: false };
            backend.update(&mut arena, &plan, &params)?;
        }
        println!("\n{}: {}", self.name, self.what);
        print!("{}", profile.table()?.text());
        Ok(())
    }
}

fn real<T: warpstep::real::Element>(value: f32) -> T {
    T::from_f32(value)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    let named = arguments.next_if(|argument| argument == "--device");
    let device = named.map(|_| arguments.next().unwrap_or_default());
    let mut flag = |name: &str| arguments.next_if(|argument| argument == name).is_some();
    let attention = if flag("--groups") { AttentionProducts::Groups } else { AttentionProducts::Warps };
    let small_products = if flag("--library") { SmallProducts::Never } else { SmallProducts::Measured };
    let names: Vec<String> = arguments.collect();
    let known = works();
    if let Some(wrong) = names.iter().find(|name| known.iter().all(|work| work.name != **name)) {
        let expected: Vec<&str> = known.iter().map(|work| work.name).collect();
        return Err(Error::config("arguments", format!("found {wrong:?}, expected {}", expected.join(", "))));
    }
    if device.as_deref() == Some("emulated") && !emulated::is_active() {
        return Err(emulated::start_again());
    }
    for work in known.iter().filter(|work| names.is_empty() || names.iter().any(|name| name == work.name)) {
        match device.as_deref() {
            None if work.bf16 => work.floors::<Cuda<bf16>>(H100, size_of::<bf16>())?,
            None => work.floors::<Cuda<f32>>(H100_TF32, 0)?,
            Some("cpu") => work.measure(&Cpu::<f32>::new(), 5)?,
            Some("cuda" | "emulated") => {
                let options = DeviceOptions { tf32: !work.bf16, attention, small_products, ..DeviceOptions::default() };
                let device = Device::open(options)?;
                let count = if emulated::is_active() { 2 } else { 20 };
                if work.bf16 {
                    work.measure(&Cuda::<bf16>::new(device), count)?;
                } else {
                    work.measure(&Cuda::<f32>::new(device), count)?;
                }
            }
            Some(other) => {
                return Err(Error::config("--device", format!("found {other:?}, expected cpu, cuda or emulated")));
            }
        }
    }
    Ok(())
}
