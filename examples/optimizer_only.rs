//! The update alone, on your own buffers: logistic regression in a loop of your own.
//!
//! `cargo run --release --example optimizer_only`
//! `cargo run --release --example optimizer_only -- --device cuda` (or `emulated`)
//!
//! You own parameters, gradients and optimizer slots: plain slices on the CPU, slices of cudarc's on a GPU. Warpstep plans the
//! update once and applies it.

use std::sync::Arc;

use warpstep::backend::cpu;
use warpstep::backend::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};
use warpstep::backend::cuda::{Device, DeviceOptions, emulated, is_driver_present, update::Prepared};
use warpstep::optim::{Clip, Decay, NormClip, OptimizerOptions, Rule, Schedule, StepOutcome, StepParams, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};
use warpstep::{Error, Result};

const SAMPLES: usize = 512;
const FEATURES: usize = 20;
const STEPS: u64 = 200;

fn main() -> Result<()> {
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

    let mut arrays: Box<dyn Arrays> = match device()?.as_str() {
        "cpu" => Box::new(OnTheCpu::new(&plan, layout.padded_len())),
        _ => Box::new(OnTheGpu::new(&plan, layout.padded_len())?),
    };
    let mut parameters = vec![0.0f32; layout.padded_len()];
    let mut gradients = vec![0.0f32; layout.padded_len()];
    let (x, y) = data();

    let mut applied = 0;
    for step in 0..STEPS {
        let loss = backward(&x, &y, &parameters[weight.clone()], parameters[bias.start], |w, b| {
            gradients[weight.clone()].copy_from_slice(w);
            gradients[bias.start] = b;
        });
        let learning_rate = schedule.at(step, STEPS, options.learning_rate);
        let params = StepParams { learning_rate, step: applied + 1, divisor: 1.0, zero_gradients: false };
        let outcome = arrays.update(&plan, &params, &gradients, &mut parameters)?;
        // A step whose gradients are not finite changes nothing and does not count.
        applied += u64::from(!outcome.skipped);
        if step % 20 == 0 || step + 1 == STEPS {
            println!("step {step:3}  loss {loss:.4}  lr {learning_rate:.4}  gradient norm {:.4}", outcome.grad_norm);
        }
    }
    // The same on every device.
    let bits = parameters.iter().fold(0u32, |bits, value| bits.rotate_left(5) ^ value.to_bits());
    println!("bits of the parameters {bits:08x}");
    Ok(())
}

/// What `--device` names: cpu where it is not given.
fn device() -> Result<String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["--device", "cpu"] => Ok("cpu".into()),
        ["--device", "emulated"] if !emulated::is_active() => Err(emulated::start_again()),
        ["--device", "cuda" | "emulated"] if is_driver_present() => Ok("cuda".into()),
        ["--device", "cuda"] => Err(Error::Device("there is no NVIDIA driver here; try --device emulated".into())),
        _ => Err(Error::config("arguments", format!("found {arguments:?}, expected --device cpu, cuda or emulated"))),
    }
}

/// Memory that is updated, wherever it lies.
trait Arrays {
    /// Applies an update with these gradients, and reads the parameters back: here the gradient is computed on the host.
    fn update(
        &mut self,
        plan: &UpdatePlan,
        step: &StepParams,
        gradients: &[f32],
        parameters: &mut [f32],
    ) -> Result<StepOutcome>;
}

/// Slices of the host.
struct OnTheCpu {
    slots: Vec<Vec<f32>>,
}

impl OnTheCpu {
    fn new(plan: &UpdatePlan, len: usize) -> Self {
        OnTheCpu { slots: vec![vec![0.0; len]; plan.slots.len()] }
    }
}

impl Arrays for OnTheCpu {
    fn update(
        &mut self,
        plan: &UpdatePlan,
        step: &StepParams,
        gradients: &[f32],
        parameters: &mut [f32],
    ) -> Result<StepOutcome> {
        let mut views: Vec<&mut [f32]> = self.slots.iter_mut().map(Vec::as_mut_slice).collect();
        cpu::update(parameters, &mut gradients.to_vec(), &mut views, plan, step)
    }
}

/// Slices of a GPU, in a context and on a stream of your own.
struct OnTheGpu {
    stream: Arc<CudaStream>,
    prepared: Prepared,
    parameters: CudaSlice<f32>,
    gradients: CudaSlice<f32>,
    slots: Vec<CudaSlice<f32>>,
}

impl OnTheGpu {
    fn new(plan: &UpdatePlan, len: usize) -> Result<Self> {
        let stream = CudaContext::new(0).and_then(|context| context.new_stream()).map_err(failed)?;
        let zeros = || stream.alloc_zeros::<f32>(len).map_err(failed);
        Ok(OnTheGpu {
            prepared: Prepared::new(&Device::on_stream(&stream, DeviceOptions::default())?, plan)?,
            parameters: zeros()?,
            gradients: zeros()?,
            slots: plan.slots.iter().map(|_| zeros()).collect::<Result<_>>()?,
            stream,
        })
    }
}

impl Arrays for OnTheGpu {
    fn update(
        &mut self,
        _: &UpdatePlan,
        step: &StepParams,
        gradients: &[f32],
        parameters: &mut [f32],
    ) -> Result<StepOutcome> {
        self.stream.memcpy_htod(gradients, &mut self.gradients).map_err(failed)?;
        let mut slots: Vec<&mut CudaSlice<f32>> = self.slots.iter_mut().collect();
        let outcome = self.prepared.update(&mut self.parameters, &mut self.gradients, &mut slots, step)?;
        self.stream.memcpy_dtoh(&self.parameters, parameters).map_err(failed)?;
        self.stream.synchronize().map_err(failed)?;
        Ok(outcome)
    }
}

fn failed(error: DriverError) -> Error {
    Error::Device(format!("CUDA: {error:?}"))
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
