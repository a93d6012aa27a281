//! The fused update on the device (kernels/update.cu): the norm in two stages, then everything else in one pass; or, for small
//! arenas, all of it in one launch (kernels/update_persistent.cu). The norm of what backward has finished can be
//! gathered before the rest is ([`EarlyNorm`]). Several processes update their elements each, and gather what sums go over.
//!
//! The clip's coefficient, the decision to skip and the count of applied updates stay on the device. [`Prepared`] is the update
//! alone, for arenas of any owner.

mod alone;
mod borrowed;
mod early;
mod muon;
mod own;
mod persistent;
mod plan;
mod trust;

use std::ops::Range;
use std::sync::Arc;

pub use self::alone::ArenaArrays;
pub use self::early::EarlyNorm;
pub(super) use self::plan::Outcome;
use self::plan::{ClipOptions, Kind, Pass, RULE_STEP_WORDS, Tables, UpdateParams};
use super::launch::{Arg, Grid, args};
use super::loss_scale::KeptScale;
use super::step::{self, Queue};
use super::{Buffer, Cuda, Device, Storage};
use crate::backend::ops::Update;
use crate::backend::step::{Finished, LossScale, Work};
use crate::backend::{Alone, Arena, DeviceSlice, Number, Slice, Together, Workspace};
use crate::error::Result;
use crate::optim::{StepOutcome, StepParams, UpdatePlan};
use crate::plan::ALIGNMENT;

const FILE: &str = "update";

/// What the device keeps of an arena's updates.
#[derive(Default)]
pub struct Kept {
    /// The plan of the last one.
    pub(super) tables: Option<Prepared>,
    /// The dynamic loss scale, once there is one.
    pub(super) loss_scale: Option<Buffer<KeptScale>>,
}

/// What the device keeps of an update plan: its tables, and room for what is found.
pub struct Prepared {
    device: Arc<Device>,
    plan: UpdatePlan,
    /// The elements that are updated; arrays begin with the first of them.
    elements: Range<usize>,
    /// Which pieces and which output units are those.
    own: [Range<usize>; 2],
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
    /// The least adaptive coefficient of each process, where several update together.
    leasts: Option<Buffer<u32>>,
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
        Self::of_part(device, plan, 0..plan.block_groups.len() * ALIGNMENT)
    }

    /// As [`Prepared::new`], for a process that updates `elements` of the arena alone, cut as [`UpdatePlan::cuts`] says.
    fn of_part(device: &Arc<Device>, plan: &UpdatePlan, elements: Range<usize>) -> Result<Self> {
        let tables = Tables::new(plan, &elements);
        let (pieces, tensors) = (tables.pieces.len(), tables.tensors.len());
        Ok(Prepared {
            own: [tables.own_pieces, tables.own_units],
            elements,
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
            leasts: None,
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

    /// A number that no other tables have.
    pub(super) fn identity(&self) -> u64 {
        self.outcome.identity()
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
            len: self.elements.len() as u64,
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
    pub(super) fn queue(&mut self, arrays: &Arrays, zero_gradients: bool, params: u64) -> Result<()> {
        if let Some(blocks) = self.persistent_blocks(arrays)? {
            return self.queue_persistent(arrays, &self.pass(zero_gradients, params), blocks);
        }
        self.queue_together(arrays, zero_gradients, params, &mut Alone)
    }

    /// As [`Prepared::queue`], by processes that update their elements each: sums over pieces are those of all, added in the order
    /// that one process alone adds them in.
    pub(super) fn queue_together(
        &mut self,
        arrays: &Arrays,
        zero_gradients: bool,
        params: u64,
        together: &mut dyn Together,
    ) -> Result<()> {
        self.queue_norm_range(arrays, self.own[0].clone(), params)?;
        self.queue_gathered(arrays, zero_gradients, params, together)
    }

    /// As [`Prepared::queue_together`], once [`Prepared::queue_norm_range`] was queued for every piece that is updated here: the
    /// norm's end, then the pass.
    pub(super) fn queue_gathered(
        &mut self,
        arrays: &Arrays,
        zero_gradients: bool,
        params: u64,
        together: &mut dyn Together,
    ) -> Result<()> {
        gather_pieces(together, &self.squares[0])?;
        gather_pieces(together, &self.clamped)?;
        together.join()?;
        self.finish_norm(params)?;
        self.queue_unit_coefficients(arrays, params, together)?;
        let pass = self.pass(zero_gradients, params);
        if self.has(Kind::Lars) {
            self.queue_rates(arrays, &pass, Kind::Lars, together)?;
        }
        let (kernel, form) = (self.kernel(), arrays.form());
        let [first, second] = arrays.slots;
        let warps = self.elements.len() / ALIGNMENT;
        if warps > 0 {
            let grid = a_warp_each(warps);
            let list = args![arrays.parameters, arrays.gradients, arrays.copy, first, second, Arg::of(&pass)];
            // SAFETY: the arrays hold as many elements as are updated, of the types that the kernel's name says.
            unsafe { self.device.launch(FILE, &format!("update_{kernel}_{form}"), grid, list)? };
        }
        if self.has(Kind::Lamb) {
            self.queue_lamb(arrays, &pass, together)?;
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

    /// Queues what follows once every piece was summed: the norm, the decision, the constants.
    fn finish_norm(&self, params: u64) -> Result<()> {
        let [pieces, tensors, groups] = [self.pieces.len(), self.tensors.len(), self.groups.len()].map(|n| n as u32);
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
            Arg::of(&self.clip),
            self.tensor_squares.address_of(0),
            self.coefficients.address_of(0),
            self.steps.address_of(0),
            self.outcome.address_of(0)
        ];
        // SAFETY: as in `queue_norm_range`.
        unsafe { self.device.launch(FILE, "norm_finish", Grid::new(1, 1024), list) }
    }

    /// Queues the adaptive clip's coefficients of the units that are updated here, and the least of all.
    fn queue_unit_coefficients(&mut self, arrays: &Arrays, params: u64, together: &mut dyn Together) -> Result<()> {
        if self.unit_tensors.is_empty() {
            return Ok(());
        }
        let (units, outcome) = (&self.own[1], self.outcome.address_of(0));
        if !units.is_empty() {
            let list = args![
                arrays.parameters,
                arrays.gradients,
                self.tensors.address_of(0),
                self.unit_tensors.address_of(0),
                units.start as u32,
                units.len() as u32,
                params,
                Arg::of(&self.clip),
                self.unit_coefficients.address_of(0),
                outcome
            ];
            let kernel = format!("unit_coefficients_{}", arrays.form());
            // SAFETY: as in `queue_norm_range`.
            unsafe { self.device.launch(FILE, &kernel, Grid::new(units.len().div_ceil(8), 256), list)? };
        }
        let (rank, world) = together.place();
        if world == 1 {
            return Ok(());
        }
        if self.leasts.is_none() {
            self.leasts = Some(Buffer::zeros(&self.device, world)?);
        }
        let Some(leasts) = &self.leasts else { return Ok(()) };
        let own = outcome + std::mem::offset_of!(Outcome, least) as u64;
        self.device.copy(leasts.address_of(rank), own, size_of::<u32>())?;
        together.gather(bytes_of(leasts))?;
        together.join()?;
        let list = args![leasts.address_of(0), world as u32, outcome];
        // SAFETY: a number of each process, and an outcome.
        unsafe { self.device.launch(FILE, "least_of_all", Grid::new(1, 1), list) }
    }
}

/// Fills in what other processes found of their pieces.
fn gather_pieces<T: bytemuck::Pod>(together: &mut dyn Together, of_pieces: &Buffer<T>) -> Result<()> {
    together.gather_pieces(bytes_of(of_pieces))
}

/// A buffer as bytes for a collective, which then neither adds nor converts them.
fn bytes_of<T: bytemuck::Pod>(buffer: &Buffer<T>) -> Slice<'_> {
    let len = buffer.len() * size_of::<T>();
    Slice::Device(DeviceSlice { address: buffer.address_of(0), len, number: Number::U8 })
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

impl<S: Storage> Update for Cuda<S> {
    fn update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome> {
        let (prepared, arrays) = self.arrays(arena, plan)?;
        prepared.prepare(step)?;
        let params = prepared.params.address_of(0);
        prepared.queue(&arrays, step.zero_gradients, params)?;
        prepared.outcome()
    }

    fn update_held(
        &self,
        arena: &mut Arena<Self>,
        plan: &UpdatePlan,
        step: &StepParams,
        together: &mut dyn Together,
    ) -> Result<StepOutcome> {
        let (prepared, arrays) = self.arrays(arena, plan)?;
        prepared.prepare(step)?;
        let params = prepared.params.address_of(0);
        prepared.queue_together(&arrays, step.zero_gradients, params, together)?;
        prepared.outcome()
    }

    fn norm_squares(&self, arena: &Arena<Self>) -> Result<Vec<f64>> {
        let Some(prepared) = &arena.prepared.tables else { return Ok(Vec::new()) };
        let mut squares = vec![0.0; prepared.tensor_squares.len()];
        prepared.tensor_squares.read(0, &mut squares)?;
        Ok(squares)
    }

    fn table_bytes(plan: &UpdatePlan, elements: &Range<usize>) -> usize {
        Tables::new(plan, elements).device_bytes()
    }

    fn update_workspace(plan: &UpdatePlan, elements: &Range<usize>) -> Workspace {
        muon::workspace(plan, elements)
    }

    const QUEUES_SUMS: bool = true;

    fn product_bits(&self) -> u32 {
        if self.device().options().tf32 { 10 } else { 23 }
    }

    fn average(&self, average: &mut Buffer<f32>, parameters: &Buffer<f32>, decay: f64) -> Result<()> {
        self.queue_average_of(average, (parameters.address_of(0), parameters.len()), decay, 0)
    }

    fn average_arena(&self, average: &mut Buffer<f32>, arena: &Arena<Self>, decay: f64) -> Result<()> {
        self.queue_average(average, arena, decay, 0)
    }

    type Queue = Queue;

    fn submit(&self, queue: &mut Queue, work: Work<'_, Self>) -> Result<()> {
        step::submit(self, queue, work)
    }

    fn finished(&self, queue: &mut Queue, wait: bool) -> Result<Option<Finished>> {
        step::finished(queue, wait)
    }

    fn loss_scale(&self, arena: &Arena<Self>) -> Result<Option<LossScale>> {
        Self::read_loss_scale(arena)
    }

    fn set_loss_scale(&self, arena: &mut Arena<Self>, to: LossScale) -> Result<()> {
        self.write_loss_scale(arena, to)
    }
}

/// A warp for each of so many blocks of 128 elements: 4.23 TB/s on an H200 for a pass like momentum's, where 16 blocks of threads
/// a multiprocessor that went over them in turn reached 3.98 (`benches/forms/update.cu`).
fn a_warp_each(blocks: usize) -> Grid {
    Grid::new(blocks.div_ceil(8), 256)
}
