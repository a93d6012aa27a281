//! Programs recorded as CUDA graphs.

use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, DriverError, sys};

use super::context::{Device, driver_error};
use super::profile::ranged;
use super::scratch::Block;
use super::{Buffer, Cuda, Storage};
use crate::backend::{Activations, Arena, Memory, Op, StepContext};
use crate::error::{Error, Result};

/// What a recording depends on of an arena: another of these, and it must be made anew. Buffers are told apart by their identities,
/// since addresses are given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ArenaKey([u64; 10]);

impl ArenaKey {
    pub fn new<S: Storage>(arena: &Arena<Cuda<S>>) -> Self {
        let held = arena.held.as_ref();
        ArenaKey([
            arena.parameters.identity(),
            arena.stored.identity(),
            arena.gradients.identity(),
            arena.state.identity(),
            identity(arena.slots.first()),
            identity(arena.slots.get(1)),
            identity(held.and_then(|held| held.parameters.as_ref())),
            identity(held.and_then(|held| held.stored.as_ref())),
            identity(held.and_then(|held| held.gradients.as_ref())),
            identity(arena.prepared.loss_scale.as_ref()),
        ])
    }
}

/// The identity of a buffer; 0 where there is none.
fn identity<T: bytemuck::Pod>(buffer: Option<&Buffer<T>>) -> u64 {
    buffer.map_or(0, Buffer::identity)
}

/// The same of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// The program, by where its list of operations lies.
    program: usize,
    operations: usize,
    activations: [u64; 2],
    accumulate: bool,
    seed: u64,
}

impl Key {
    pub fn new<S: Storage>(
        program: &[Box<dyn Op<Cuda<S>>>],
        activations: &Activations<Cuda<S>>,
        step: &StepContext,
    ) -> Self {
        Key {
            program: program.as_ptr() as usize,
            operations: program.len(),
            activations: [activations.values.identity(), activations.indices.identity()],
            accumulate: step.accumulate,
            seed: step.seed,
        }
    }
}

/// A recording as the device replays it.
pub(super) struct Graph {
    graph: CudaGraph,
    /// Memory that it names; it goes before that.
    _scratch: Option<Arc<Block>>,
}

// SAFETY: a graph may be used from any thread, by one at a time; it is launched by whoever has claimed the device.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Queues it.
    pub fn launch(&self, device: &Device) -> std::result::Result<(), DriverError> {
        let _claim = device.claim();
        self.graph.launch()
    }
}

/// An arena, a program and a slot of its inputs that were run once, and their graph from the second time on.
struct Recorded {
    key: (ArenaKey, Key, Option<usize>),
    graph: Option<Graph>,
}

/// The graphs of one program.
#[derive(Default)]
pub struct Recording {
    entries: Vec<Recorded>,
}

/// Queues each operation of a program.
pub(super) fn each<S: Storage>(
    backend: &Cuda<S>,
    program: &[Box<dyn Op<Cuda<S>>>],
    memory: &mut Memory<'_, Cuda<S>>,
    step: &StepContext,
) -> Result<()> {
    program.iter().try_for_each(|op| one(backend, op.as_ref(), memory, step))
}

/// Queues an operation.
pub(super) fn one<S: Storage>(
    backend: &Cuda<S>,
    op: &dyn Op<Cuda<S>>,
    memory: &mut Memory<'_, Cuda<S>>,
    step: &StepContext,
) -> Result<()> {
    ranged(op.name(), || op.run(backend, memory, step))
}

/// Runs a program: the first time as it is, the second time while it is recorded, from then on by replay.
pub(super) fn run<S: Storage>(
    backend: &Cuda<S>,
    program: &[Box<dyn Op<Cuda<S>>>],
    memory: &mut Memory<'_, Cuda<S>>,
    step: &StepContext,
) -> Result<()> {
    let device = backend.device();
    let _claim = device.claim();
    device.write(device.step_state(), bytemuck::bytes_of(&[step.micro_step, step.part]))?;
    if !device.replays() {
        return each(backend, program, memory, step);
    }
    let (arena, activations) = (&*memory.arena, &*memory.activations);
    let key = (ArenaKey::new(arena), Key::new(program, activations, step), activations.selected());
    let Some(at) = memory.activations.recording.entries.iter().position(|entry| entry.key == key) else {
        each(backend, program, memory, step)?;
        memory.activations.recording.entries.push(Recorded { key, graph: None });
        return Ok(());
    };
    if memory.activations.recording.entries[at].graph.is_none() {
        let graph = record(device, || each(backend, program, memory, step))?;
        memory.activations.recording.entries[at].graph = Some(graph);
    }
    let Some(graph) = &memory.activations.recording.entries[at].graph else { return Ok(()) };
    graph.launch(device).map_err(|error| driver_error("replay the step", error))
}

/// A capture of a stream. It is ended whatever way it is left, also where what is captured fails or panics: the stream would take no
/// other work.
struct Capture<'s> {
    stream: &'s Arc<CudaStream>,
    is_open: bool,
}

impl<'s> Capture<'s> {
    fn begin(stream: &'s Arc<CudaStream>) -> std::result::Result<Self, DriverError> {
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        Ok(Capture { stream, is_open: true })
    }

    /// What was captured; none where nothing was.
    fn end(mut self) -> std::result::Result<Option<CudaGraph>, DriverError> {
        self.is_open = false;
        self.stream.end_capture(sys::CUgraphInstantiate_flags(0))
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.is_open {
            // What was captured is thrown away, and an error of its own comes second to what it was left by.
            let _ = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        }
    }
}

/// Records what `work` queues.
pub(super) fn record(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
    let _claim = device.claim();
    let capture = Capture::begin(device.stream()).map_err(|error| driver_error("record the step", error))?;
    work()?;
    let graph = capture
        .end()
        .map_err(|error| driver_error("record the step", error))?
        .ok_or_else(|| Error::DeviceFailed("CUDA: the recording of the step is empty".into()))?;
    Ok(Graph { graph, _scratch: device.scratch_block() })
}
