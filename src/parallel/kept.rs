//! Tensors that are kept but not trained, such as running means, over the parts of a batch.
//!
//! Each part moves them from the same place; what a step leaves is the mean of what its parts made of them, summed in the order of
//! the gradients.

use super::gradients::{Wire, fold, levels};
use super::reducer::{Place, Reducer};
use crate::backend::{Arena, Backend, PassOfStep};
use crate::error::Result;

/// Kept tensors as they were when the step began, and their sums of left halves.
pub(super) struct KeptTensors<B: Backend> {
    before: Option<B::Buffer<f32>>,
    left: Vec<B::Buffer<f32>>,
}

impl<B: Backend> Default for KeptTensors<B> {
    fn default() -> Self {
        KeptTensors { before: None, left: Vec::new() }
    }
}

impl<B: Backend<Real = f32>> KeptTensors<B> {
    /// Before a pass: each part begins where the step began.
    pub fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        let len = arena.state_layout.padded_len();
        if !pass.first || len == 0 {
            return Ok(());
        }
        let before = match &mut self.before {
            Some(before) => before,
            none => none.insert(backend.allocate(len)?),
        };
        match pass.part {
            0 => backend.copy_to(before, &arena.state, 0..len),
            _ => backend.copy_to(&mut arena.state, before, 0..len),
        }
    }

    /// Keeps the sum of a part and what stands on its left.
    pub fn fold(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        match arena.state_layout.padded_len() {
            0 => Ok(()),
            len => fold(backend, &mut self.left, &mut arena.state, 0..len, pass.part),
        }
    }

    /// Adds what stands on the left of the last of `parts`.
    pub fn add_left(&mut self, backend: &B, arena: &mut Arena<B>, parts: usize) -> Result<()> {
        match arena.state_layout.padded_len() {
            0 => Ok(()),
            len => {
                self.left[..levels(parts)].iter().try_for_each(|left| backend.add_to(&mut arena.state, left, 0..len))
            }
        }
    }

    /// Sums over processes, while nothing else is on its way, in f32 whatever gradients are sent as: they are kept, and small steps of
    /// theirs would be rounded away for good.
    pub fn sum(&self, backend: &B, arena: &mut Arena<B>, reducer: &mut Reducer<B>) -> Result<()> {
        let len = arena.state_layout.padded_len();
        if len == 0 {
            return Ok(());
        }
        if let Reducer::Queued(queue) = reducer {
            let place = Place { elements: 0..len, shards: Vec::new() };
            return queue.sum(backend, &mut arena.state, place, Wire::F32);
        }
        let mut values = vec![0f32; len];
        backend.download(&arena.state, 0, &mut values)?;
        reducer.sum(&mut values)?;
        backend.upload(&mut arena.state, 0, &values)
    }

    /// Makes the mean of so many parts of their sum.
    pub fn divide(&self, backend: &B, arena: &mut Arena<B>, parts: usize) -> Result<()> {
        match arena.state_layout.padded_len() {
            0 => Ok(()),
            len => backend.divide(&mut arena.state, parts as f32, 0..len),
        }
    }
}
