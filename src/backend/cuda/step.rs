//! Whole steps on the device: one graph launch each, nothing waited for but room for the next batch.
//!
//! A batch is written to page-locked memory and copied by a stream of its own into one of two fixed places on the device, while
//! the step before is computed with the other. The step itself (scalars in, forward, loss, backward, norm, update, average,
//! figures out) is recorded once for each place and replayed in turn. What it found is copied into page-locked memory behind
//! it, and read by the host when its event has passed.

use std::collections::VecDeque;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaEvent, CudaGraph, result};

use super::context::{Device, driver_error};
use super::launch::{Grid, args};
use super::pinned::Pinned;
use super::update::{EarlyNorm, Outcome};
use super::{Cuda, Storage, recording};
use crate::backend::ops::METRICS;
use crate::backend::step::{Fill, Finished, LossScale, Pass, UpdateWork, Work, check_len};
use crate::backend::{Arena, Memory};
use crate::error::{Error, Result};
use crate::optim::StepOutcome;

const FILE: &str = "loss_scale";

/// `struct StepState` of kernels/common.cuh: what changes from one step to the next, on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct StepState {
    pub scalars: Scalars,
    pub loss_scale: f32,
    pub good_steps: u32,
}

/// The part of it that the host writes before each replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Scalars {
    pub micro_step: u64,
    /// The update kernels' `UpdateParams` begin here.
    pub learning_rate: f64,
    pub divisor: f64,
}

/// Where the update's scalars stand within the step's.
const UPDATE_PARAMS: u64 = std::mem::offset_of!(Scalars, learning_rate) as u64;

/// What a step leaves for the host.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Report {
    metrics: [f32; METRICS],
    outcome: Outcome,
}

const _: () = {
    assert!(size_of::<Scalars>() == 24 && size_of::<StepState>() == 32);
    assert!(size_of::<Report>() == 4 * METRICS + size_of::<Outcome>());
};

/// A batch's place, and what the host shares with the device about it.
#[derive(Debug)]
struct Slot {
    /// Inputs and targets in the device's types, one after the other.
    batch: Pinned,
    scalars: Pinned,
    report: Pinned,
    /// Passes when the batch is on the device.
    copied: CudaEvent,
    /// Passes when the work is done.
    done: CudaEvent,
    /// Whether the work leaves metrics, and an outcome.
    leaves: [bool; 2],
}

impl Slot {
    /// A slot for steps of an arena of so many tensors.
    fn new(device: &Arc<Device>, tensors: usize) -> Result<Self> {
        let event = || device.context().new_event(None).map_err(|error| driver_error("make an event", error));
        Ok(Slot {
            batch: Pinned::new(device, 1)?,
            scalars: Pinned::new(device, size_of::<Scalars>())?,
            report: Pinned::new(device, size_of::<Report>() + tensors * size_of::<f64>())?,
            copied: event()?,
            done: event()?,
            leaves: [false; 2],
        })
    }

    /// Copies the batch into the inputs that are selected. No work is left that reads them.
    fn copy<S: Storage>(&mut self, device: &Arc<Device>, pass: &Pass<'_, Cuda<S>>) -> Result<()> {
        let activations = &*pass.activations;
        let mut places = Vec::with_capacity(pass.fills.len());
        let mut bytes = 0;
        for fill in &pass.fills {
            let (address, expected, len, each) = match fill {
                Fill::Real(act, values) => {
                    let range = activations.range(*act);
                    (activations.values.address_of(range.start), range.len(), values.len(), size_of::<S>())
                }
                Fill::Indices(indices, values) => {
                    let range = activations.index_range(*indices);
                    (activations.indices.address_of(range.start), range.len(), values.len(), size_of::<i32>())
                }
            };
            check_len("batch", expected, len)?;
            let start = bytes;
            bytes = (start + len * each).next_multiple_of(16);
            places.push((address, start..start + len * each));
        }
        if self.batch.len() < bytes {
            self.batch = Pinned::new(device, bytes)?;
        }
        for (fill, (_, range)) in pass.fills.iter().zip(&places) {
            let to = &mut self.batch.bytes_mut()[range.clone()];
            match fill {
                Fill::Real(_, values) => {
                    let to: &mut [S] = bytemuck::cast_slice_mut(to);
                    to.iter_mut().zip(values.iter()).for_each(|(to, &value)| *to = S::from_f32(value));
                }
                Fill::Indices(_, values) => to.copy_from_slice(bytemuck::cast_slice(values)),
            }
        }
        let stream = device.copy_stream();
        for (address, range) in places {
            if !range.is_empty() {
                // SAFETY: the activation holds as many bytes; the page-locked memory stays as it is until `done` has passed.
                unsafe { result::memcpy_htod_async(address, &self.batch.bytes()[range], stream.cu_stream()) }
                    .map_err(|error| driver_error("copy a batch to the device", error))?;
            }
        }
        self.copied.record(stream).map_err(|error| driver_error("copy a batch to the device", error))?;
        device.stream().wait(&self.copied).map_err(|error| driver_error("wait for a batch", error))
    }
}

/// What a recording depends on: another of these, and it must be made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    program: Option<recording::Key>,
    /// Plan, tables, average and decay.
    update: Option<[u64; 4]>,
}

/// A kind of work that was done once as it is, and its graphs from then on, one for each slot.
struct Recorded {
    key: Key,
    graphs: [Option<CudaGraph>; SLOTS],
}

const SLOTS: usize = 2;

/// Steps in flight. It names memory of the arena and the activations that it was given, and goes before them.
#[derive(Default)]
pub struct Queue {
    recorded: Vec<Recorded>,
    slots: Vec<Slot>,
    next: usize,
    /// Slots whose work was queued and not taken yet, oldest first.
    pending: VecDeque<usize>,
    finished: VecDeque<Finished>,
    /// Updates that the device counts as applied, where that is known.
    applied: Option<u64>,
}

// SAFETY: graphs may be used from any thread, by one at a time; they are reached through `&mut Queue` alone.
unsafe impl Send for Queue {}

impl Queue {
    /// Takes over what the oldest work found; not done yet, it is waited for or left.
    fn take(&mut self, wait: bool) -> Result<bool> {
        let Some(&at) = self.pending.front() else { return Ok(false) };
        let slot = &self.slots[at];
        let done = slot.done.try_is_complete().map_err(|error| driver_error("finish a step", error))?;
        if !done {
            if !wait {
                return Ok(false);
            }
            slot.done.synchronize().map_err(|error| driver_error("finish a step", error))?;
        }
        self.pending.pop_front();
        let (report, squares) = slot.report.bytes().split_at(size_of::<Report>());
        let report: Report = bytemuck::pod_read_unaligned(report);
        let [metrics, outcome] = slot.leaves;
        if outcome {
            self.applied = Some(report.outcome.applied);
        }
        self.finished.push_back(Finished {
            metrics: metrics.then(|| report.metrics.map(f64::from)),
            outcome: outcome.then(|| StepOutcome::from(report.outcome)),
            norm_squares: if outcome { bytemuck::pod_collect_to_vec(squares) } else { Vec::new() },
        });
        Ok(true)
    }
}

/// What [`crate::backend::ops::Update::finished`] is on a device.
pub(super) fn finished(queue: &mut Queue, wait: bool) -> Result<Option<Finished>> {
    // Everything that is done is taken over, so that slots are free when the next work comes.
    while queue.take(wait && queue.finished.is_empty())? {}
    Ok(queue.finished.pop_front())
}

/// What [`crate::backend::ops::Update::submit`] is on a device.
pub(super) fn submit<S: Storage>(backend: &Cuda<S>, queue: &mut Queue, work: Work<'_, Cuda<S>>) -> Result<()> {
    let device = backend.device();
    while queue.slots.len() < SLOTS {
        queue.slots.push(Slot::new(device, work.arena.layout.entries().len())?);
    }
    let at = queue.next;
    while queue.pending.contains(&at) {
        queue.take(true)?;
    }
    let Work { arena, mut pass, mut update } = work;
    if let Some(pass) = &mut pass {
        pass.activations.select(at);
        queue.slots[at].copy(device, pass)?;
    }
    let mut scalars =
        Scalars { micro_step: pass.as_ref().map_or(0, |pass| pass.context.micro_step), ..Scalars::default() };
    if let Some(UpdateWork { plan, params, .. }) = &update {
        params.check()?;
        (scalars.learning_rate, scalars.divisor) = (params.learning_rate, params.divisor);
        let (prepared, _) = backend.arrays(arena, plan)?;
        // With steps in flight the device alone knows how many were applied.
        let known = queue.pending.is_empty() && queue.finished.is_empty();
        prepared.expect_applied((known && queue.applied != Some(params.step - 1)).then_some(params.step - 1))?;
        queue.applied = None;
    }
    let slot = &mut queue.slots[at];
    slot.scalars.bytes_mut()[..size_of::<Scalars>()].copy_from_slice(bytemuck::bytes_of(&scalars));
    slot.leaves = [pass.as_ref().is_some_and(|pass| pass.metrics.is_some()), update.is_some()];
    let key = Key {
        program: pass.as_ref().map(|pass| recording::Key::new(pass.ops, arena, pass.activations, &pass.context)),
        update: update.as_ref().map(|UpdateWork { plan, average, .. }| {
            let tables = arena.prepared.as_ref().map_or(0, |prepared| prepared.outcome_address());
            let (decay, average) = average.as_ref().map_or((0, 0), |(d, a)| (d.to_bits(), a.address_of(0)));
            [std::ptr::from_ref(*plan) as u64, tables, average, decay]
        }),
    };
    let slot = &queue.slots[at];
    let mut work = || queue_work(backend, slot, arena, &mut pass, &mut update);
    if !device.options().graphs || device.is_timing() {
        work()?;
    } else {
        match queue.recorded.iter_mut().find(|recorded| recorded.key == key) {
            // The first time loads kernels, measures products and takes scratch, none of which can be recorded.
            None => {
                work()?;
                queue.recorded.push(Recorded { key, graphs: [const { None }; SLOTS] });
            }
            Some(Recorded { graphs, .. }) => {
                if graphs[at].is_none() {
                    graphs[at] = Some(recording::record(backend, work)?);
                }
                if let Some(graph) = &graphs[at] {
                    graph.launch().map_err(|error| driver_error("replay the step", error))?;
                }
            }
        }
    }
    queue.slots[at].done.record(device.stream()).map_err(|error| driver_error("queue a step", error))?;
    queue.pending.push_back(at);
    queue.next = (at + 1) % SLOTS;
    Ok(())
}

/// Queues everything of the work that is the same each time.
fn queue_work<S: Storage>(
    backend: &Cuda<S>,
    slot: &Slot,
    arena: &mut Arena<Cuda<S>>,
    pass: &mut Option<Pass<'_, Cuda<S>>>,
    update: &mut Option<UpdateWork<'_, Cuda<S>>>,
) -> Result<()> {
    let device = backend.device();
    device.write(device.step_state(), &slot.scalars.bytes()[..size_of::<Scalars>()])?;
    let loss_scale = update.is_some() && backend.scales_losses();
    if loss_scale {
        // SAFETY: the state of the step.
        unsafe { device.launch(FILE, "scale_divisor", Grid::new(1, 1), args![device.step_state()])? };
    }
    let params_address = device.step_state() + UPDATE_PARAMS;
    // With the gradients of a whole step, and no one launch for all of the update, the norm is gathered behind the backward.
    let early = match (&pass, &update) {
        (Some(pass), Some(UpdateWork { plan, .. })) if backend.gathers_early(arena, plan)? => {
            Some((*plan, EarlyNorm::new(pass.ops, &arena.ranges, plan, backend.early_elements()?)?))
        }
        _ => None,
    };
    let mut metrics = None;
    if let Some(pass) = pass {
        let mut memory = Memory { arena: &mut *arena, activations: &mut *pass.activations };
        for (index, op) in pass.ops.iter().enumerate() {
            recording::one(backend, op.as_ref(), &mut memory, &pass.context)?;
            let Some((plan, early)) = &early else { continue };
            if let Some(tensors) = early.tensors_after(index) {
                let (prepared, arrays) = backend.arrays(memory.arena, plan)?;
                prepared.queue_norm_range(&arrays, prepared.pieces_of(&tensors), params_address)?;
            }
        }
        metrics = pass.metrics.map(|act| pass.activations.values.address_of(pass.activations.range(act).start));
    }
    let (mut outcome, mut squares) = (None, (None, 0));
    if let Some(UpdateWork { plan, params, average }) = update {
        let (prepared, arrays) = backend.arrays(arena, plan)?;
        match early {
            Some(_) => prepared.queue_gathered(&arrays, params.zero_gradients, params_address)?,
            None => prepared.queue(&arrays, params.zero_gradients, params_address)?,
        }
        let address = prepared.outcome_address();
        let (first, tensors) = prepared.tensor_squares();
        squares = (Some(first), tensors * size_of::<f64>());
        if let Some((decay, average)) = average {
            backend.queue_average(average, &arena.parameters, *decay, address)?;
        }
        if loss_scale {
            let skipped = address + std::mem::offset_of!(Outcome, skipped) as u64;
            // SAFETY: the state of the step, and a flag of the outcome.
            unsafe { device.launch(FILE, "adapt_loss_scale", Grid::new(1, 1), args![device.step_state(), skipped])? };
        }
        outcome = Some(address);
    }
    let report = slot.report.address();
    let parts = [
        (metrics, std::mem::offset_of!(Report, metrics), size_of::<[f32; METRICS]>()),
        (outcome, std::mem::offset_of!(Report, outcome), size_of::<Outcome>()),
        (squares.0, size_of::<Report>(), squares.1),
    ];
    for (address, offset, bytes) in parts {
        let Some(address) = address else { continue };
        // SAFETY: the page-locked report holds `bytes` bytes there (the plan has as many tensors as the arena), which nobody reads before `done` has passed.
        unsafe {
            let to = std::slice::from_raw_parts_mut(report.add(offset), bytes);
            result::memcpy_dtoh_async(to, address, device.stream().cu_stream())
        }
        .map_err(|error| driver_error("copy what a step found", error))?;
    }
    Ok(())
}

impl<S: Storage> Cuda<S> {
    /// Whether losses are scaled so that small gradients do not vanish.
    pub(super) fn scales_losses(&self) -> bool {
        S::NAME == "f16"
    }

    /// Address of the step's state where a loss is to be scaled by what stands there; else 0.
    pub(super) fn loss_scale_state(&self) -> u64 {
        if self.scales_losses() { self.device().step_state() } else { 0 }
    }

    pub(super) fn read_loss_scale(&self) -> Result<Option<LossScale>> {
        if !self.scales_losses() {
            return Ok(None);
        }
        let mut state = StepState::default();
        self.device().read(self.device().step_state(), bytemuck::bytes_of_mut(&mut state))?;
        Ok(Some(LossScale { scale: state.loss_scale, good_steps: state.good_steps }))
    }

    pub(super) fn write_loss_scale(&self, to: LossScale) -> Result<()> {
        if !self.scales_losses() {
            return Ok(());
        }
        if !(to.scale.is_finite() && to.scale > 0.0) {
            return Err(Error::Device(format!("a loss scale of {}: expected a finite number above 0", to.scale)));
        }
        let state = StepState { scalars: Scalars::default(), loss_scale: to.scale, good_steps: to.good_steps };
        self.device().write(self.device().step_state(), bytemuck::bytes_of(&state))
    }
}
