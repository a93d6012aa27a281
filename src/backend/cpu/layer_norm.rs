//! Not there yet.

use super::Cpu;
use crate::backend::ops::{LayerNorm, LayerNormBackward, LayerNormForward, RmsNormBackward, RmsNormForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> LayerNorm for Cpu<R> {
    fn layer_norm_forward(&self, _: &mut Memory<'_, Self>, _: &LayerNormForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn layer_norm_backward(&self, _: &mut Memory<'_, Self>, _: &LayerNormBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn rms_norm_forward(&self, _: &mut Memory<'_, Self>, _: &RmsNormForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn rms_norm_backward(&self, _: &mut Memory<'_, Self>, _: &RmsNormBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
