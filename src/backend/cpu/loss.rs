//! Not there yet.

use super::Cpu;
use crate::backend::ops::{BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Loss for Cpu<R> {
    fn cross_entropy(&self, _: &mut Memory<'_, Self>, _: &CrossEntropy, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn mean_squared_error(&self, _: &mut Memory<'_, Self>, _: &MeanSquaredError, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn binary_cross_entropy(&self, _: &mut Memory<'_, Self>, _: &BinaryCrossEntropy, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
