//! The CUDA backend: kernels of our own and NVIDIA's libraries, on one GPU, without a host synchronization within a step.
//!
//! Everything of a step is queued on one stream. A program is run once as it is (which loads its kernels and measures its
//! products), then recorded as a CUDA graph, and replayed from then on.

mod activation;
mod alias;
mod attention;
pub mod auto;
mod batch_norm;
mod blas;
mod buffer;
mod channel;
mod choice;
mod claim;
mod communication;
mod compiler;
mod context;
mod conv;
mod convolution;
mod cooperative;
pub mod doctor;
mod dropout;
mod elementwise;
mod embedding;
pub mod emulated;
mod gather;
mod kept;
mod launch;
mod layer_norm;
pub mod libraries;
mod linear;
mod loss;
mod loss_scale;
mod mel;
mod module;
mod nvml;
mod pinned;
mod pool;
mod probe;
mod product;
mod profile;
mod recording;
mod scratch;
mod step;
mod team;
pub mod update;
mod ways;
mod workspace;

/// The bindings, so that a program that owns its device memory can name the same release of them.
pub use cudarc;

pub use buffer::Buffer;
pub use communication::Communication;
pub use context::{AttentionProducts, Device, DeviceOptions, Fusion, LESS_MEMORY, SmallProducts};
pub use context::{device_count, is_driver_present};
pub use module::{compile_all, is_embedded};
pub use nvml::Clocks;
pub use recording::Recording;
pub use step::Queue;

use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use self::launch::{Grid, args};
use super::step::Gather;
use super::{
    Act, Activations, Arena, Backend, DeviceSlice, Grad, Held, Indices, Memory, Numeric, Op, Param, Slice, State,
    StepContext, Workspace,
};
use crate::data::Table;
use crate::error::{Error, Result};
use crate::parallel::scaling::Hardware;
use crate::real::Element;

/// A type that activations and parameters are stored in on the device.
pub trait Storage: Element {
    /// Whether parameters are kept in f32 besides.
    const HAS_MASTER: bool;
}

impl Storage for f32 {
    const HAS_MASTER: bool = false;
}
impl Storage for bf16 {
    const HAS_MASTER: bool = true;
}
impl Storage for f16 {
    const HAS_MASTER: bool = true;
}

/// An NVIDIA GPU that stores activations in `S`; parameters, gradients, optimizer slots and all sums are f32.
#[derive(Clone, Debug)]
pub struct Cuda<S> {
    device: Arc<Device>,
    storage: PhantomData<S>,
}

impl<S: Storage> Cuda<S> {
    /// A backend on this device.
    pub fn new(device: Arc<Device>) -> Self {
        Cuda { device, storage: PhantomData }
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Address of an activation.
    fn act(memory: &Memory<'_, Self>, act: Act) -> u64 {
        memory.activations.values.address_of(memory.activations.range(act).start)
    }

    /// Address of an activation, 0 (null) where there is none.
    fn act_or_null(memory: &Memory<'_, Self>, act: Option<Act>) -> u64 {
        act.map_or(0, |act| Self::act(memory, act))
    }

    /// Address of whole numbers.
    fn indices(memory: &Memory<'_, Self>, indices: Indices) -> u64 {
        memory.activations.indices.address_of(memory.activations.index_range(indices).start)
    }

    /// Address of a parameter as operations read it, in `S`.
    fn param(memory: &Memory<'_, Self>, param: Param) -> u64 {
        let start = memory.arena.range(param).start;
        if S::HAS_MASTER { memory.arena.stored.address_of(start) } else { memory.arena.parameters.address_of(start) }
    }

    /// Address of a parameter, 0 (null) where there is none.
    fn param_or_null(memory: &Memory<'_, Self>, param: Option<Param>) -> u64 {
        param.map_or(0, |param| Self::param(memory, param))
    }

    /// Address of a parameter's gradient, f32.
    fn grad(memory: &Memory<'_, Self>, grad: Grad) -> u64 {
        memory.arena.gradients.address_of(memory.arena.gradient_range(grad.param).start)
    }

    /// Address of a kept tensor, f32.
    fn state(memory: &Memory<'_, Self>, state: State) -> u64 {
        memory.arena.state.address_of(memory.arena.state_range(state).start)
    }
}

impl<S: Storage> Backend for Cuda<S> {
    type Real = f32;
    type Storage = S;
    type Recording = Recording;
    type Prepared = update::Kept;
    type Buffer<T: bytemuck::Pod + Send + Sync> = Buffer<T>;
    const INPUT_SLOTS: usize = 2;

    fn description(&self) -> String {
        format!("{}, {}", self.device.name(), self.device.precision_name(S::NAME))
    }

    fn peak_arithmetic(&self) -> Option<f64> {
        Hardware::of_device(self.device.name()).map(|gpu| gpu.arithmetic(&self.device.precision_name(S::NAME)))
    }

    fn keep_choices_in(&self, folder: &Path) {
        self.device.keep_choices_in(folder.to_owned());
    }

    fn allocate<T: bytemuck::Pod + Send + Sync>(&self, len: usize) -> Result<Buffer<T>> {
        let buffer = Buffer::zeros(&self.device, len)?;
        // It is set to 0 by one stream; batches are written to it by another.
        self.device.synchronize()?;
        Ok(buffer)
    }

    fn upload<T: bytemuck::Pod + Send + Sync>(&self, to: &mut Buffer<T>, offset: usize, from: &[T]) -> Result<()> {
        to.write(offset, from)
    }

    fn download<T: bytemuck::Pod + Send + Sync>(&self, from: &Buffer<T>, offset: usize, to: &mut [T]) -> Result<()> {
        from.read(offset, to)
    }

    fn gather(&self, activations: &mut Activations<Self>, gather: &Gather<'_>) -> Result<()> {
        self.gather_now(activations, gather)
    }

    fn table_room(table: &Table) -> usize {
        gather::table_room::<S>(table)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.device.memory().map(|(free, _)| Some(free))
    }

    fn workspace(op: &dyn Op<Self>, device: Option<&Self>) -> Result<Workspace> {
        Self::workspace_of(op, device.map(|backend| &**backend.device()))
    }

    fn reserve(&self, workspace: &Workspace) -> Result<()> {
        self.device.reserve(workspace)
    }

    fn read_statistic(&self, activations: &Activations<Self>, act: Act, to: &mut [f32]) -> Result<()> {
        let range = activations.range(act);
        if size_of_val(to) > range.len() * size_of::<S>() {
            let found = format!("{} of {} bytes", size_of_val(to), range.len() * size_of::<S>());
            return Err(Error::shape("copy", "a part of the statistic", found));
        }
        self.device.read(activations.values.address_of(range.start), bytemuck::cast_slice_mut(to))
    }

    fn parameters_changed(&self, arena: &mut Arena<Self>) -> Result<()> {
        if !S::HAS_MASTER || self.stores_alone(arena) {
            return Ok(());
        }
        let (parameters, stored) = match &arena.held {
            Some(Held { parameters: Some(own), stored: Some(stored), .. }) => (own, stored.address_of(0)),
            Some(Held { parameters: Some(own), elements, .. }) => (own, arena.stored.part(elements)?),
            _ => (&arena.parameters, arena.stored.address_of(0)),
        };
        if parameters.is_empty() {
            return Ok(());
        }
        self.convert(parameters.address_of(0), stored, parameters.len())
    }

    fn stores_alone(&self, arena: &Arena<Self>) -> bool {
        S::HAS_MASTER && arena.held.is_none() && arena.parameters.is_empty() && !arena.stored.is_empty()
    }

    fn run(&self, program: &[Box<dyn Op<Self>>], memory: &mut Memory<'_, Self>, step: &StepContext) -> Result<()> {
        recording::run(self, program, memory, step)
    }

    fn run_each(
        &self,
        program: &[Box<dyn Op<Self>>],
        memory: &mut Memory<'_, Self>,
        step: &StepContext,
        after: &mut (dyn FnMut(&mut Memory<'_, Self>, usize) -> Result<()> + Send),
    ) -> Result<()> {
        let _claim = self.device.claim();
        self.device.write(self.device.step_state(), bytemuck::bytes_of(&[step.micro_step, step.part]))?;
        // Queued as it is, not recorded: where a program is followed, what is done between its operations is the caller's.
        program.iter().enumerate().try_for_each(|(number, op)| {
            recording::one(self, op.as_ref(), memory, step)?;
            after(memory, number)
        })
    }

    fn add_to(&self, to: &mut Buffer<f32>, from: &Buffer<f32>, elements: Range<usize>) -> Result<()> {
        let (to, from, len) = Self::both(to, from, elements)?;
        let grid = Grid::elements(self.device(), len, 4);
        // SAFETY: both hold `len` values; each thread reads its values before it writes them, in the place of the first.
        unsafe { self.device().launch("elementwise", "add_f32", grid, args![to, from, to, len]) }
    }

    fn copy_part(&self, to: &mut Buffer<f32>, offset: usize, from: &Buffer<f32>, elements: Range<usize>) -> Result<()> {
        let (to, from) = (to.part(&(offset..offset + elements.len()))?, from.part(&elements)?);
        self.device().copy(to, from, elements.len() * size_of::<f32>())
    }

    fn clear(&self, values: &mut Buffer<f32>, elements: Range<usize>) -> Result<()> {
        let address = values.part(&elements)?;
        self.device().fill_zero(address, elements.len() * size_of::<f32>())
    }

    fn divide(&self, values: &mut Buffer<f32>, divisor: f32, elements: Range<usize>) -> Result<()> {
        let (address, len) = (values.part(&elements)?, elements.len());
        let grid = Grid::elements(self.device(), len, 1);
        // SAFETY: the buffer holds `len` values there.
        unsafe { self.device().launch("elementwise", "divide", grid, args![address, divisor, len]) }
    }

    fn slice<'a, T: Numeric>(&self, buffer: &'a mut Buffer<T>, elements: Range<usize>) -> Result<Slice<'a>> {
        let address = buffer.part(&elements)?;
        Ok(Slice::Device(DeviceSlice { address, len: elements.len(), number: T::NUMBER }))
    }
}

impl<S: Storage> Cuda<S> {
    /// Where the same elements of two buffers begin, and how many they are.
    fn both(to: &mut Buffer<f32>, from: &Buffer<f32>, elements: Range<usize>) -> Result<(u64, u64, usize)> {
        let len = to.len().min(from.len());
        if elements.start > elements.end || elements.end > len {
            return Err(Error::shape("copy", format!("a part of {len} elements"), format!("{elements:?}")));
        }
        Ok((to.address_of(elements.start), from.address_of(elements.start), elements.len()))
    }
}
