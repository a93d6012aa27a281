//! Backends: what a device must be able to do for a model to be trained on it.
//!
//! [`Backend`] is memory plus one small trait an operation family ([`ops`]). A model is written once over it: it emits
//! operations, plain argument structs that name memory by handles ([`Act`], [`Param`], ...), and a backend runs them.
//! Operations write into memory they are given: none allocates, none returns a tensor.

pub mod cpu;
pub mod cuda;
mod exchange;
mod memory;
pub mod op;
pub mod ops;
pub mod profile;
mod slice;
pub mod step;
mod workspace;

pub use exchange::{Alone, Exchange, IN_FLIGHT, Pass as PassOfStep, Together};
pub use memory::{Act, Activations, Arena, Grad, Held, Indices, InputSlot, Memory, Param, State, disjoint};
pub use op::{Op, StepContext, Use};
pub use slice::{DeviceSlice, HostSlice, Number, Numeric, Slice};
pub use workspace::Workspace;

use std::ops::Range;
use std::path::Path;

use self::step::Gather;
use crate::data::Table;
use crate::error::Result;
use crate::real::{Element, Real};

/// A device that models are trained on.
pub trait Backend:
    ops::Linear
    + ops::Conv
    + ops::Pool
    + ops::BatchNorm
    + ops::LayerNorm
    + ops::Embedding
    + ops::Attention
    + ops::Activation
    + ops::Dropout
    + ops::Elementwise
    + ops::Loss
    + ops::Mel
    + Sized
    + Send
    + Sync
    + 'static
{
    /// What arithmetic is done in, and what hosts read and write.
    type Real: Real;
    /// What activations are stored in: `Real`, or a type of 16 bits.
    type Storage: Element;
    /// What the device keeps of a program that it ran, to run it again at less cost; lives with the program's activations.
    type Recording: Default + Send + Sync;
    /// What the device keeps of an arena's update; lives with the arena.
    type Prepared: Default + Send + Sync;
    /// Memory of the device.
    type Buffer<T: bytemuck::Pod + Send + Sync>: Send + Sync;

    /// Batches that a program has room for: 2 where one is copied to the device while the other is computed with.
    const INPUT_SLOTS: usize;

    /// What the device is, for people: `CPU, 2 threads`.
    fn description(&self) -> String;

    /// Floating-point operations a second that its products come to at most, by its maker's data sheet; none where that is not known.
    fn peak_arithmetic(&self) -> Option<f64> {
        None
    }

    /// Keeps what the device chooses by measuring, from now on, in a folder of the run too, and takes what is kept there before
    /// anything else.
    fn keep_choices_in(&self, _: &Path) {}

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// Not enough memory: what was asked and what to change.
    fn allocate<T: bytemuck::Pod + Send + Sync>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// Copies host memory into `to`, from element `offset` on (`=`).
    ///
    /// # Errors
    /// A copy that does not fit, or a device that failed.
    fn upload<T: bytemuck::Pod + Send + Sync>(&self, to: &mut Self::Buffer<T>, offset: usize, from: &[T])
    -> Result<()>;

    /// Copies `from`, from element `offset` on, into host memory (`=`), after all work before it is done.
    ///
    /// # Errors
    /// A copy that does not fit, or a device that failed.
    fn download<T: bytemuck::Pod + Send + Sync>(
        &self,
        from: &Self::Buffer<T>,
        offset: usize,
        to: &mut [T],
    ) -> Result<()>;

    /// Writes samples of a table into a program's inputs and targets (`=`), the bits that copies of their values would have.
    ///
    /// # Errors
    /// Samples that do not fit the room, a table that the device has no memory for, or a device that failed.
    fn gather(&self, activations: &mut Activations<Self>, gather: &Gather<'_>) -> Result<()>;

    /// Bytes of its own memory that the device takes for a table it gathers from.
    fn table_room(_: &Table) -> usize {
        0
    }

    /// Bytes free in the device's own memory; none where it computes in the host's.
    ///
    /// # Errors
    /// A device that failed.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// What an operation takes of the device's memory besides what it names. Libraries are asked where a device is there; where none is,
    /// it is the most that they may take.
    ///
    /// # Errors
    /// Sizes that no kernel takes, a library that is missing, or a device that failed.
    fn workspace(_: &dyn Op<Self>, _: Option<&Self>) -> Result<Workspace> {
        Ok(Workspace::default())
    }

    /// Takes that memory now, so that a run that does not fit ends before it begins, and nothing grows as it goes on.
    ///
    /// # Errors
    /// Not enough memory: what was asked, what was free, what to change. A library that is missing.
    fn reserve(&self, _: &Workspace) -> Result<()> {
        Ok(())
    }

    /// Copies an activation that holds statistics ([`crate::model::Planner::statistic`]) into host memory (`=`), after all work
    /// before it is done.
    ///
    /// # Errors
    /// A copy that does not fit, or a device that failed.
    fn read_statistic(&self, activations: &Activations<Self>, act: Act, to: &mut [Self::Real]) -> Result<()>;

    /// Tells the device that the host, or an exchange of buffers, changed the arena's parameters: those that this process updates,
    /// where they are shared out.
    ///
    /// # Errors
    /// A device that failed.
    fn parameters_changed(&self, arena: &mut Arena<Self>) -> Result<()>;

    /// Whether the arena's parameters are kept in the storage type alone, in [`Arena::stored`].
    fn stores_alone(&self, _: &Arena<Self>) -> bool {
        false
    }

    /// Runs the operations in order. A device that can records them once and replays the recording: the list then stays as it is for as
    /// long as programs run in these activations.
    ///
    /// # Errors
    /// What an operation reports.
    fn run(&self, program: &[Box<dyn Op<Self>>], memory: &mut Memory<'_, Self>, step: &StepContext) -> Result<()> {
        program.iter().try_for_each(|op| op.run(self, memory, step))
    }

    /// As [`Backend::run`], one by one, and calls `after` with the number of each.
    ///
    /// # Errors
    /// What an operation or `after` reports.
    fn run_each(
        &self,
        program: &[Box<dyn Op<Self>>],
        memory: &mut Memory<'_, Self>,
        step: &StepContext,
        after: &mut (dyn FnMut(&mut Memory<'_, Self>, usize) -> Result<()> + Send),
    ) -> Result<()> {
        program.iter().enumerate().try_for_each(|(number, op)| {
            op.run(self, memory, step)?;
            after(memory, number)
        })
    }

    /// `to += from`, over `elements` of both.
    ///
    /// # Errors
    /// Buffers that do not have these elements, or a device that failed.
    fn add_to(
        &self,
        to: &mut Self::Buffer<Self::Real>,
        from: &Self::Buffer<Self::Real>,
        elements: Range<usize>,
    ) -> Result<()>;

    /// `to = from`, over `elements` of both.
    ///
    /// # Errors
    /// As [`Backend::add_to`].
    fn copy_to(
        &self,
        to: &mut Self::Buffer<Self::Real>,
        from: &Self::Buffer<Self::Real>,
        elements: Range<usize>,
    ) -> Result<()> {
        self.copy_part(to, elements.start, from, elements)
    }

    /// `to = from`, `elements` of `from` to as many of `to` from `offset` on.
    ///
    /// # Errors
    /// As [`Backend::add_to`].
    fn copy_part(
        &self,
        to: &mut Self::Buffer<Self::Real>,
        offset: usize,
        from: &Self::Buffer<Self::Real>,
        elements: Range<usize>,
    ) -> Result<()>;

    /// `values = 0`, over `elements`.
    ///
    /// # Errors
    /// A buffer that does not have these elements, or a device that failed.
    fn clear(&self, values: &mut Self::Buffer<Self::Real>, elements: Range<usize>) -> Result<()>;

    /// `values = values / divisor`, over `elements`.
    ///
    /// # Errors
    /// A buffer that does not have these elements, or a device that failed.
    fn divide(&self, values: &mut Self::Buffer<Self::Real>, divisor: Self::Real, elements: Range<usize>) -> Result<()>;

    /// Some elements of a buffer, for a collective.
    ///
    /// # Errors
    /// A buffer that does not have these elements.
    fn slice<'a, T: Numeric>(&self, buffer: &'a mut Self::Buffer<T>, elements: Range<usize>) -> Result<Slice<'a>>;
}

/// Whether a backend stores parameters in the type that it computes in, so that one buffer serves both.
pub fn stores_what_it_computes_in<B: Backend>() -> bool {
    std::any::TypeId::of::<B::Real>() == std::any::TypeId::of::<B::Storage>()
}
