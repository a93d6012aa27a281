//! Training: the step, the loop around it, checkpoints, metrics, and what a run leaves behind.

pub mod options;
