//! Bytes to batches: source (where bytes live), format (what they mean), dataset, sampler, loader.

use std::sync::Arc;

/// What one sample's input is.
#[derive(Clone, Debug, PartialEq)]
pub enum InputSpec {
    /// Real values of this shape: `[features]`, `[channels, height, width]` or `[samples]` of a waveform.
    Real {
        /// Shape of one sample.
        shape: Vec<usize>,
    },
    /// `context` whole numbers below `vocabulary`.
    Tokens {
        /// Tokens in one sample.
        context: usize,
        /// Number of distinct tokens.
        vocabulary: usize,
    },
}

/// What one sample's target is.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetSpec {
    /// One class a sample.
    Class {
        /// Names of the classes, in the order of their numbers.
        names: Vec<String>,
    },
    /// `width` real values a sample.
    Real {
        /// Values a sample.
        width: usize,
    },
    /// The token after each input token.
    NextToken,
}

/// The input values of a batch, samples one after the other.
#[derive(Clone, Debug, PartialEq)]
pub enum Inputs {
    /// `[samples, ..shape]`.
    Real(Vec<f32>),
    /// `[samples, context]`.
    Tokens(Vec<i32>),
}

/// The targets of a batch, samples one after the other.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// A class a sample, or the next token for each token; [`IGNORE`] is not counted.
    Index(Vec<i32>),
    /// `[samples, width]`.
    Real(Vec<f32>),
}

/// A target that counts neither in the loss nor in the accuracy (PyTorch's `ignore_index`).
pub const IGNORE: i32 = -100;

/// One batch, as the trainer takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Input values.
    pub inputs: Inputs,
    /// Target values.
    pub targets: Targets,
    /// Number of samples.
    pub samples: usize,
}

/// Samples that can be read in any order, from any thread.
pub trait Dataset: Send + Sync {
    /// Number of samples.
    fn len(&self) -> usize;
    /// Whether there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// What an input is.
    fn input(&self) -> InputSpec;
    /// What a target is.
    fn target(&self) -> TargetSpec;
}

/// A run's data: what is trained on and what is held out.
#[derive(Clone)]
pub struct Splits {
    /// Trained on.
    pub train: Arc<dyn Dataset>,
    /// Looked at during training.
    pub validation: Option<Arc<dyn Dataset>>,
    /// Looked at once, at the end.
    pub test: Option<Arc<dyn Dataset>>,
}
