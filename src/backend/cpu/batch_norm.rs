//! Not there yet.

use super::Cpu;
use crate::backend::ops::{BatchNorm, BatchNormBackward, BatchNormForward, BatchNormInference};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> BatchNorm for Cpu<R> {
    fn batch_norm_forward(&self, _: &mut Memory<'_, Self>, _: &BatchNormForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn batch_norm_inference(&self, _: &mut Memory<'_, Self>, _: &BatchNormInference, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn batch_norm_backward(&self, _: &mut Memory<'_, Self>, _: &BatchNormBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
