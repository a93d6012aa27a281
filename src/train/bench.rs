//! Timing of whole training steps and of the update alone, for comparisons with other programs doing the same work.

use std::time::Instant;

use serde::Serialize;

use super::step::{Trainer, TrainerParts};
use crate::backend::Backend;
use crate::backend::cpu::{Cpu, update};
use crate::backend::ops::ActivationKind;
use crate::data::{Batch, Inputs, Targets};
use crate::error::{Error, Result};
use crate::model::Input;
use crate::model::presets::{Fit, Goal, GptOptions, MlpOptions, ModelOptions, Preset};
use crate::optim::{Clip, MomentumForm, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use crate::plan::{ParamLayout, ParamSpec};
use crate::random::{Philox, Purpose};

/// The names that [`bench()`] knows.
pub const NAMES: [&str; 3] = ["gpt_cpu", "mlp", "update"];

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Which work.
    pub name: String,
    /// What it ran on.
    pub device: String,
    /// Repetitions that count, after a warm-up.
    pub count: usize,
    /// Milliseconds a repetition, median.
    pub median_ms: f64,
    /// The fastest.
    pub min_ms: f64,
    /// Floating-point operations a repetition.
    pub flops: u64,
    /// Bytes that a repetition must move (update alone: 24 a parameter; a copy of 50M values moves 400 MB).
    pub bytes: u64,
    /// The floor in milliseconds, where it was measured in the same run: the bytes at the speed of a copy.
    pub floor_ms: Option<f64>,
}

/// Times the work called `name` for about `seconds`.
///
/// # Errors
/// Another name than [`NAMES`], or what a step reports.
pub fn bench(name: &str, seconds: f64) -> Result<Measured> {
    match name {
        "gpt_cpu" => {
            let (vocabulary, context, batch) = (65, 64, 12);
            let options = GptOptions { layers: 4, heads: 4, width: 128, ..GptOptions::default() };
            let tokens = |stream: u32| random_indices(stream, batch * context, vocabulary as u64);
            let batch = Batch { inputs: Inputs::Tokens(tokens(0)), targets: Targets::Index(tokens(1)), samples: batch };
            let rule = Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 };
            let optimizer = OptimizerOptions {
                weight_decay: 0.1,
                decoupled: true,
                decay_matrices_only: true,
                clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
                ..OptimizerOptions::new(rule, 1e-3)
            };
            let fit = Fit {
                vocabulary: Some(vocabulary),
                context: Some(context),
                goal: Goal::NextToken,
                padding: None,
                outputs: vocabulary,
            };
            step(name, Preset::Gpt(options), fit, &Input::Tokens(context), &batch, &optimizer, seconds)
        }
        "mlp" => {
            let batch = 128;
            let stream = Philox::new(1, Purpose::Sampling, 2);
            let values = (0..batch as u64 * 784).map(|i| stream.uniform(i)).collect();
            let targets = Targets::Index(random_indices(1, batch, 10));
            let batch = Batch { inputs: Inputs::Real(values), targets, samples: batch };
            let optimizer = OptimizerOptions {
                clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
                ..OptimizerOptions::new(momentum(), 0.05)
            };
            let fit = Fit { vocabulary: None, context: None, goal: Goal::Classes(10), padding: None, outputs: 10 };
            let preset = Preset::Mlp(MlpOptions {
                hidden: vec![256, 128],
                activation: ActivationKind::Relu,
                ..MlpOptions::default()
            });
            step(name, preset, fit, &Input::Real(vec![784]), &batch, &optimizer, seconds)
        }
        "update" => update_alone(name, seconds),
        other => Err(Error::config("bench", format!("found {other:?}, expected one of {}", NAMES.join(", ")))),
    }
}

fn momentum() -> Rule {
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 }
}

fn random_indices(stream: u32, len: usize, bound: u64) -> Vec<i32> {
    let stream = Philox::new(1, Purpose::Sampling, stream);
    (0..len as u64).map(|i| stream.below(i, bound) as i32).collect()
}

/// A whole step: forward, loss, backward, clip, update.
fn step(
    name: &str,
    preset: Preset,
    fit: Fit,
    input: &Input,
    batch: &Batch,
    optimizer: &OptimizerOptions,
    seconds: f64,
) -> Result<Measured> {
    let model = ModelOptions { preset, loss: None, label_smoothing: 0.0 }.build(&fit)?;
    let mut trainer = Trainer::new(TrainerParts {
        backend: Cpu::<f32>::new(),
        model,
        input: input.clone(),
        batch_size: batch.samples,
        accumulate: 1,
        optimizer,
        ema: None,
        seed: 1,
    })?;
    let flops = trainer.program().flops();
    let device = trainer.backend().description();
    let times = repeat(seconds, || trainer.step(std::slice::from_ref(batch), 1e-4).map(drop))?;
    Ok(measured(name, device, &times, flops, 0, None))
}

/// Global-norm clip and momentum over 50M parameters, a copy of as many values before each for the floor.
fn update_alone(name: &str, seconds: f64) -> Result<Measured> {
    const PARAMETERS: usize = 50_000_000;
    let layout = ParamLayout::new(&[ParamSpec { name: "weight".into(), shape: vec![PARAMETERS / 1000, 1000] }])?;
    let options = OptimizerOptions {
        clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        ..OptimizerOptions::new(momentum(), 1e-3)
    };
    let plan = UpdatePlan::new(&options, &layout)?;
    let len = layout.padded_len();
    let mut parameters = vec![0.5f32; len];
    let mut gradients: Vec<f32> = (0..len).map(|i| (i % 1000) as f32 * 1e-3 - 0.5).collect();
    let mut velocity = vec![0.1f32; len];
    let mut copied = vec![0f32; len];
    let mut step = 0;
    let mut copies = Vec::new();
    let mut updates = Vec::new();
    repeat(seconds, || {
        let began = Instant::now();
        copy(&mut copied, &velocity);
        copies.push(began.elapsed().as_secs_f64());
        step += 1;
        let began = Instant::now();
        let params = StepParams { learning_rate: 1e-3, step, divisor: 1.0, zero_gradients: false };
        update(&mut parameters, &mut gradients, &mut [&mut velocity], &plan, &params)?;
        updates.push(began.elapsed().as_secs_f64());
        Ok(())
    })?;
    let bytes = 24 * PARAMETERS as u64;
    let copy_bandwidth = 8.0 * len as f64 / median(&mut copies);
    let device = Cpu::<f32>::new().description();
    Ok(measured(name, device, &updates, 0, bytes, Some(bytes as f64 / copy_bandwidth * 1e3)))
}

fn copy(to: &mut [f32], from: &[f32]) {
    use rayon::prelude::*;
    const PIECE: usize = 1 << 16;
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Seconds of each repetition, for about `seconds` after a warm-up of a tenth of it.
fn repeat(seconds: f64, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let began = Instant::now();
    while began.elapsed().as_secs_f64() < seconds / 10.0 {
        work()?;
    }
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed().as_secs_f64() < seconds || times.len() < 5 {
        let one = Instant::now();
        work()?;
        times.push(one.elapsed().as_secs_f64());
    }
    Ok(times)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measured(name: &str, device: String, times: &[f64], flops: u64, bytes: u64, floor_ms: Option<f64>) -> Measured {
    let mut times = times.to_vec();
    let median_ms = median(&mut times) * 1e3;
    Measured {
        name: name.to_owned(),
        device,
        count: times.len(),
        median_ms,
        min_ms: times.first().copied().unwrap_or(f64::NAN) * 1e3,
        flops,
        bytes,
        floor_ms,
    }
}
