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
