//! The update alone, on your own buffers: logistic regression in a loop of your own.
//!
//! `cargo run --release --example optimizer_only`
//!
//! You own parameters, gradients and optimizer slots as plain slices; Warpstep plans the update once and applies it.

use warpstep::backend::cpu;
use warpstep::optim::{Clip, Decay, NormClip, OptimizerOptions, Rule, Schedule, StepParams, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};

const SAMPLES: usize = 512;
const FEATURES: usize = 20;
const STEPS: u64 = 200;

fn main() -> warpstep::Result<()> {
    // Where each tensor lies in the flat buffers: `layout` starts each one at a multiple of 128 elements.
    let tensor = |name: &str, shape: &[usize]| ParamSpec { name: name.into(), shape: shape.into() };
    let layout = ParamLayout::new(&[tensor("weight", &[1, FEATURES]), tensor("bias", &[1])])?;
    let [weight, bias] = [layout.entries()[0].range(), layout.entries()[1].range()];

    // AdamW with decay on the matrix alone, gradients clipped to a norm of 1, a warm cosine.
    let mut options = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, 0.1);
    options.decoupled = true;
    options.weight_decay = 0.01;
    options.decay_matrices_only = true;
    options.clip = Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } };
    let plan = UpdatePlan::new(&options, &layout)?;
    let schedule = Schedule { decay: Decay::Cosine, warmup_steps: 10, floor: 0.001 };
    schedule.validate(STEPS, options.learning_rate)?;

    let mut parameters = vec![0.0f32; layout.padded_len()];
    let mut gradients = vec![0.0f32; layout.padded_len()];
    let mut slots = vec![vec![0.0f32; layout.padded_len()]; plan.slots.len()];
    let (x, y) = data();

    let mut applied = 0;
    for step in 0..STEPS {
        let loss = backward(&x, &y, &parameters[weight.clone()], parameters[bias.start], |w, b| {
            gradients[weight.clone()].copy_from_slice(w);
            gradients[bias.start] = b;
        });
        let learning_rate = schedule.at(step, STEPS, options.learning_rate);
        let params = StepParams { learning_rate, step: applied + 1, divisor: 1.0, zero_gradients: false };
        let mut views: Vec<&mut [f32]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
        let outcome = cpu::update(&mut parameters, &mut gradients, &mut views, &plan, &params)?;
        // A step whose gradients are not finite changes nothing and does not count.
        applied += u64::from(!outcome.skipped);
        if step % 20 == 0 || step + 1 == STEPS {
            println!("step {step:3}  loss {loss:.4}  lr {learning_rate:.4}  gradient norm {:.4}", outcome.grad_norm);
        }
    }
    Ok(())
}

/// Two clouds of points, one a class: `x [SAMPLES, FEATURES]`, `y [SAMPLES]`.
fn data() -> (Vec<f32>, Vec<f32>) {
    let random = Philox::new(7, Purpose::Initialization, 0);
    let y: Vec<f32> = (0..SAMPLES).map(|i| (i % 2) as f32).collect();
    let noise = |i: usize| (0..4).map(|j| random.uniform((4 * i + j) as u64)).sum::<f32>() - 2.0;
    let x = (0..SAMPLES * FEATURES).map(|i| noise(i) + 0.4 * (y[i / FEATURES] - 0.5)).collect();
    (x, y)
}

/// The mean cross-entropy; `give` gets its gradient in weight and bias.
fn backward(x: &[f32], y: &[f32], weight: &[f32], bias: f32, give: impl FnOnce(&[f32], f32)) -> f32 {
    let (mut loss, mut by_weight, mut by_bias) = (0.0, vec![0.0; FEATURES], 0.0);
    for (x, &y) in x.chunks(FEATURES).zip(y) {
        let logit = bias + x.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>();
        loss += logit.max(0.0) - logit * y + (-logit.abs()).exp().ln_1p();
        let slope = (1.0 / (1.0 + (-logit).exp()) - y) / SAMPLES as f32;
        by_weight.iter_mut().zip(x).for_each(|(g, x)| *g += slope * x);
        by_bias += slope;
    }
    give(&by_weight, by_bias);
    loss / SAMPLES as f32
}
