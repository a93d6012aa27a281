//! What happens between the backward and the update of a step that several processes, or several parts of a batch, make together.
//!
//! A backend knows no ranks. It tells an [`Exchange`] how far a pass is; what is done then to gradients, kept tensors and
//! parameters is the exchange's affair.

use super::{Arena, Backend, Slice};
use crate::error::Result;
use crate::plan::Window;

/// Buckets that may be on their way at once where their memory is used again, and gathers of parameters.
pub const IN_FLIGHT: usize = 2;

/// What is done to the gradients of a step's passes until they are those of the whole batch.
pub trait Exchange<B: Backend>: Together + Send {
    /// Whether it only queues work on the device, so that it can stand within the recording of a step. Else the backward is waited
    /// for before [`Exchange::end`], and that before the update.
    fn is_queued(&self) -> bool;

    /// A pass is about to run.
    ///
    /// # Errors
    /// A device or a process that failed.
    fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: Pass) -> Result<()>;

    /// Whether it wants to know how far this pass is ([`Exchange::after_op`]).
    fn follows(&self, pass: Pass) -> bool {
        pass.ends_step
    }

    /// Whether each pass may overwrite the gradients of the one before, micro-batches of one part among them.
    fn overwrites(&self) -> bool {
        false
    }

    /// Brings what operation `op` of a program needs into the arena's window of parameters, where that is one, and begins with what a
    /// later one needs. Evaluations and training alike; every process calls it for all operations in their order.
    ///
    /// # Errors
    /// A device or a process that failed.
    fn bring(&mut self, _: &B, _: &mut Arena<B>, _: &Window, _: usize) -> Result<()> {
        Ok(())
    }

    /// Operation number `op` of a pass that it [follows](Exchange::follows) has run, or is queued: gradients that it wrote last are
    /// complete in this pass.
    ///
    /// # Errors
    /// A device or a process that failed.
    fn after_op(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()>;

    /// A pass has run, or is queued. After the last of a step the gradients are sums over all parts of the batch, or, where the
    /// update is sharded, this process's range of them is.
    ///
    /// # Errors
    /// A device or a process that failed.
    fn end(&mut self, backend: &B, arena: &mut Arena<B>, pass: Pass) -> Result<()>;

    /// This process's elements of the parameters were changed: gives them to all, and gets theirs, where every process keeps all
    /// parameters.
    ///
    /// # Errors
    /// A device or a process that failed.
    fn spread(&mut self, _: &B, _: &mut Arena<B>) -> Result<()> {
        Ok(())
    }
}

/// Which pass of its step this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Its number within the step, of this process's passes.
    pub number: usize,
    /// Passes of a step.
    pub passes: usize,
    /// The part of the batch, among those of this process.
    pub part: usize,
    /// Whether it is the first micro-batch of its part.
    pub first: bool,
    /// Whether it is the last micro-batch of its part.
    pub last: bool,
    /// Whether it is the last pass of its step.
    pub ends_step: bool,
}

/// What processes tell each other that update an arena together, each its elements.
pub trait Together {
    /// The number of this process, and how many there are.
    fn place(&self) -> (usize, usize);

    /// A number for each piece of the update ([`crate::optim::UpdatePlan::pieces`]), in arena order, out of those for the pieces of
    /// this process.
    ///
    /// # Errors
    /// A process that failed.
    fn pieces(&mut self, of_this: &[f64]) -> Result<Vec<f64>>;

    /// A number of each process.
    ///
    /// # Errors
    /// A process that failed.
    fn processes(&mut self, of_this: f64) -> Result<Vec<f64>>;

    /// As [`Together::pieces`], in place: `values` holds as many bytes for every piece, those of this process's filled in. Values of
    /// a device are queued for, and there for what is queued after [`Together::join`].
    ///
    /// # Errors
    /// A process that failed.
    fn gather_pieces(&mut self, values: Slice<'_>) -> Result<()>;

    /// Fills in the shares of the other processes: `values` holds one of every process, all as long, in the order of ranks, this
    /// one's filled in. Values of a device are queued for, as by [`Together::gather_pieces`].
    ///
    /// # Errors
    /// A process that failed.
    fn gather(&mut self, values: Slice<'_>) -> Result<()>;

    /// What the device queues from now on begins after what was gathered is there.
    ///
    /// # Errors
    /// A device that failed.
    fn join(&mut self) -> Result<()>;
}

/// One process: the update of a whole arena, and passes that exchange nothing.
pub struct Alone;

impl<B: Backend> Exchange<B> for Alone {
    fn is_queued(&self) -> bool {
        true
    }

    fn begin(&mut self, _: &B, _: &mut Arena<B>, _: Pass) -> Result<()> {
        Ok(())
    }

    fn after_op(&mut self, _: &B, _: &mut Arena<B>, _: usize) -> Result<()> {
        Ok(())
    }

    fn end(&mut self, _: &B, _: &mut Arena<B>, _: Pass) -> Result<()> {
        Ok(())
    }
}

impl Together for Alone {
    fn place(&self) -> (usize, usize) {
        (0, 1)
    }

    fn pieces(&mut self, of_this: &[f64]) -> Result<Vec<f64>> {
        Ok(of_this.to_vec())
    }

    fn processes(&mut self, of_this: f64) -> Result<Vec<f64>> {
        Ok(vec![of_this])
    }

    fn gather_pieces(&mut self, _: Slice<'_>) -> Result<()> {
        Ok(())
    }

    fn gather(&mut self, _: Slice<'_>) -> Result<()> {
        Ok(())
    }

    fn join(&mut self) -> Result<()> {
        Ok(())
    }
}
