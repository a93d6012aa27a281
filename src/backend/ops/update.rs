use std::ops::Range;

use crate::backend::step::{Finished, LossScale, Work};
use crate::backend::{Arena, Backend, Together, Workspace};
use crate::error::Result;
use crate::optim::{StepOutcome, StepParams, UpdatePlan};

/// The fused update of all parameters, and whole steps that end in it.
pub trait Update: Backend {
    /// Work that was queued, and what it found that nobody has taken yet. It lives no longer than the memory it names.
    type Queue: Default + Send;

    /// Queues a part of a step, without waiting for what was queued before as long as there is room.
    ///
    /// # Errors
    /// A batch of another shape, an arena that does not fit the plan, or a device that failed.
    fn submit(&self, queue: &mut Self::Queue, work: Work<'_, Self>) -> Result<()>;

    /// What the oldest work queued found, once it is done: none when none is done yet, and, with `wait`, when none is left.
    ///
    /// # Errors
    /// A device that failed.
    fn finished(&self, queue: &mut Self::Queue, wait: bool) -> Result<Option<Finished>>;

    /// The dynamic loss scale of an arena's programs: none where gradients need none, or where none was set yet, when losses are taken
    /// as they are.
    ///
    /// # Errors
    /// A device that failed.
    fn loss_scale(&self, _: &Arena<Self>) -> Result<Option<LossScale>> {
        Ok(None)
    }

    /// Sets the dynamic loss scale of an arena's programs, where gradients need one: from then on they are multiplied by it where a loss
    /// makes them. [`Update::submit`] divides by it and adapts it; the divisor of [`Update::update`] has to hold it.
    ///
    /// # Errors
    /// A scale that is no finite number above 0, or a device that failed.
    fn set_loss_scale(&self, _: &mut Arena<Self>, _: LossScale) -> Result<()> {
        Ok(())
    }

    /// One update of `arena` as [`crate::optim`] defines it: parameters and slots `=`, gradients left as they are or set to 0.
    ///
    /// # Errors
    /// An arena that does not fit the plan, or a device that failed.
    fn update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome>;

    /// As [`Update::update`], of what this process holds of an arena that is shared out: sums over pieces are those of all
    /// processes, added in the order that one process alone adds them in.
    ///
    /// # Errors
    /// As [`Update::update`]; a process that failed.
    fn update_held(
        &self,
        arena: &mut Arena<Self>,
        plan: &UpdatePlan,
        step: &StepParams,
        together: &mut dyn Together,
    ) -> Result<StepOutcome>;

    /// Whether what goes over processes is queued in the device's memory, with the step; else it passes through the host's.
    const QUEUES_SUMS: bool = false;

    /// The sum of squares of each tensor's gradients at the last update, in arena order, as the norm was summed: after the
    /// division and the value clip, before the norm clip. Empty before the first update. Waits for the device.
    ///
    /// # Errors
    /// A device that failed.
    fn norm_squares(&self, arena: &Arena<Self>) -> Result<Vec<f64>>;

    /// Bytes of the device's memory that updates of `elements` of the arena by this plan take for tables and sums of their own.
    fn table_bytes(_: &UpdatePlan, _: &Range<usize>) -> usize {
        0
    }

    /// What these updates take besides, as [`Backend::workspace`] says of an operation.
    fn update_workspace(_: &UpdatePlan, _: &Range<usize>) -> Workspace {
        Workspace::default()
    }

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

    /// As [`Update::average`], of the parameters that this process updates.
    ///
    /// # Errors
    /// As [`Update::average`].
    fn average_arena(&self, average: &mut Self::Buffer<Self::Real>, arena: &Arena<Self>, decay: f64) -> Result<()>;
}
