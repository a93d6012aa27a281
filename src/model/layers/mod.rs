//! The layers. Each is a forward and a backward written next to each other.

mod activation;
mod attention;
mod combine;
mod conv;
mod dropout;
mod embedding;
mod linear;
mod log_mel;
mod norm;
mod pool;
mod recompute;
mod shape;
mod transformer;

pub use activation::{Activation, Swiglu};
pub use attention::{Attention, RotaryOptions, SelfAttention, SelfAttentionOptions};
pub use combine::{Residual, Sequential};
pub use conv::Conv2d;
pub use dropout::Dropout;
pub use embedding::{Embedding, Positions, TokenAndPosition};
pub use linear::{Linear, TiedLinear};
pub use log_mel::LogMel;
pub(in crate::model) use norm::TOO_FEW;
pub use norm::{BatchNorm, LayerNorm, RmsNorm};
pub use pool::{AveragePool2d, MaxPool2d, Window};
pub use recompute::Recompute;
pub use shape::{AsPicture, Flatten, MeanOverTime, Parallel};
pub use transformer::{BlockOptions, FeedForward, HiddenActivation, NormKind, TransformerBlock};

use crate::error::{Error, Result};

/// What a layer's forward saved for its backward.
fn planned<T>(saved: Option<T>, layer: &str) -> Result<T> {
    saved.ok_or_else(|| Error::shape(layer, "a forward planned before its backward", "none"))
}
