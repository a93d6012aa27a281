//! What is asked for, and what both frameworks answer with.

use anyhow::{Context, Result, bail};

/// The arguments.
pub struct Asked {
    pub framework: String,
    pub work: String,
    pub update: String,
    pub precision: String,
    pub device: String,
    pub batch: usize,
    pub context: usize,
    /// Samples in memory that batches are taken from: whole batches. None for an update.
    pub samples: usize,
    pub parameters: usize,
}

/// A work that can be repeated.
pub trait Step {
    /// Does it once; all of it is done when this returns.
    fn step(&mut self) -> Result<()>;
    /// Trained parameters, counted from the tensors.
    fn parameters(&self) -> usize;
    /// The shape of a batch's inputs, from the tensors.
    fn inputs(&self) -> Vec<usize>;
    /// Samples that batches are taken from, from the tensors; an update takes none.
    fn samples(&self) -> usize {
        0
    }
    /// Whether the last loss and all parameters are finite.
    fn finite(&self) -> Result<bool>;
}

/// nanoGPT's configuration for CPUs.
pub const VOCABULARY: usize = 65;
pub const LAYERS: usize = 4;
pub const HEADS: usize = 4;
pub const WIDTH: usize = 128;

/// Batches that the samples in memory make, where no number of samples is asked for.
const BATCHES: usize = 64;

pub const LEARNING_RATE: f64 = 1e-4;
pub const MOMENTUM: f64 = 0.9;
pub const BETAS: [f64; 2] = [0.9, 0.99];
pub const EPSILON: f64 = 1e-8;
pub const DECAY: f64 = 0.1;
pub const MAX_NORM: f64 = 1.0;

impl Asked {
    /// From arguments of the form `--name value`.
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut asked = Asked {
            framework: String::new(),
            work: String::new(),
            update: String::new(),
            precision: "f32".into(),
            device: "cpu".into(),
            batch: 0,
            context: 64,
            samples: 0,
            parameters: 50_000_000,
        };
        let mut threads = 0;
        while let Some(name) = arguments.next() {
            let value = arguments.next().with_context(|| format!("{name} has no value"))?;
            let number = || value.parse::<usize>().with_context(|| format!("{name}: found {value:?}, expected a number"));
            match name.as_str() {
                "--framework" => asked.framework = value,
                "--work" => asked.work = value,
                "--update" => asked.update = value,
                "--precision" => asked.precision = value,
                "--device" => asked.device = value,
                "--batch" => asked.batch = number()?,
                "--context" => asked.context = number()?,
                "--samples" => asked.samples = number()?,
                "--parameters" => asked.parameters = number()?,
                "--threads" => threads = number()?,
                _ => bail!("found the argument {name:?}, expected one of `../common.py`"),
            }
        }
        if threads > 0 {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        let (update, batch) = if asked.work == "gpt_cpu" { ("adamw+global_norm", 12) } else { ("momentum+global_norm", 128) };
        if asked.update.is_empty() {
            asked.update = update.into();
        }
        if asked.batch == 0 {
            asked.batch = batch;
        }
        if asked.work == "update" {
            asked.samples = 0;
        } else if asked.samples == 0 {
            asked.samples = BATCHES * asked.batch;
        }
        Ok(asked)
    }

    /// The samples of each batch, in an order of chance.
    pub fn order(&self) -> Vec<Vec<u32>> {
        let mut samples: Vec<u32> = (0..self.samples as u32).collect();
        // Every sample changes places with one before it, by the numbers of a linear congruential generator (Knuth's constants).
        let mut state = 1u64;
        for last in (1..samples.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            samples.swap(last, (state >> 33) as usize % (last + 1));
        }
        samples.chunks_exact(self.batch).map(<[u32]>::to_vec).collect()
    }

    /// Why this is not done here.
    pub fn not_here(&self) -> Option<String> {
        if !["mlp", "cnn", "gpt_cpu", "update"].contains(&self.work.as_str()) {
            return Some(format!("it does no {} here", self.work));
        }
        if !["momentum+global_norm", "adamw+global_norm"].contains(&self.update.as_str()) {
            return Some(format!("it does no {} here", self.update));
        }
        (self.device != "cpu" || self.precision != "f32")
            .then(|| format!("it is built for CPUs and f32 alone, not for {} in {}", self.device, self.precision))
    }

    pub fn uses_adamw(&self) -> bool {
        self.update.starts_with("adamw")
    }

    /// Sizes of the tensors of the work `update`, of about a million values each.
    pub fn pieces(&self) -> Vec<usize> {
        let count = (self.parameters / 1_000_000).max(1);
        (0..count).map(|i| self.parameters / count + usize::from(i < self.parameters % count)).collect()
    }
}
