//! Not there yet.

use super::Cpu;
use crate::backend::ops::{AveragePoolBackward, AveragePoolForward, MaxPoolBackward, MaxPoolForward, Pool};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Pool for Cpu<R> {
    fn max_pool_forward(&self, _: &mut Memory<'_, Self>, _: &MaxPoolForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn max_pool_backward(&self, _: &mut Memory<'_, Self>, _: &MaxPoolBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn average_pool_forward(&self, _: &mut Memory<'_, Self>, _: &AveragePoolForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn average_pool_backward(&self, _: &mut Memory<'_, Self>, _: &AveragePoolBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
