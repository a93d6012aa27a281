//! The layers. Each is a forward and a backward written next to each other.

mod combine;
mod linear;

pub use combine::{Residual, Sequential};
pub use linear::Linear;

use crate::error::{Error, Result};

/// What a layer's forward saved for its backward.
fn planned<T>(saved: Option<T>, layer: &str) -> Result<T> {
    saved.ok_or_else(|| Error::shape(layer, "a forward planned before its backward", "none"))
}
