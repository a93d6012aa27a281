//! What a benchmark found, as it is written to JSON: everything that a reader needs to trust a figure, or to take it again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::machine::date;

/// Version of the format.
pub const FORMAT: u32 = 1;

/// Everything that one call of `warpstep bench` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Version of this format.
    pub format: u32,
    /// Version of Warpstep.
    pub version: String,
    /// The arguments it was called with.
    pub command: String,
    /// When it began: RFC 3339, UTC.
    pub date: String,
    /// What it ran on.
    pub machine: Machine,
    /// What was measured, in the order it was.
    pub figures: Vec<Figure>,
    /// The same work by others, in turn with ours.
    pub peers: Vec<PeerFigure>,
}

impl Results {
    /// Of a call that begins now: nothing is found yet.
    pub fn begin(command: String) -> Self {
        Results {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command,
            date: date(),
            machine: Machine::default(),
            figures: Vec::new(),
            peers: Vec::new(),
        }
    }
}

/// What a benchmark ran on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The device, as runs name it.
    pub device: String,
    /// Facts besides, by name: processor, cores, threads, memory, system, driver, CUDA and library versions.
    pub facts: BTreeMap<String, String>,
    /// What may have changed the figures while they were taken: clocks that fell, throttling, other load.
    pub notes: Vec<String>,
    /// What floors are computed from, by precision.
    #[serde(default)]
    pub limits: Vec<Limits>,
}

/// What this run has measured of the device before its figures in one precision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Of products: `f32`, `tf32`, `bf16`, `f16`.
    pub precision: String,
    /// Bytes a second of a copy within the memory, those read and those written together.
    pub copy: f64,
    /// The same of memory that is read and written where it is.
    pub in_place: f64,
    /// Floating-point operations a second of the fastest product.
    pub product: f64,
    /// Why floors that are computed from these are not to be quoted, where they are not.
    pub doubts: Vec<String>,
}

/// Times of repetitions, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Repetitions that count, after the warm-up.
    pub count: usize,
    /// The fastest.
    pub min: f64,
    /// A quarter are below.
    pub lower_quartile: f64,
    /// Half are below.
    pub median: f64,
    /// Three quarters are below.
    pub upper_quartile: f64,
}

/// The work that a figure times, exactly enough that a peer can be held to the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Its name: `gpt_cpu`, `mlp`, `cnn`, `resnet18`, `update`.
    pub name: String,
    /// Trained parameters.
    pub parameters: u64,
    /// Shape of a batch's inputs, as `[12, 64]`; of the tensors' sum for an update.
    pub inputs: Vec<u64>,
    /// Samples in memory that batches are taken from, in an order of chance; 0 for an update, which takes none.
    #[serde(default)]
    pub samples: u64,
    /// Number type of parameters and arithmetic: `f32`, `tf32`, `bf16`.
    pub precision: String,
    /// Optimizer and clip in words that both sides use: `momentum+global_norm`, `adamw+global_norm`.
    pub update: String,
    /// Threads, on a CPU.
    pub threads: usize,
}

impl Work {
    /// Its name, that of its update where it is nothing else, and its precision where that is known: `gpt2/bf16`,
    /// `update/adamw+global_norm/50M/f32`.
    pub fn title(&self) -> String {
        let name = match self.name.as_str() {
            "update" if !self.update.is_empty() => format!("update/{}/{}M", self.update, self.parameters as f64 / 1e6),
            name => name.to_owned(),
        };
        if self.precision.is_empty() { name } else { format!("{name}/{}", self.precision) }
    }
}

/// One thing that was timed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// `device`, `update`, `kernel`, `step` or `data`.
    pub suite: String,
    /// What, unique within the suite: `copy/64MiB`, `momentum+global_norm/50M/f32`, `mlp`.
    pub name: String,
    /// Seconds a repetition.
    pub seconds: Spread,
    /// How much a repetition does, and of what: `(128.0, "sample")`, `(4.0e8, "byte")`, `(1.0, "launch")`.
    pub amount: (f64, String),
    /// Bytes that a repetition has to move, where that is known.
    pub bytes: Option<f64>,
    /// Floating-point operations of a repetition, where it has any.
    pub flops: Option<f64>,
    /// The least time that physics allows, and why.
    pub floor: Option<Floor>,
    /// Why the figure is not to be quoted, where it is not.
    pub refused: Option<String>,
    /// Shares of a step by part (`forward`, `backward`, `communication`, `update`, `data`), together 1.
    pub parts: BTreeMap<String, f64>,
    /// Bytes of memory that the work takes, where it plans any.
    pub memory_bytes: Option<u64>,
    /// What exactly was timed, for works that peers do too.
    pub work: Option<Work>,
}

/// A limit of physics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Seconds a repetition, at least.
    pub seconds: f64,
    /// Where it comes from: `24 bytes a parameter at the speed of a pass in place taken in turn with it, 21.3 GB/s`.
    pub what: String,
    /// Why it, and the share of it, are not to be quoted, where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
}

/// The same work by somebody else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerFigure {
    /// Who: `PyTorch eager`, `PyTorch compiled`, `JAX`, `candle`.
    pub peer: String,
    /// Its version; empty where it is not there.
    pub version: String,
    /// What it does.
    pub work: Work,
    /// Seconds a repetition of theirs.
    pub theirs: Spread,
    /// Seconds a repetition of ours, taken in turn with theirs.
    pub ours: Spread,
    /// Their time over ours, turn by turn: above 1, Warpstep is faster. Not seconds, but the same kind of spread.
    pub ratio: Spread,
    /// Why there is no figure, or why it is not to be quoted: not installed, other shapes, a spread too wide.
    pub refused: Option<String>,
}
