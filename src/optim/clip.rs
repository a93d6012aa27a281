//! Gradient clipping.

use crate::error::{Error, Result};

/// Which norm is held below a bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum NormClip {
    /// None.
    #[default]
    Off,
    /// The norm of all gradients together (Pascanu et al. 2013): `g * min(1, max_norm / (n + 1e-6))`, as PyTorch's
    /// `clip_grad_norm_`.
    Global {
        /// The bound.
        max_norm: f64,
    },
    /// The norm of each tensor by itself, likewise.
    Tensor {
        /// The bound.
        max_norm: f64,
    },
    /// Adaptive clipping (Brock et al. 2021): the norm of each output unit's gradient is held below `clipping` times that of
    /// its weights, `max(norm, epsilon)`.
    Adaptive {
        /// Largest ratio of gradient norm to weight norm.
        clipping: f64,
        /// Weight norms below this count as this.
        epsilon: f64,
    },
}

/// How gradients are clipped: by value, then by a norm.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clip {
    /// Bound of each value, if set.
    pub value: Option<f64>,
    /// The norm clip.
    pub norm: NormClip,
}

impl Clip {
    /// Checks every bound.
    ///
    /// # Errors
    /// A bound that is not a finite number above 0.
    pub fn validate(&self) -> Result<()> {
        let check = |key: &str, bound: f64| {
            if bound > 0.0 && bound.is_finite() {
                return Ok(());
            }
            Err(Error::config(format!("optimizer.clip.{key}"), format!("found {bound}, expected a number above 0")))
        };
        if let Some(bound) = self.value {
            check("value", bound)?;
        }
        match self.norm {
            NormClip::Off => Ok(()),
            NormClip::Global { max_norm } => check("global_norm", max_norm),
            NormClip::Tensor { max_norm } => check("tensor_norm", max_norm),
            NormClip::Adaptive { clipping, epsilon } => {
                check("adaptive", clipping)?;
                check("adaptive_epsilon", epsilon)
            }
        }
    }

    /// The global clip's coefficient for gradients of norm `norm`.
    pub fn coefficient(&self, norm: f64) -> f64 {
        match self.norm {
            NormClip::Global { max_norm } => (max_norm / (norm + 1e-6)).min(1.0),
            NormClip::Off | NormClip::Tensor { .. } | NormClip::Adaptive { .. } => 1.0,
        }
    }
}
