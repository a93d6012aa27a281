//! Not there yet.

use super::Cpu;
use crate::backend::ops::{Attention, AttentionBackward, AttentionForward, Rotary};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Attention for Cpu<R> {
    fn attention_forward(&self, _: &mut Memory<'_, Self>, _: &AttentionForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn attention_backward(&self, _: &mut Memory<'_, Self>, _: &AttentionBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn rotary(&self, _: &mut Memory<'_, Self>, _: &Rotary, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
