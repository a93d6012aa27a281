//! Not there yet.

use super::Cpu;
use crate::backend::ops::{Dropout, DropoutApply};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Dropout for Cpu<R> {
    fn dropout(&self, _: &mut Memory<'_, Self>, _: &DropoutApply, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
