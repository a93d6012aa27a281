//! Not there yet.

use super::Cpu;
use crate::backend::ops::{Add, Concatenate, Elementwise, MeanTimeBackward, MeanTimeForward, Split};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Elementwise for Cpu<R> {
    fn add(&self, _: &mut Memory<'_, Self>, _: &Add, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn concatenate(&self, _: &mut Memory<'_, Self>, _: &Concatenate, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn split(&self, _: &mut Memory<'_, Self>, _: &Split, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn mean_time_forward(&self, _: &mut Memory<'_, Self>, _: &MeanTimeForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn mean_time_backward(&self, _: &mut Memory<'_, Self>, _: &MeanTimeBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
