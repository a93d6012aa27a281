//! Training: the step, the loop around it, checkpoints, metrics, and what a run leaves behind.

pub mod checkpoint;
pub mod files;
pub mod forensics;
pub mod infer;
pub mod looping;
pub mod memory;
pub mod metrics;
pub mod options;
pub mod parts;
pub mod plot;
pub mod profile;
pub mod progress;
pub mod report;
pub mod resident;
pub mod run;
mod same;
pub mod shadow;
pub(crate) mod sharing;
pub mod signals;
pub mod step;
pub mod streamed;
pub mod summary;
pub mod tensorboard;
pub mod tensors;
pub mod verify;
