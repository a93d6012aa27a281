//! The dynamic loss scale of f16 (kernels/loss_scale.cu): it stands with an arena's update, so that each training has its own.

use bytemuck::{Pod, Zeroable};

use super::launch::{Grid, args};
use super::update::Outcome;
use super::{Buffer, Cuda, Storage};
use crate::backend::Arena;
use crate::backend::step::LossScale;
use crate::error::{Error, Result};

const FILE: &str = "loss_scale";

/// `struct LossScale` of kernels/common.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct KeptScale {
    scale: f32,
    good_steps: u32,
}

const _: () = assert!(size_of::<KeptScale>() == 8);

impl<S: Storage> Cuda<S> {
    /// Address of what the losses of an arena's programs are scaled by; 0 (null) where they are not.
    pub(super) fn loss_scale_or_null(arena: &Arena<Self>) -> u64 {
        arena.prepared.loss_scale.as_ref().map_or(0, |scale| scale.address_of(0))
    }

    pub(super) fn read_loss_scale(arena: &Arena<Self>) -> Result<Option<LossScale>> {
        let Some(buffer) = &arena.prepared.loss_scale else { return Ok(None) };
        let mut kept = [KeptScale::default()];
        buffer.read(0, &mut kept)?;
        let [KeptScale { scale, good_steps }] = kept;
        Ok(Some(LossScale { scale, good_steps }))
    }

    pub(super) fn write_loss_scale(&self, arena: &mut Arena<Self>, to: LossScale) -> Result<()> {
        // Small gradients vanish in f16 alone.
        if S::NAME != "f16" {
            return Ok(());
        }
        if !(to.scale.is_finite() && to.scale > 0.0) {
            return Err(Error::Device(format!("a loss scale of {}: expected a finite number above 0", to.scale)));
        }
        let buffer = match &mut arena.prepared.loss_scale {
            Some(buffer) => buffer,
            none => none.insert(Buffer::zeros(self.device(), 1)?),
        };
        buffer.write(0, &[KeptScale { scale: to.scale, good_steps: to.good_steps }])
    }

    /// Queues what an update begins with: the divisor of the step's state is multiplied by the loss scale, where there is one.
    pub(super) fn scale_divisor(&self, arena: &Arena<Self>) -> Result<()> {
        let scale = Self::loss_scale_or_null(arena);
        if scale == 0 {
            return Ok(());
        }
        let list = args![self.device().step_state(), scale];
        // SAFETY: the state of the step, and the loss scale.
        unsafe { self.device().launch(FILE, "scale_divisor", Grid::new(1, 1), list) }
    }

    /// Queues what it ends with: the scale of the next step. `outcome` is the address of what the update found.
    pub(super) fn adapt_loss_scale(&self, arena: &Arena<Self>, outcome: u64) -> Result<()> {
        let scale = Self::loss_scale_or_null(arena);
        if scale == 0 {
            return Ok(());
        }
        let skipped = outcome + std::mem::offset_of!(Outcome, skipped) as u64;
        // SAFETY: the loss scale, and a flag of the outcome.
        unsafe { self.device().launch(FILE, "adapt_loss_scale", Grid::new(1, 1), args![scale, skipped]) }
    }
}
