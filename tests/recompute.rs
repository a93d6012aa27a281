//! `model.recompute`: blocks that keep their input alone and run their forward again in the backward. The numbers stay, to the
//! bit; memory falls.
//!
//! The device is the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

mod common;
#[path = "common/device.rs"]
mod device;

use common::fresh_seed;
use half::bf16;
use warpstep::backend::Backend;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::Cuda;
use warpstep::backend::ops::{ActivationKind, Update};
use warpstep::config::RunFile;
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::layers::{HiddenActivation, NormKind, RotaryOptions};
use warpstep::model::presets::{
    Fit, Goal, GptOptions, GptPositions, LayerOptions, ModelOptions, Preset, ResNetOptions, TextEncoderOptions,
};
use warpstep::model::{Input, Mode, Program};
use warpstep::optim::{OptimizerOptions, Rule};
use warpstep::random::{Philox, Purpose};
use warpstep::train::step::{Trainer, TrainerParts};

const VOCABULARY: usize = 11;
const CONTEXT: usize = 6;
const BATCH: usize = 3;
const CLASSES: usize = 4;

/// A model of a kind, and what it is fed with.
#[derive(Clone, Copy)]
struct Task {
    preset: fn(bool) -> Preset,
    input: fn() -> Input,
    goal: Goal,
}

const GPT: Task = Task {
    preset: |recompute| {
        let gpt = GptOptions { layers: 3, heads: 2, width: 16, bias: true, dropout: 0.2, ..GptOptions::default() };
        Preset::Gpt(GptOptions { recompute, ..gpt })
    },
    input: || Input::Tokens(CONTEXT),
    goal: Goal::NextToken,
};

const LLAMA: Task = Task {
    preset: |recompute| {
        Preset::Gpt(GptOptions {
            layers: 2,
            heads: 4,
            kv_heads: Some(2),
            width: 16,
            dropout: 0.1,
            norm: NormKind::RmsNorm,
            positions: GptPositions::Rotary(RotaryOptions::default()),
            activation: HiddenActivation::Swiglu,
            tied: false,
            recompute,
            ..GptOptions::default()
        })
    },
    ..GPT
};

const ENCODER: Task = Task {
    preset: |recompute| {
        let encoder = TextEncoderOptions { layers: 2, heads: 2, width: 16, ..TextEncoderOptions::default() };
        Preset::TextEncoder(TextEncoderOptions { recompute, ..encoder })
    },
    input: || Input::Tokens(CONTEXT),
    goal: Goal::Classes(CLASSES),
};

const RESNET: Task = Task {
    preset: |recompute| {
        let net = ResNetOptions { blocks: vec![2, 1], channels: vec![4, 6], ..ResNetOptions::default() };
        Preset::ResNet(ResNetOptions { recompute, ..net })
    },
    input: || Input::Real(vec![1, 6, 6]),
    goal: Goal::Classes(CLASSES),
};

/// Residual layers of a list, one within the other, with what is kept from step to step and what draws random numbers.
const LIST: Task = Task {
    preset: |recompute| {
        let linear = |outputs| LayerOptions::Linear { outputs, bias: true };
        let inner = vec![
            LayerOptions::BatchNorm { epsilon: 1e-5, momentum: 0.3 },
            LayerOptions::Activation(ActivationKind::Relu),
            LayerOptions::Dropout { probability: 0.25 },
            linear(Some(12)),
        ];
        let outer = vec![
            linear(Some(12)),
            LayerOptions::Activation(ActivationKind::Relu),
            LayerOptions::Residual { layers: inner, shortcut: vec![], recompute },
            LayerOptions::Dropout { probability: 0.25 },
            LayerOptions::Activation(ActivationKind::GeluTanh),
        ];
        let shortcut = vec![linear(Some(12))];
        Preset::Layers(vec![
            LayerOptions::Flatten,
            linear(Some(10)),
            LayerOptions::Residual { layers: outer, shortcut, recompute },
            LayerOptions::Activation(ActivationKind::Silu),
            linear(None),
        ])
    },
    ..RESNET
};

impl Task {
    fn model<B: Backend>(&self, recompute: bool) -> warpstep::model::Model<B> {
        let options = ModelOptions { preset: (self.preset)(recompute), loss: None, label_smoothing: 0.0 };
        let tokens = matches!((self.input)(), Input::Tokens(_));
        let fit = Fit {
            vocabulary: tokens.then_some(VOCABULARY),
            context: tokens.then_some(CONTEXT),
            goal: self.goal,
            padding: (self.goal != Goal::NextToken && tokens).then_some(0),
            outputs: 0,
        };
        options.build(&fit).unwrap()
    }

    fn program(&self, recompute: bool, batch: usize) -> Program<Cpu<f32>> {
        self.model(recompute).plan(&(self.input)(), batch, Mode::Training).unwrap()
    }

    fn batch(&self, random: &Philox, number: u64) -> Batch {
        let draw = |below: usize, count: usize, from: u64| -> Vec<i32> {
            (0..count as u64).map(|i| random.below(number * 10_000 + from + i, below as u64) as i32).collect()
        };
        let inputs = match (self.input)() {
            Input::Tokens(time) => Inputs::Tokens(draw(VOCABULARY, BATCH * time, 0)),
            Input::Real(shape) => {
                let len = (BATCH * shape.iter().product::<usize>()) as u64;
                Inputs::Real((0..len).map(|i| random.normal(number * 10_000 + i) as f32).collect())
            }
        };
        let targets = match self.goal {
            Goal::NextToken => draw(VOCABULARY, BATCH * CONTEXT, 5_000),
            _ => draw(CLASSES, BATCH, 5_000),
        };
        Batch { inputs, targets: Targets::Index(targets), samples: BATCH }
    }

    /// The bits of parameters, gradients and kept tensors after a few steps, and the last loss.
    fn trained<B: Update<Real = f32>>(&self, backend: B, seed: u64, recompute: bool) -> [Vec<u32>; 4] {
        let optimizer = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 }, 1e-2);
        let mut trainer = Trainer::new(TrainerParts {
            backend,
            model: self.model(recompute),
            input: (self.input)(),
            batch_size: BATCH,
            accumulate: 2,
            optimizer: &optimizer,
            ema: None,
            seed,
        })
        .unwrap();
        let random = Philox::new(seed, Purpose::Sampling, 0);
        let mut loss = 0.0;
        for step in 0..4 {
            let batches: Vec<Batch> = (0..2).map(|micro| self.batch(&random, 2 * step + micro)).collect();
            loss = trainer.step(&batches, 1e-2).unwrap().loss;
        }
        let read = |buffer: &B::Buffer<f32>, len: usize| -> Vec<u32> {
            let mut values = vec![0f32; len];
            trainer.backend().download(buffer, 0, &mut values).unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        let arena = trainer.arena();
        let (len, kept) = (arena.layout.padded_len(), arena.state_layout.padded_len());
        let bits = [read(&arena.parameters, len), read(&arena.gradients, len), read(&arena.state, kept)];
        let [parameters, gradients, state] = bits;
        [parameters, gradients, state, vec![(loss as f32).to_bits()]]
    }
}

fn assert_same_bits<B: Update<Real = f32>>(task: &Task, backend: impl Fn() -> B) {
    let seed = fresh_seed();
    let [kept, recomputed] = [false, true].map(|recompute| task.trained(backend(), seed, recompute));
    for (name, (kept, recomputed)) in
        ["parameters", "gradients", "kept tensors", "loss"].iter().zip(kept.iter().zip(&recomputed))
    {
        assert_eq!(kept.len(), recomputed.len());
        let differ = kept.iter().zip(recomputed).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "of {} {name}", kept.len());
    }
}

#[test]
fn on_the_cpu_the_bits_are_those_of_activations_that_were_kept() {
    for task in [GPT, LLAMA, ENCODER, RESNET, LIST] {
        assert_same_bits(&task, Cpu::<f32>::new);
    }
}

#[test]
fn on_the_device_the_bits_are_those_of_activations_that_were_kept() {
    let Some(device) = device::device() else { return };
    for task in [GPT, LLAMA, RESNET, LIST] {
        assert_same_bits(&task, || Cuda::<f32>::new(device.clone()));
    }
    assert_same_bits(&GPT, || Cuda::<bf16>::new(device.clone()));
}

#[test]
fn eight_blocks_need_less_than_half_of_the_memory_and_one_more_forward() {
    let eight = Task {
        preset: |recompute| {
            Preset::Gpt(GptOptions { layers: 8, heads: 4, width: 32, dropout: 0.1, recompute, ..GptOptions::default() })
        },
        ..GPT
    };
    let [kept, recomputed] = [false, true].map(|recompute| eight.program(recompute, 8));
    let [before, after] = [&kept, &recomputed].map(|program| program.activation_parts(1).total());
    assert!(2 * after < before, "{after} bytes, {before} where all is kept");
    let flops = |row: &warpstep::model::Row| if row.name.starts_with("transformer.h.") { row.flops } else { 0 };
    let blocks: u64 = kept.rows.iter().map(flops).sum();
    let more = recomputed.flops() - kept.flops();
    // The block's last product, dropout and sum need not be computed again.
    assert!(more > blocks / 2 && more < blocks, "{more} of the blocks' {blocks}");
    // What a model asks for is the same, and knows nothing of attention's scores, which its backward always computes again.
    assert_eq!(recomputed.model_flops(), kept.model_flops());
    let scores: u64 = kept.ops.iter().filter(|op| op.name() == "attention_forward").map(|op| op.flops() / 2).sum();
    assert_eq!(kept.model_flops(), kept.flops() - scores);
}

#[test]
fn memory_falls_wherever_it_is_asked_for_and_the_model_s_table_stays() {
    for task in [GPT, LLAMA, ENCODER, RESNET, LIST] {
        let [kept, recomputed] = [false, true].map(|recompute| task.program(recompute, 16));
        let [before, after] = [&kept, &recomputed].map(|program| program.activation_parts(1).total());
        assert!(after < before, "{:?}: {after} bytes, {before} where all is kept", (task.preset)(true));
        assert_eq!(recomputed.rows, kept.rows);
        assert_eq!(recomputed.forward_ops, kept.forward_ops);
        let [evaluated, as_before] = [true, false].map(|recompute| {
            let program = task.model::<Cpu<f32>>(recompute).plan(&(task.input)(), 4, Mode::Evaluation).unwrap();
            (program.flops(), program.activation_parts(1).total(), program.ops.len())
        });
        assert_eq!(evaluated, as_before);
    }
}

#[test]
fn nothing_is_computed_that_nobody_reads() {
    let [kept, recomputed] = [false, true].map(|recompute| GPT.program(recompute, 2));
    let count = |program: &Program<Cpu<f32>>, name: &str| program.ops.iter().filter(|op| op.name() == name).count();
    let blocks = 3;
    // Of a block's four products three are computed again, of its two dropouts one; each block has both in its backward too.
    assert_eq!(count(&recomputed, "linear_forward"), count(&kept, "linear_forward") + 3 * blocks);
    assert_eq!(count(&recomputed, "dropout"), count(&kept, "dropout") + blocks);
    assert_eq!(count(&recomputed, "attention_forward"), 2 * blocks);
}

#[test]
fn a_run_goes_on_with_or_without_it() {
    let identity = |model: &str| {
        let text = format!(
            "[run]\nsteps = 1\n[data]\nformat = \"digits\"\nbatch_size = 2\n[optimizer]\nrule = \"sgd\"\nlearning_rate = 0.1\n{model}"
        );
        RunFile::from_text(&text, std::path::Path::new("run.toml"), &[]).unwrap().identity
    };
    for model in [
        "[model]\npreset = \"resnet\"\nrecompute = RECOMPUTE",
        "[[model.layers]]\nkind = \"residual\"\nrecompute = RECOMPUTE\nlayers = [{ kind = \"residual\", recompute = RECOMPUTE, \
         layers = [{ kind = \"relu\" }] }]",
    ] {
        let [with, without] = ["true", "false"].map(|recompute| identity(&model.replace("RECOMPUTE", recompute)));
        assert_eq!(with, without);
        assert!(!with.contains("recompute"), "{with}");
    }
}
