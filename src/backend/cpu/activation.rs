//! Not there yet.

use super::Cpu;
use crate::backend::ops::{Activation, ActivationBackward, ActivationForward, SwigluBackward, SwigluForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Activation for Cpu<R> {
    fn activation_forward(&self, _: &mut Memory<'_, Self>, _: &ActivationForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn activation_backward(&self, _: &mut Memory<'_, Self>, _: &ActivationBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn swiglu_forward(&self, _: &mut Memory<'_, Self>, _: &SwigluForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn swiglu_backward(&self, _: &mut Memory<'_, Self>, _: &SwigluBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
