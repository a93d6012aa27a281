//! Sums over processes that a device queues on its collective's own stream, within the recording of a step.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::collective::Collective;
use super::gradients::{GradientsOptions, Wire};
use super::reducer::Sum;
use crate::backend::Backend;
use crate::error::{Error, Result};

/// Sums of a device, in the order in which they are queued.
pub(super) struct Queued<B: Backend> {
    sum: Sum,
    /// Memory for what is on its way: other processes' values in f32, and values rounded to bf16.
    room: Option<(B::Buffer<f32>, B::Buffer<bf16>)>,
}

impl<B: Backend<Real = f32>> Queued<B> {
    /// Sums as the options say; none where the collective is one of the host.
    pub fn new(options: &GradientsOptions, collective: &Arc<dyn Collective>) -> Option<Self> {
        let sum = Sum { collective: Arc::clone(collective), tree: options.share.reproducible };
        collective.is_queued().then_some(Queued { sum, room: None })
    }

    /// Makes room for sums of so many gradients and kept values, before anything is recorded.
    pub fn make_room(&mut self, backend: &B, gradients: (usize, Wire), kept: usize) -> Result<()> {
        if self.room.is_none() {
            let [wide, narrow] = self.sum.room(gradients.0, gradients.1);
            let [kept, _] = self.sum.room(kept, Wire::F32);
            self.room = Some((backend.allocate(wide.max(kept))?, backend.allocate(narrow)?));
        }
        Ok(())
    }

    /// Queues the sum of some values, behind what the device has queued.
    pub fn sum(&mut self, backend: &B, values: &mut B::Buffer<f32>, elements: Range<usize>, wire: Wire) -> Result<()> {
        let Some((wide, narrow)) = &mut self.room else {
            return Err(Error::Training("gradients are summed in a pass that has not begun".into()));
        };
        let [w, n] = self.sum.room(elements.len(), wire);
        self.sum.collective.fork()?;
        let room = [backend.slice(wide, 0..w)?, backend.slice(narrow, 0..n)?];
        self.sum.over_processes(backend.slice(values, elements)?, &[], wire, room)
    }
}
