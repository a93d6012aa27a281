//! Whole training steps: forward, loss, backward, clip, update.
//!
//! `cargo bench --bench step`; throughput counts tokens, or samples.

use criterion::{Criterion, Throughput};
use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::ActivationKind;
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::layers::{Activation, Linear, Sequential};
use warpstep::model::presets::GptOptions;
use warpstep::model::{Input, Loss, Model};
use warpstep::optim::{Clip, MomentumForm, NormClip, OptimizerOptions, Rule};
use warpstep::train::step::{Trainer, TrainerParts};

type Backend = Cpu<f32>;

fn bench(criterion: &mut Criterion, name: &str, model: Model<Backend>, input: Input, batch: &Batch, rule: Rule) {
    let norm = NormClip::Global { max_norm: 1.0 };
    let optimizer = OptimizerOptions { clip: Clip { norm, ..Clip::default() }, ..OptimizerOptions::new(rule, 1e-3) };
    let parts = TrainerParts {
        backend: Cpu::new(),
        model,
        input,
        batch_size: batch.samples,
        accumulate: 1,
        optimizer: &optimizer,
        ema: None,
        seed: 1,
    };
    let mut trainer = Trainer::new(parts).expect("a model that can be planned");
    let elements = match &batch.inputs {
        Inputs::Tokens(tokens) => tokens.len(),
        Inputs::Real(_) => batch.samples,
    };
    let mut group = criterion.benchmark_group("step");
    group.sample_size(20).throughput(Throughput::Elements(elements as u64));
    let mut step = || trainer.step(std::slice::from_ref(batch), 1e-3);
    group.bench_function(name, |b| b.iter(&mut step));
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let tokens = |seed: usize| (0..12 * 64).map(|i| ((i * 7919 + seed) % 65) as i32).collect::<Vec<_>>();
    let batch = Batch { inputs: Inputs::Tokens(tokens(1)), targets: Targets::Index(tokens(2)), samples: 12 };
    let gpt = GptOptions { layers: 4, heads: 4, width: 128, ..GptOptions::default() };
    let model = gpt.build(65, 64).expect("nanoGPT's CPU configuration");
    let adamw = Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 };
    bench(&mut criterion, "nanoGPT, 4 layers, 128 wide, 12 x 64 tokens", model, Input::Tokens(64), &batch, adamw);

    let values = (0..128 * 784).map(|i| (i as f32 * 0.7).sin()).collect();
    let classes = (0..128).map(|i| i % 10).collect();
    let batch = Batch { inputs: Inputs::Real(values), targets: Targets::Index(classes), samples: 128 };
    let layers = Sequential::new()
        .then("0", Linear::new(256))
        .then("1", Activation::new(ActivationKind::Relu))
        .then("2", Linear::new(128))
        .then("3", Activation::new(ActivationKind::Relu))
        .then("4", Linear::new(10));
    let loss = Loss::CrossEntropy { label_smoothing: 0.0, ignore_index: -100 };
    let model = Model::new(Box::new(layers), loss);
    let form = MomentumForm::Pytorch;
    let momentum = Rule::Momentum { form, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
    bench(&mut criterion, "MLP 784-256-128-10, batch 128", model, Input::Real(vec![784]), &batch, momentum);
    criterion.final_summary();
}
