//! The update as plain values and pure functions: rule, clip, decay, groups, schedule. Touches no memory.
//!
//! For every element, in this order (all arithmetic in the type of the arena, f32 in training):
//!
//! 1. `g = grad * (1 / divisor)`, divisor = loss scale * accumulation steps * world size;
//! 2. value clip, if set: `g = clamp(g, -epsilon, +epsilon)`;
//! 3. norm clip, if set: `n = sqrt(sum of g^2)`, `g = g * min(1, max_norm / (n + 1e-6))`;
//! 4. weight decay: coupled `g = g + weight_decay * theta`, or decoupled `theta = theta * (1 - lr * weight_decay)`;
//! 5. the [`Rule`].
//!
//! The divisor's reciprocal is taken in f64 and rounded once, as every other constant of a step is; a divisor that is a
//! power of 2 divides exactly. Squares are summed in f64, so n is finite where every gradient is.
//!
//! If a gradient is not finite (before the value clip, which would hide it), n is not, and the step is skipped: parameters
//! and slots stay as they were, to the bit, and the count of applied steps, which tells the first step and corrects Adam's
//! bias, does not move. So the step after a skipped first one is still the first.

mod clip;
mod group;
mod rounding;
mod rule;
mod schedule;

pub use clip::{Clip, NormClip};
pub use group::{Group, GroupPattern, OptimizerOptions, TensorPlan, UpdatePlan};
pub use rounding::round_stochastically;
pub use rule::{MomentumForm, MuonScale, Rule, RuleStep};
pub use schedule::{Decay, Schedule};

use crate::error::{Error, Result};

/// What the update of one step is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepParams {
    /// The schedule's learning rate.
    pub learning_rate: f64,
    /// Number of updates applied, this one counted: 1 the first time. A skipped update does not count.
    pub step: u64,
    /// Loss scale times accumulation steps times world size: what the summed gradients are divided by.
    pub divisor: f64,
    /// Whether gradients are set to 0 in the same pass. A program that overwrites them (`=`) needs it not.
    pub zero_gradients: bool,
}

impl StepParams {
    /// Checks every value.
    ///
    /// # Errors
    /// A learning rate or divisor that is not a finite number, a divisor not above 0, or step 0.
    pub fn check(&self) -> Result<()> {
        let StepParams { learning_rate, divisor, step, .. } = *self;
        if learning_rate.is_finite() && divisor.is_finite() && divisor > 0.0 && step > 0 {
            return Ok(());
        }
        let found = format!("{learning_rate}, {divisor} and step {step}");
        Err(Error::shape("update", "a finite learning rate, a divisor above 0, steps counted from 1", found))
    }
}

/// What the update of one step found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Norm of all gradients, after the division and the value clip, before the norm clip.
    pub grad_norm: f64,
    /// The least factor that a norm clip multiplied gradients by; 1 when it did nothing.
    pub clip_coefficient: f64,
    /// Values that the value clip changed; 0 without one.
    pub clamped: u64,
    /// Whether the norm was not finite, so that nothing was changed.
    pub skipped: bool,
}
