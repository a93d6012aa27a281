//! The fused update on the device (kernels/update.cu): the norm in two stages, then everything else in one pass; or, for small
//! arenas, all of it in one launch (kernels/update_persistent.cu). The norm of what backward has finished can be
//! gathered before the rest is ([`EarlyNorm`]).
//!
//! The clip's coefficient, the decision to skip and the count of applied updates stay on the device. [`Prepared`] is the update
//! alone, for arenas of any owner.

mod alone;
mod borrowed;
mod early;
mod muon;
mod persistent;
mod plan;

use std::ops::Range;
use std::sync::Arc;

pub use self::alone::ArenaArrays;
pub use self::early::EarlyNorm;
pub(super) use self::plan::Outcome;
use self::plan::{ClipOptions, Kind, Pass, RULE_STEP_WORDS, Tables, UpdateParams};
use super::launch::{Arg, Grid, args};
use super::step::{self, Queue};
use super::{Buffer, Cuda, Device, Storage};
use crate::backend::Arena;
use crate::backend::ops::Update;
use crate::backend::step::{Finished, LossScale, Work};
use crate::error::{Error, Result};
use crate::optim::{StepOutcome, StepParams, UpdatePlan};
use crate::plan::ALIGNMENT;

const FILE: &str = "update";
const TRUST: &str = "update_trust";

/// What the device keeps of an update plan: its tables, and room for what is found.
pub struct Prepared {
    device: Arc<Device>,
    plan: UpdatePlan,
    clip: ClipOptions,
    pieces: Buffer<plan::Piece>,
    tensors: Buffer<plan::Tensor>,
    groups: Buffer<plan::GroupOptions>,
    /// The first piece of each tensor.
    first_pieces: Vec<u32>,
    block_groups: Buffer<u8>,
    block_tensors: Buffer<u32>,
    unit_tensors: Buffer<u32>,
    unit_coefficients: Buffer<f32>,
    squares: [Buffer<f64>; 2],
    clamped: Buffer<u32>,
    tensor_squares: Buffer<f64>,
    coefficients: Buffer<f32>,
    rates: [Buffer<f32>; 2],
    steps: Buffer<[f32; RULE_STEP_WORDS]>,
    params: Buffer<UpdateParams>,
    outcome: Buffer<Outcome>,
    /// The device's count of applied updates, where the host knows it.
    applied: Option<u64>,
    /// What the blocks of the persistent form meet at.
    barrier: Buffer<u32>,
}

/// The arrays of an arena, by address.
#[derive(Clone, Copy, Debug)]
pub struct Arrays {
    /// f32, or bf16 where they are kept in that alone.
    pub parameters: u64,
    /// Of the gradients' type.
    pub gradients: u64,
    /// Of the copy's type; 0 where there is none.
    pub copy: u64,
    /// f32; 0 for a slot that the rules do not keep.
    pub slots: [u64; 2],
    /// Types of parameters, gradients and copy: `f32`, `bf16` or `f16`. Parameters in bf16 have `bf16` as the copy's too.
    pub types: [&'static str; 3],
}

impl Arrays {
    /// The form of the kernels for these types, as their names end.
    fn form(&self) -> String {
        self.types.join("_")
    }
}

impl Prepared {
    /// Uploads a plan.
    ///
    /// # Errors
    /// Not enough memory, or a device that failed.
    pub fn new(device: &Arc<Device>, plan: &UpdatePlan) -> Result<Self> {
        let tables = Tables::new(plan);
        let (pieces, tensors) = (tables.pieces.len(), tables.tensors.len());
        Ok(Prepared {
            clip: ClipOptions::new(&plan.clip),
            pieces: upload(device, &tables.pieces)?,
            tensors: upload(device, &tables.tensors)?,
            groups: upload(device, &tables.groups)?,
            first_pieces: tables.tensors.iter().map(|tensor| tensor.first_piece).collect(),
            block_groups: upload(device, &tables.block_groups)?,
            block_tensors: upload(device, &tables.block_tensors)?,
            unit_coefficients: Buffer::zeros(device, tables.unit_tensors.len())?,
            unit_tensors: upload(device, &tables.unit_tensors)?,
            squares: [Buffer::zeros(device, pieces)?, Buffer::zeros(device, pieces)?],
            clamped: Buffer::zeros(device, pieces)?,
            tensor_squares: Buffer::zeros(device, tensors)?,
            coefficients: Buffer::zeros(device, tensors)?,
            rates: [Buffer::zeros(device, tensors)?, Buffer::zeros(device, tensors)?],
            steps: Buffer::zeros(device, tables.groups.len())?,
            params: Buffer::zeros(device, 1)?,
            outcome: Buffer::zeros(device, 1)?,
            applied: None,
            barrier: Buffer::zeros(device, 1)?,
            device: device.clone(),
            plan: plan.clone(),
        })
    }

    /// Writes what changes from one update to the next, in the order of the stream.
    fn prepare(&mut self, step: &StepParams) -> Result<()> {
        step.check()?;
        let applied = step.step - 1;
        self.expect_applied((self.applied != Some(applied)).then_some(applied))?;
        self.params.write(0, &[UpdateParams { learning_rate: step.learning_rate, divisor: step.divisor }])
    }

    /// Sets the device's count of applied updates, where one is given. What it counts on its own is not known until it is read.
    pub(super) fn expect_applied(&mut self, applied: Option<u64>) -> Result<()> {
        self.applied = None;
        let Some(applied) = applied else { return Ok(()) };
        self.outcome.write(0, &[Outcome { applied, ..Outcome::default() }])
    }

    /// Where the device leaves what an update found.
    pub(super) fn outcome_address(&self) -> u64 {
        self.outcome.address_of(0)
    }

    /// Where the device leaves the sum of squares of each tensor's gradients, and how many there are.
    pub(super) fn tensor_squares(&self) -> (u64, usize) {
        (self.tensor_squares.address_of(0), self.tensor_squares.len())
    }

    /// What the last update found, after it is done.
    fn outcome(&mut self) -> Result<StepOutcome> {
        let mut outcome = [Outcome::default()];
        self.outcome.read(0, &mut outcome)?;
        self.applied = Some(outcome[0].applied);
        Ok(outcome[0].into())
    }

    fn pass(&self, zero_gradients: bool, params: u64) -> Pass {
        Pass {
            block_groups: self.block_groups.address_of(0),
            block_tensors: self.block_tensors.address_of(0),
            tensors: self.tensors.address_of(0),
            coefficients: self.coefficients.address_of(0),
            unit_coefficients: if self.unit_tensors.is_empty() { 0 } else { self.unit_coefficients.address_of(0) },
            steps: self.steps.address_of(0),
            groups: self.groups.address_of(0),
            rates: self.rates[0].address_of(0),
            params,
            outcome: self.outcome.address_of(0),
            len: (self.plan.block_groups.len() * ALIGNMENT) as u64,
            seed: self.plan.rounding.unwrap_or(0),
            bound: self.clip.bound,
            zero_gradients: i32::from(zero_gradients),
        }
    }

    fn has(&self, kind: Kind) -> bool {
        self.plan.groups.iter().any(|group| Kind::of(&group.rule) == kind)
    }

    /// What the kernels of the plan's rules are called.
    fn kernel(&self) -> &'static str {
        let mut kinds = self.plan.groups.iter().map(|group| Kind::of(&group.rule));
        match kinds.next() {
            Some(first) if kinds.all(|kind| kind == first) => first.kernel(),
            _ => "mixed",
        }
    }

    /// Queues the kernels of one update. Its scalars (`UpdateParams`) stand at `params`.
    pub(super) fn queue(&self, arrays: &Arrays, zero_gradients: bool, params: u64) -> Result<()> {
        if let Some(blocks) = self.persistent_blocks(arrays)? {
            return self.queue_persistent(arrays, &self.pass(zero_gradients, params), blocks);
        }
        self.queue_norm_range(arrays, 0..self.pieces.len(), params)?;
        self.queue_gathered(arrays, zero_gradients, params)
    }

    /// As [`Prepared::queue`], once [`Prepared::queue_norm_range`] was queued for every piece: the norm's end, then the pass.
    pub(super) fn queue_gathered(&self, arrays: &Arrays, zero_gradients: bool, params: u64) -> Result<()> {
        self.finish_norm(arrays, params)?;
        let pass = self.pass(zero_gradients, params);
        if self.has(Kind::Lars) {
            self.queue_rates(arrays, &pass, Kind::Lars)?;
        }
        let (kernel, form) = (self.kernel(), arrays.form());
        let warps = self.plan.block_groups.len();
        let grid = Grid::new(warps.div_ceil(8).min(self.device.multiprocessors() * 16), 256);
        let list =
            args![arrays.parameters, arrays.gradients, arrays.copy, arrays.slots[0], arrays.slots[1], Arg::of(&pass)];
        // SAFETY: the arrays hold as many elements as the plan's layout, of the types that the kernel's name says.
        unsafe { self.device.launch(FILE, &format!("update_{kernel}_{form}"), grid, list)? };
        if self.has(Kind::Lamb) {
            self.queue_rates(arrays, &pass, Kind::Lamb)?;
            let rates = self.rates[1].address_of(0);
            let [first, second] = arrays.slots;
            let list = args![arrays.parameters, arrays.copy, first, second, rates, Arg::of(&pass)];
            // SAFETY: as above.
            unsafe { self.device.launch(TRUST, &format!("lamb_apply_{form}"), grid, list)? };
        }
        if self.has(Kind::Muon) {
            self.queue_muon(arrays, &pass)?;
        }
        Ok(())
    }

    /// Queues the norm's part of some pieces, whose gradients are final. Pieces do not depend on each other, so the norm has the
    /// same bits however they are parted and in whatever order.
    pub(super) fn queue_norm_range(&self, arrays: &Arrays, pieces: Range<usize>, params: u64) -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        let table = self.pieces.address_of(0);
        let (squares, clamped) = (self.squares[0].address_of(0), self.clamped.address_of(0));
        let first = pieces.start as u32;
        let list = args![arrays.gradients, table, first, params, Arg::of(&self.clip), squares, clamped];
        let kernel = format!("norm_pieces_{}", arrays.types[1]);
        // SAFETY: tables and results are of the sizes that the kernels name; gradients are laid out as the plan says.
        unsafe { self.device.launch(FILE, &kernel, Grid::new(pieces.len(), 256), list) }
    }

    /// Queues what follows once every piece was summed: the norm, the decision, the constants, the units' coefficients.
    fn finish_norm(&self, arrays: &Arrays, params: u64) -> Result<()> {
        let clip = Arg::of(&self.clip);
        let [pieces, tensors, groups] = [self.pieces.len(), self.tensors.len(), self.groups.len()].map(|n| n as u32);
        let outcome = self.outcome.address_of(0);
        let (squares, clamped) = (self.squares[0].address_of(0), self.clamped.address_of(0));
        let list = args![
            self.tensors.address_of(0),
            tensors,
            squares,
            clamped,
            pieces,
            self.groups.address_of(0),
            groups,
            params,
            clip,
            self.tensor_squares.address_of(0),
            self.coefficients.address_of(0),
            self.steps.address_of(0),
            outcome
        ];
        // SAFETY: as in `queue_norm_range`.
        unsafe { self.device.launch(FILE, "norm_finish", Grid::new(1, 1024), list)? };
        if self.unit_tensors.is_empty() {
            return Ok(());
        }
        let list = args![
            arrays.parameters,
            arrays.gradients,
            self.tensors.address_of(0),
            self.unit_tensors.address_of(0),
            self.unit_tensors.len() as u32,
            params,
            clip,
            self.unit_coefficients.address_of(0),
            outcome
        ];
        let grid = Grid::new(self.unit_tensors.len().div_ceil(8), 256);
        // SAFETY: as above.
        unsafe { self.device.launch(FILE, &format!("unit_coefficients_{}", arrays.form()), grid, list) }
    }

    /// The learning rate of each tensor under LARS or LAMB.
    fn queue_rates(&self, arrays: &Arrays, pass: &Pass, kind: Kind) -> Result<()> {
        let [weights, others] = [&self.squares[0], &self.squares[1]].map(|buffer| buffer.address_of(0));
        if self.pieces.is_empty() {
            return Ok(());
        }
        let pieces = self.pieces.address_of(0);
        let grid = Grid::new(self.pieces.len(), 256);
        let lamb = kind == Kind::Lamb;
        let (kernel, second_pair) = if lamb { ("lamb", arrays.slots) } else { ("lars", [arrays.gradients, 0]) };
        let kernel = format!("{kernel}_pieces_{}", arrays.form());
        let mut list: Vec<Arg> = vec![arrays.parameters.into(), second_pair[0].into()];
        if lamb {
            list.push(second_pair[1].into());
        }
        let shared: &[Arg] = args![pieces, Arg::of(pass), weights, others];
        list.extend_from_slice(shared);
        let rates = self.rates[usize::from(lamb)].address_of(0);
        let finish = args![weights, others, self.tensors.len() as u32, Arg::of(pass), lamb, rates];
        // SAFETY: as in `queue_norm_range`.
        unsafe {
            self.device.launch(TRUST, &kernel, grid, &mut list)?;
            self.device.launch(TRUST, "tensor_rates", Grid::new(self.tensors.len().div_ceil(256), 256), finish)
        }
    }
}

impl From<Outcome> for StepOutcome {
    fn from(outcome: Outcome) -> Self {
        let Outcome { grad_norm, clip_coefficient, clamped, skipped, least, .. } = outcome;
        let skipped = skipped != 0;
        // The kernel keeps f32 of the adaptive clip's coefficients.
        let least = if skipped { 1.0 } else { f64::from(f32::from_bits(least)) };
        StepOutcome { grad_norm, clip_coefficient: clip_coefficient.min(least), clamped, skipped }
    }
}

fn upload<T: bytemuck::Pod>(device: &Arc<Device>, values: &[T]) -> Result<Buffer<T>> {
    let mut buffer = Buffer::zeros(device, values.len())?;
    buffer.write(0, values)?;
    Ok(buffer)
}

impl<S: Storage> Cuda<S> {
    /// The arrays of an arena, and what is kept of its plan.
    pub(super) fn arrays<'a>(
        &self,
        arena: &'a mut Arena<Self>,
        plan: &UpdatePlan,
    ) -> Result<(&'a mut Prepared, Arrays)> {
        let len = plan.block_groups.len() * ALIGNMENT;
        let alone = plan.rounding.is_some();
        if alone && S::NAME != "bf16" {
            return Err(Error::shape("update", "parameters in bf16, where they are kept in that alone", S::NAME));
        }
        let parameters = if alone { arena.stored.len() } else { arena.parameters.len() };
        let lens = [parameters, arena.gradients.len()].into_iter().chain(arena.slots.iter().map(Buffer::len));
        if lens.clone().any(|l| l != len) || arena.slots.len() < plan.slots.len() {
            return Err(Error::shape(
                "update",
                format!("parameters, gradients and {} slots of {len} elements", plan.slots.len()),
                format!("{:?}", lens.collect::<Vec<_>>()),
            ));
        }
        let slot = |index: usize| arena.slots.get(index).map_or(0, |slot| slot.address_of(0));
        let arrays = Arrays {
            parameters: if alone { arena.stored.address_of(0) } else { arena.parameters.address_of(0) },
            gradients: arena.gradients.address_of(0),
            copy: if S::HAS_MASTER && !alone { arena.stored.address_of(0) } else { 0 },
            slots: [slot(0), slot(1)],
            types: [if alone { S::NAME } else { "f32" }, "f32", S::NAME],
        };
        if arena.prepared.as_ref().is_none_or(|prepared| prepared.plan != *plan) {
            arena.prepared = Some(Prepared::new(self.device(), plan)?);
        }
        let Some(prepared) = &mut arena.prepared else {
            return Err(Error::Device("the update's plan was not kept".into()));
        };
        Ok((prepared, arrays))
    }
}

impl<S: Storage> Cuda<S> {
    /// Queues a move of the average; `outcome`, where it is not 0, says whether the update before it was skipped.
    pub(super) fn queue_average(
        &self,
        average: &mut Buffer<f32>,
        parameters: &Buffer<f32>,
        decay: f64,
        outcome: u64,
    ) -> Result<()> {
        if average.len() != parameters.len() {
            let found = format!("{} and {}", average.len(), parameters.len());
            return Err(Error::shape("average", "as many averages as parameters", found));
        }
        let (share, len) = ((1.0 - decay) as f32, parameters.len());
        let list = args![average.address_of(0), parameters.address_of(0), share, len, outcome];
        // SAFETY: two buffers of `len` values, and an outcome or nothing.
        unsafe { self.device().launch(FILE, "average", Grid::elements(self.device(), len, 1), list) }
    }
}

impl<S: Storage> Update for Cuda<S> {
    fn update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome> {
        let (prepared, arrays) = self.arrays(arena, plan)?;
        prepared.prepare(step)?;
        prepared.queue(&arrays, step.zero_gradients, prepared.params.address_of(0))?;
        prepared.outcome()
    }

    fn norm_squares(&self, arena: &Arena<Self>) -> Result<Vec<f64>> {
        let Some(prepared) = &arena.prepared else { return Ok(Vec::new()) };
        let mut squares = vec![0.0; prepared.tensor_squares.len()];
        prepared.tensor_squares.read(0, &mut squares)?;
        Ok(squares)
    }

    fn table_bytes(plan: &UpdatePlan) -> usize {
        Tables::new(plan).device_bytes()
    }

    fn product_bits(&self) -> u32 {
        if self.device().options().tf32 { 10 } else { 23 }
    }

    fn average(&self, average: &mut Buffer<f32>, parameters: &Buffer<f32>, decay: f64) -> Result<()> {
        self.queue_average(average, parameters, decay, 0)
    }

    type Queue = Queue;

    fn submit(&self, queue: &mut Queue, work: Work<'_, Self>) -> Result<()> {
        step::submit(self, queue, work)
    }

    fn finished(&self, queue: &mut Queue, wait: bool) -> Result<Option<Finished>> {
        step::finished(queue, wait)
    }

    fn loss_scale(&self) -> Result<Option<LossScale>> {
        self.read_loss_scale()
    }

    fn set_loss_scale(&self, to: LossScale) -> Result<()> {
        self.write_loss_scale(to)
    }
}
