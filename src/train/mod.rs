//! Training: the step, the loop around it, checkpoints, metrics, and what a run leaves behind.

pub mod checkpoint;
pub mod files;
pub mod infer;
pub mod looping;
pub mod metrics;
pub mod options;
pub mod progress;
pub mod step;
pub mod summary;
pub mod tensors;
pub mod verify;
