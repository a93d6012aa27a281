//! Warpstep trains models: a run file goes in; a trained model, its curves and its checkpoints come out.
//!
//! The command line (`warpstep train run.toml`) is the front door; this is what stands behind it, for Rust programs that want
//! fast, correct training steps under their own models.
//!
//! # The update alone
//!
//! Parameters and gradients lie in flat buffers; a [`plan::ParamLayout`] says which tensor is where, and an
//! [`optim::UpdatePlan`] says what happens to it. One call divides, clips, decays and updates everything:
//!
//! ```
//! use warpstep::backend::cpu::update;
//! use warpstep::optim::{Clip, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
//! use warpstep::plan::{ParamLayout, ParamSpec};
//!
//! # fn main() -> warpstep::Result<()> {
//! let layout = ParamLayout::new(&[ParamSpec { name: "theta".into(), shape: vec![3] }])?;
//! let options = OptimizerOptions {
//!     clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
//!     ..OptimizerOptions::new(Rule::Sgd, 0.5)
//! };
//! let plan = UpdatePlan::new(&options, &layout)?;
//! let mut theta = vec![0f32; layout.padded_len()];
//! let mut gradient = vec![0f32; layout.padded_len()];
//! gradient[..3].copy_from_slice(&[3.0, 0.0, 4.0]);
//! let step = StepParams { learning_rate: 0.5, step: 1, divisor: 1.0, zero_gradients: false };
//! let outcome = update(&mut theta, &mut gradient, &mut [], &plan, &step)?;
//! assert_eq!(outcome.grad_norm, 5.0);
//! assert!((theta[0] + 0.3).abs() < 1e-6 && (theta[2] + 0.4).abs() < 1e-6);
//! # Ok(())
//! # }
//! ```
//!
//! # A model of one's own
//!
//! A [`model::Layer`] does not compute: its forward and its backward emit operations into a [`model::Planner`], and the
//! resulting [`model::Program`] runs on any [`backend::Backend`]. [`model::layers`] holds the layers,
//! [`model::presets`] whole models, [`model::Probe`] runs a layer alone and compares its gradients with finite differences.
//! [`train::step::Trainer`] joins a model, a device and an optimizer:
//!
//! ```
//! use warpstep::backend::cpu::Cpu;
//! use warpstep::backend::ops::ActivationKind;
//! use warpstep::data::{Batch, Inputs, Targets};
//! use warpstep::model::layers::{Activation, Linear, Sequential};
//! use warpstep::model::{Input, Loss, Model};
//! use warpstep::optim::{OptimizerOptions, Rule};
//! use warpstep::train::step::{Trainer, TrainerParts};
//!
//! # fn main() -> warpstep::Result<()> {
//! let layers = Sequential::new()
//!     .then("0", Linear::new(16))
//!     .then("1", Activation::new(ActivationKind::Tanh))
//!     .then("2", Linear::new(1));
//! let optimizer = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 }, 0.02);
//! let mut trainer = Trainer::new(TrainerParts {
//!     backend: Cpu::<f32>::new(),
//!     model: Model::new(Box::new(layers), Loss::MeanSquaredError),
//!     input: Input::Real(vec![1]),
//!     batch_size: 4,
//!     accumulate: 1,
//!     optimizer: &optimizer,
//!     ema: None,
//!     seed: 1,
//! })?;
//! let batch = Batch {
//!     inputs: Inputs::Real(vec![-1.0, -0.5, 0.5, 1.0]),
//!     targets: Targets::Real(vec![1.0, 0.25, 0.25, 1.0]),
//!     samples: 4,
//! };
//! let batch = [batch];
//! let first = trainer.step(&batch, 0.02)?.loss;
//! for _ in 0..200 {
//!     trainer.step(&batch, 0.02)?;
//! }
//! assert!(trainer.step(&batch, 0.02)?.loss < first / 100.0);
//! let (outputs, shape) = trainer.predict(&Inputs::Real(vec![-0.75, 0.75]), 2)?;
//! assert_eq!(shape, [2, 1]);
//! assert!(outputs.iter().all(|y| (y - 0.75f32.powi(2)).abs() < 0.2));
//! # Ok(())
//! # }
//! ```
//!
//! # Where things are
//!
//! [`train`] (the step, the loop, checkpoints, what a run leaves behind) uses [`model`], [`data`] and [`optim`]; these use
//! [`backend`], which interprets the plain values of [`optim`] and [`plan`]. [`config`] is the run file, read by [`cli`]
//! alone. Errors are one type, [`Error`], which knows the process exit code it asks for.

#![warn(missing_docs)]

pub mod backend;
pub mod bench;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
mod host;
pub mod log_mel;
pub mod model;
pub mod optim;
pub mod parallel;
pub mod plan;
pub mod random;
pub mod real;
mod tell;
pub mod text;
pub mod train;

pub use error::{Error, Result};
