//! Not there yet.

use super::Cpu;
use crate::backend::ops::{Embedding, EmbeddingBackward, EmbeddingForward, PositionBackward, PositionForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Embedding for Cpu<R> {
    fn embedding_forward(&self, _: &mut Memory<'_, Self>, _: &EmbeddingForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn embedding_backward(&self, _: &mut Memory<'_, Self>, _: &EmbeddingBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn position_forward(&self, _: &mut Memory<'_, Self>, _: &PositionForward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
    fn position_backward(&self, _: &mut Memory<'_, Self>, _: &PositionBackward, _: &StepContext) -> Result<()> {
        unimplemented!()
    }
}
