//! Warpstep trains models: a run file goes in; a trained model, its curves and its checkpoints come out.

pub mod backend;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod model;
pub mod optim;
pub mod plan;
pub mod random;
pub mod real;
pub mod train;

pub use error::{Error, Result};
