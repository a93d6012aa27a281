use crate::backend::{Arena, Backend};
use crate::error::Result;
use crate::optim::{StepOutcome, StepParams, UpdatePlan};

/// The fused update of all parameters.
pub trait Update: Backend {
    /// One update of `arena` as [`crate::optim`] defines it: parameters and slots `=`, gradients left as they are or set to 0.
    ///
    /// # Errors
    /// An arena that does not fit the plan, or a device that failed.
    fn update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome>;

    /// The sum of squares of each tensor's gradients at the last update, in arena order, as the norm was summed: after the
    /// division and the value clip, before the norm clip. Empty before the first update. Waits for the device.
    ///
    /// # Errors
    /// A device that failed.
    fn norm_squares(&self, arena: &Arena<Self>) -> Result<Vec<f64>>;

    /// Bits of fraction that the factors of products keep, where a rule multiplies matrices: 23 for f32, 10 for tf32.
    fn product_bits(&self) -> u32 {
        23
    }

    /// `average = decay * average + (1 - decay) * parameters`.
    ///
    /// # Errors
    /// Buffers of other lengths.
    fn average(
        &self,
        average: &mut Self::Buffer<Self::Real>,
        parameters: &Self::Buffer<Self::Real>,
        decay: f64,
    ) -> Result<()>;
}
