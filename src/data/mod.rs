//! Bytes to batches: source (where bytes live), format (what they mean), dataset, sampler, loader.
//!
//! [`open`] turns [`DataOptions`] into [`OpenedData`]: the splits of a run and the [`Preprocess`] that `predict` and
//! `generate` need later. [`Loader`] then reads batches ahead on threads of its own. Batch `n` is a pure function of the
//! seed and of `n`, so a resumed run needs only the number of the batch to go on with.

pub mod augment;
mod changed;
mod dataset;
mod format;
mod inspect;
mod loader;
mod normalize;
mod open;
pub mod options;
mod pictures;
mod preprocess;
mod reading;
mod reopen;
mod resident;
mod sampler;
pub mod source;
mod split;
mod tokenizer;
mod words;

use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use crate::log_mel::{LogMel, LogMelOptions, MelScale};
pub use changed::{Change, Sizes};
pub use format::natural_order;
pub use inspect::inspect;
pub use loader::{Loader, Prefetch, read_batch};
pub use normalize::Affine;
pub use open::{OpenedData, open, open_watched};
pub use options::{DataOptions, FormatOptions};
pub use pictures::Pictures;
pub(crate) use preprocess::no_tokenizer;
pub use preprocess::{Preprocess, Recipe, UserSample};
pub use reading::Reading;
pub(crate) use reopen::as_trained;
pub use resident::{Given, Layout, Picked, Table};
pub use sampler::{Sampler, SamplerOptions};
pub(crate) use source::Held;
pub use tokenizer::{GPT2_END_OF_TEXT, GPT2_VOCABULARY, Tokenizer, TokenizerKind};
pub use words::{Cleaning, PAD, UNKNOWN, Words};

/// What one sample's input is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

impl InputSpec {
    /// Values or tokens in one sample.
    pub fn elements(&self) -> usize {
        match self {
            InputSpec::Real { shape } => shape.iter().product(),
            InputSpec::Tokens { context, .. } => *context,
        }
    }
}

/// What one sample's target is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

impl TargetSpec {
    /// Targets in one sample whose input is `input`.
    pub fn elements(&self, input: &InputSpec) -> usize {
        match self {
            TargetSpec::Class { .. } => 1,
            TargetSpec::Real { width } => *width,
            TargetSpec::NextToken => input.elements(),
        }
    }
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

impl Batch {
    /// A batch of `samples` samples of zeros.
    pub fn zeros(input: &InputSpec, target: &TargetSpec, samples: usize) -> Self {
        let inputs = match input {
            InputSpec::Real { .. } => Inputs::Real(vec![0.0; samples * input.elements()]),
            InputSpec::Tokens { .. } => Inputs::Tokens(vec![0; samples * input.elements()]),
        };
        let targets = match target {
            TargetSpec::Class { .. } | TargetSpec::NextToken => {
                Targets::Index(vec![0; samples * target.elements(input)])
            }
            TargetSpec::Real { width } => Targets::Real(vec![0.0; samples * width]),
        };
        Batch { inputs, targets, samples }
    }
}

/// Which sample is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Sample `0 .. len()`.
    Sample(usize),
    /// The window that starts at token `0 .. starts()`.
    Window(usize),
}

/// The key of the random augmentations of one pass over the training split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The run's seed.
    pub seed: u64,
    /// Number of the pass.
    pub epoch: u64,
}

/// Where one sample's input is written to, all of it.
#[derive(Debug)]
pub enum InputMut<'a> {
    /// Real values.
    Real(&'a mut [f32]),
    /// Tokens.
    Tokens(&'a mut [i32]),
}

impl<'a> InputMut<'a> {
    pub(crate) fn real(self) -> Result<&'a mut [f32]> {
        match self {
            InputMut::Real(values) => Ok(values),
            InputMut::Tokens(_) => Err(Error::shape("data", "room for real inputs", "room for tokens")),
        }
    }

    pub(crate) fn tokens(self) -> Result<&'a mut [i32]> {
        match self {
            InputMut::Tokens(values) => Ok(values),
            InputMut::Real(_) => Err(Error::shape("data", "room for tokens", "room for real inputs")),
        }
    }
}

/// Where one sample's targets are written to, all of them.
#[derive(Debug)]
pub enum TargetMut<'a> {
    /// Classes or next tokens.
    Index(&'a mut [i32]),
    /// Real values.
    Real(&'a mut [f32]),
}

impl<'a> TargetMut<'a> {
    pub(crate) fn index(self) -> Result<&'a mut [i32]> {
        match self {
            TargetMut::Index(values) => Ok(values),
            TargetMut::Real(_) => Err(Error::shape("data", "room for whole-number targets", "room for real ones")),
        }
    }

    pub(crate) fn real(self) -> Result<&'a mut [f32]> {
        match self {
            TargetMut::Real(values) => Ok(values),
            TargetMut::Index(_) => Err(Error::shape("data", "room for real targets", "room for whole numbers")),
        }
    }
}

/// Samples that can be read in any order, from any thread.
pub trait Dataset: Send + Sync {
    /// Number of samples in one pass.
    fn len(&self) -> usize;
    /// Whether there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Number of tokens at which a window may start, where samples are windows over one long stream of tokens.
    fn starts(&self) -> Option<usize> {
        None
    }
    /// What an input is.
    fn input(&self) -> InputSpec;
    /// What a target is.
    fn target(&self) -> TargetSpec;
    /// Reads one sample (`=`). `draw` keys the random augmentations, where the data has any; without it the sample is as
    /// an evaluation sees it.
    ///
    /// # Errors
    /// A damaged file, with the place; a pick or a buffer that does not fit.
    fn read(&self, pick: Pick, draw: Option<Draw>, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()>;
    /// Whether every sample lies in memory and has the same values whenever it is read, with `draw` or without, so that a
    /// backend may keep them all ([`Table`]).
    fn is_plain(&self) -> bool {
        false
    }
    /// Checks that every real target is within `range`, such as a loss needs it; `advice` is what to do where one is not.
    ///
    /// # Errors
    /// A target that is not, with its place.
    fn check_targets(&self, _range: RangeInclusive<f32>, _advice: &str) -> Result<()> {
        Ok(())
    }
    /// How many samples each class has, where targets are classes.
    fn class_counts(&self) -> Option<Vec<usize>> {
        None
    }
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
