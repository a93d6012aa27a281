//! Not there yet.

use super::Cpu;
use crate::backend::ops::{Conv, Conv2dBackward, Conv2dForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Conv for Cpu<R> {
    fn conv2d_forward(&self, _: &mut Memory<'_, Self>, _: &Conv2dForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn conv2d_backward(&self, _: &mut Memory<'_, Self>, _: &Conv2dBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
