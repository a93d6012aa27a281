//! Whole steps on the device: one graph launch each, nothing waited for but room for the next batch.
//!
//! A batch is written to page-locked memory and copied by a stream of its own into one of two fixed places on the device, while
//! the step before is computed with the other; where the data set lies on the device, the numbers of its samples are copied and
//! the samples gathered. The step's scalars go the same way. The step itself (forward, loss, backward, norm, update, average, figures
//! out) is recorded once for each place and replayed in turn. What it found is written to page-locked memory by its last kernel, and
//! read by the host when its event has passed.

mod batch;
mod work;

use std::collections::VecDeque;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaEvent;

use self::work::Parts;
use super::buffer::Buffer;
use super::context::{Device, driver_error};
use super::pinned::Pinned;
use super::team::{Team, Told};
use super::update::Outcome;
use super::{Cuda, Storage, recording};
use crate::backend::PassOfStep;
use crate::backend::ops::METRICS;
use crate::backend::step::{Finished, Turn, UpdateWork, Work};
use crate::error::{Error, Result};
use crate::optim::StepOutcome;

/// `struct StepState` of kernels/common.cuh: what changes from one replay of a step to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Scalars {
    pub micro_step: u64,
    pub part: u64,
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
    assert!(size_of::<Scalars>() == 32);
    assert!(size_of::<Report>() == 4 * METRICS + size_of::<Outcome>());
};

/// A batch's place, and what the host shares with the device about it.
#[derive(Debug)]
struct Slot {
    /// Inputs and targets in the device's types, one after the other; or the numbers of samples.
    batch: Pinned,
    /// The numbers of samples on the device, where it gathers them.
    rows: Option<Buffer<u32>>,
    /// The step's scalars, and where they stand on the device: another step's are read meanwhile.
    scalars: Pinned,
    state: Buffer<Scalars>,
    report: Pinned,
    /// What this process tells all others at the end of a step.
    told: Pinned,
    /// What all processes told, where the step's work leaves it.
    team: Option<Pinned>,
    /// Passes when the batch and the scalars are on the device.
    copied: CudaEvent,
    /// Passes when the work is done.
    done: CudaEvent,
    /// Whether the work leaves metrics, an outcome, and what all processes found.
    leaves: [bool; 3],
}

impl Slot {
    /// A slot for steps of an arena of so many tensors.
    fn new(device: &Arc<Device>, tensors: usize) -> Result<Self> {
        let event = || device.context().new_event(None).map_err(|error| driver_error("make an event", error));
        let state = Buffer::zeros(device, 1)?;
        // It is set to 0 on another stream than it is written on.
        device.synchronize()?;
        Ok(Slot {
            batch: Pinned::new(device, 1)?,
            rows: None,
            scalars: Pinned::new(device, size_of::<Scalars>())?,
            state,
            report: Pinned::new(device, size_of::<Report>() + tensors * size_of::<f64>())?,
            told: Pinned::new(device, size_of::<Told>())?,
            team: None,
            copied: event()?,
            done: event()?,
            leaves: [false; 3],
        })
    }
}

/// What a recording depends on: another of these, and it must be made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    arena: recording::ArenaKey,
    program: Option<recording::Key>,
    /// Where an exchange stands within the recording.
    turn: Option<PassOfStep>,
    update: Option<UpdateKey>,
}

/// What a recorded update depends on, buffers by their identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct UpdateKey {
    /// Tables of its plan, which are made anew for another plan.
    tables: Option<u64>,
    zero_gradients: bool,
    /// The average that follows it, and the bits of its decay.
    average: Option<(u64, u64)>,
}

/// A kind of work that was done once as it is, and its graphs from then on, one for each slot.
struct Recorded {
    key: Key,
    graphs: [Option<recording::Graph>; SLOTS],
}

const SLOTS: usize = 2;

/// Steps in flight. It names memory of the arena and the activations that it was given, and goes before them.
#[derive(Default)]
pub struct Queue {
    recorded: Vec<Recorded>,
    slots: Vec<Slot>,
    /// Where processes tell each other what they found.
    team: Option<Team>,
    next: usize,
    /// Slots whose work was queued and not taken yet, oldest first.
    pending: VecDeque<usize>,
    finished: VecDeque<Finished>,
    /// The tables of the last update that was queued.
    tables: Option<u64>,
    /// Updates that the device counts as applied, where that is known.
    applied: Option<u64>,
}

impl Queue {
    /// Takes over what the oldest work found; not done yet, it is waited for or left.
    fn take(&mut self, wait: bool) -> Result<bool> {
        let Some(&at) = self.pending.front() else { return Ok(false) };
        let slot = &self.slots[at];
        let device = slot.report.device();
        let done = slot.done.try_is_complete().map_err(|error| device.failure("finish a step", error))?;
        if !done {
            if !wait {
                return Ok(false);
            }
            device.wait_for(&slot.done, "finish a step")?;
        }
        self.pending.pop_front();
        let (report, squares) = slot.report.bytes().split_at(size_of::<Report>());
        let report: Report = bytemuck::pod_read_unaligned(report);
        let [metrics, outcome, processes] = slot.leaves;
        if outcome {
            self.applied = Some(report.outcome.applied);
        }
        self.finished.push_back(Finished {
            metrics: metrics.then(|| report.metrics.map(f64::from)),
            processes: match (&self.team, &slot.team) {
                (Some(team), Some(told)) if processes => team.read(told.bytes()),
                _ => Vec::new(),
            },
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
pub(super) fn submit<S: Storage>(backend: &Cuda<S>, queue: &mut Queue, mut work: Work<'_, Cuda<S>>) -> Result<()> {
    match work.turn.take() {
        Some(turn) if !turn.exchange.is_queued() && work.arena.held.is_some() => {
            Err(Error::shape("step", "a collective of the device, where its memory is shared out", "one of the host"))
        }
        Some(turn) if !turn.exchange.is_queued() => around_the_host(backend, queue, work, turn),
        turn => submit_one(backend, queue, Work { turn, ..work }),
    }
}

/// A pass whose gradients the host exchanges: one recording before that and one behind it, each waited for, so that all processes
/// do the same in the same order.
fn around_the_host<S: Storage>(
    backend: &Cuda<S>,
    queue: &mut Queue,
    work: Work<'_, Cuda<S>>,
    mut turn: Turn<'_, Cuda<S>>,
) -> Result<()> {
    let Work { arena, pass, update, .. } = work;
    turn.exchange.begin(backend, arena, turn.pass)?;
    let backward = Work { arena: &mut *arena, pass, turn: None, update: None };
    let metrics = submit_and_wait(backend, queue, backward)?.metrics;
    turn.exchange.end(backend, arena, turn.pass)?;
    let mut finished = Finished { metrics, processes: turn.finish(metrics)?, ..Finished::default() };
    if update.is_some() {
        let found = submit_and_wait(backend, queue, Work { arena, pass: None, turn: None, update })?;
        (finished.outcome, finished.norm_squares) = (found.outcome, found.norm_squares);
    }
    queue.finished.push_back(finished);
    Ok(())
}

/// What work found, once it is done.
fn submit_and_wait<S: Storage>(backend: &Cuda<S>, queue: &mut Queue, work: Work<'_, Cuda<S>>) -> Result<Finished> {
    submit_one(backend, queue, work)?;
    while queue.take(true)? {}
    queue.finished.pop_back().ok_or_else(|| Error::DeviceFailed("the work that was queued did not end".into()))
}

/// Queues work that one recording holds.
fn submit_one<S: Storage>(backend: &Cuda<S>, queue: &mut Queue, work: Work<'_, Cuda<S>>) -> Result<()> {
    let device = backend.device();
    // The thread may be another than the one that queued before.
    device.bind()?;
    while queue.slots.len() < SLOTS {
        queue.slots.push(Slot::new(device, work.arena.layout.entries().len())?);
    }
    let at = queue.next;
    while queue.pending.contains(&at) {
        queue.take(true)?;
    }
    let Work { arena, mut pass, mut turn, mut update } = work;
    if let Some(pass) = &mut pass {
        pass.activations.select(at);
    }
    let context = pass.as_ref().map(|pass| pass.context).unwrap_or_default();
    let mut scalars = Scalars { micro_step: context.micro_step, part: context.part, ..Scalars::default() };
    if let Some(UpdateWork { plan, params, .. }) = &update {
        params.check()?;
        (scalars.learning_rate, scalars.divisor) = (params.learning_rate, params.divisor);
        let (prepared, _) = backend.arrays(arena, plan)?;
        let new = queue.tables.replace(prepared.identity()) != Some(prepared.identity());
        // New tables go on from what the last ones counted.
        while new && queue.take(true)? {}
        // With updates in flight the device alone knows how many were applied.
        let known = queue.pending.iter().all(|&at| !queue.slots[at].leaves[1])
            && queue.finished.iter().all(|finished| finished.outcome.is_none());
        let applied = if known { Some(params.step - 1) } else { queue.applied.filter(|_| new) };
        prepared.expect_applied(applied.filter(|_| new || queue.applied != applied))?;
        queue.applied = None;
    }
    if let Some(turn) = &turn {
        prepare_team(device, queue, at, turn)?;
    }
    // Last, so that what else is refused leaves no copy in flight.
    let slot = &mut queue.slots[at];
    if let Some(pass) = &pass {
        slot.copy(device, pass)?;
    }
    // From here on it is one piece of work, whoever else queues some.
    let _claim = device.claim();
    slot.copy_scalars(device, &scalars)?;
    let tells = turn.as_ref().is_some_and(|turn| turn.pass.ends_step);
    slot.leaves = [pass.as_ref().is_some_and(|pass| pass.metrics.is_some()), update.is_some(), tells];
    let key = Key {
        arena: recording::ArenaKey::new(arena),
        program: pass.as_ref().map(|pass| recording::Key::new(pass.ops, pass.activations, &pass.context)),
        turn: turn.as_ref().map(|turn| turn.pass),
        update: update.as_ref().map(|UpdateWork { params, average, .. }| UpdateKey {
            tables: arena.prepared.tables.as_ref().map(|prepared| prepared.identity()),
            zero_gradients: params.zero_gradients,
            average: average.as_ref().map(|(decay, average)| (average.identity(), decay.to_bits())),
        }),
    };
    let (slot, team) = (&queue.slots[at], queue.team.as_ref());
    let mut work = || {
        let parts = Parts { pass: &mut pass, turn: &mut turn, update: &mut update };
        device.with_state(slot.state.address_of(0), || parts.queue(backend, slot, team, arena))
    };
    if !device.replays() {
        work()?;
    } else {
        match queue.recorded.iter_mut().find(|recorded| recorded.key == key) {
            // The first time loads kernels, measures products and takes scratch, none of which can be recorded.
            None => {
                work()?;
                // What names tables of another plan of this arena is never met again.
                queue.recorded.retain(|Recorded { key: kept, .. }| match (&kept.update, &key.update) {
                    (Some(old), Some(new)) => kept.arena != key.arena || old.tables == new.tables,
                    _ => true,
                });
                queue.recorded.push(Recorded { key, graphs: [const { None }; SLOTS] });
            }
            Some(Recorded { graphs, .. }) => {
                if graphs[at].is_none() {
                    graphs[at] = Some(recording::record(device, work)?);
                }
                if let Some(graph) = &graphs[at] {
                    graph.launch(device).map_err(|error| device.failure("replay the step", error))?;
                }
            }
        }
    }
    queue.slots[at].done.record(device.stream()).map_err(|error| driver_error("queue a step", error))?;
    queue.pending.push_back(at);
    queue.next = (at + 1) % SLOTS;
    Ok(())
}

/// Makes room for what processes tell each other, and writes what this one does.
fn prepare_team<S: Storage>(
    device: &Arc<Device>,
    queue: &mut Queue,
    at: usize,
    turn: &Turn<'_, Cuda<S>>,
) -> Result<()> {
    let (place, passes) = (turn.exchange.place(), turn.pass.passes);
    let team = match &mut queue.team {
        Some(team) if team.is_for(place, passes) => team,
        // Recordings name the room that was there.
        room => {
            queue.recorded.clear();
            room.insert(Team::new(device, place, passes)?)
        }
    };
    let slot = &mut queue.slots[at];
    if slot.team.as_ref().is_none_or(|told| told.len() != team.bytes()) {
        queue.recorded.clear();
        slot.team = Some(Pinned::new(device, team.bytes())?);
    }
    let told = Told::new(turn.found);
    slot.told.bytes_mut()[..size_of::<Told>()].copy_from_slice(bytemuck::bytes_of(&told));
    Ok(())
}
