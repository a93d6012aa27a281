//! What happens between the backward and the update of a step that several processes, or several parts of a batch, make together.
//!
//! A backend knows no ranks. It tells an [`Exchange`] how far a pass is; what is done then to gradients, kept tensors and
//! parameters is the exchange's affair.

use super::{Arena, Backend, Slice};
use crate::error::Result;

/// What is done to the gradients of a step's passes until they are those of the whole batch.
pub trait Exchange<B: Backend>: Send {
    /// Whether it only queues work on the device, so that it can stand within the recording of a step. Else the backward is waited
    /// for before [`Exchange::end`], and that before the update.
    fn is_queued(&self) -> bool;

    /// The number of this process, and how many there are.
    fn place(&self) -> (usize, usize);

    /// A pass is about to run.
    ///
    /// # Errors
    /// A device or a process that failed.
    fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: Pass) -> Result<()>;

    /// Operation number `op` of the last pass of a step has run, or is queued: gradients that it wrote last are complete in this
    /// pass.
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

    /// Fills in the shares of the other processes: `values` holds one of every process, all as long, in the order of ranks, this
    /// one's filled in. Values of a device are queued for, and there for what is queued after [`Exchange::join`].
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
