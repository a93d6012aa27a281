//! What a training step spends its time on: each operation's time beside its floor, the bytes it must move at the speed of a copy
//! or its arithmetic at the speed of a large product, both measured on the same device in the same run.

mod table;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use self::table::{Entry, Table};
use crate::backend::profile::{KernelTime, Profiled};
use crate::backend::{Memory, Op, StepContext, Use};
use crate::error::{Error, Result};
use crate::model::layers::Linear;
use crate::model::{Input, Loss, Mode, Model, OpCost, Program, Value};
use crate::optim::{NormClip, OptimizerOptions, UpdatePlan};
use crate::random::{Philox, Purpose};
use crate::real::Element;

/// Micro-batches that are not counted: they load kernels, choose algorithms and fill caches.
const WARM_UP: u64 = 2;
/// What operations of an evaluation are timed as, to be left out.
const EVALUATION: &str = "evaluation";
/// Repetitions of what tells the device's speed.
const REPETITIONS: u64 = 5;

/// A device's speed, as measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Bytes a second of a copy, those read and those written together.
    pub copy: f64,
    /// Floating-point operations a second of a large product, in the type that activations are stored in.
    pub product: f64,
}

impl Speed {
    /// Measures it: some hundred milliseconds on a CPU, less on a GPU.
    ///
    /// # Errors
    /// Not enough memory, or a device that failed.
    pub fn measure<B: Profiled>(backend: &B) -> Result<Self> {
        Ok(Speed { copy: copy_speed(backend)?, product: product_speed(backend)? })
    }

    /// Milliseconds that something takes at least.
    pub fn floor_ms(&self, bytes: u64, flops: u64) -> f64 {
        (bytes as f64 / self.copy).max(flops as f64 / self.product) * 1e3
    }
}

/// The fastest of some repetitions, after one that does not count.
fn fastest<B: Profiled>(backend: &B, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut best = f64::INFINITY;
    for _ in 0..REPETITIONS {
        best = best.min(backend.milliseconds(&mut work)?);
    }
    Ok(best)
}

fn copy_speed<B: Profiled>(backend: &B) -> Result<f64> {
    let len = backend.copy_len();
    let (mut to, mut from) = (backend.allocate::<f32>(len)?, backend.allocate::<f32>(len)?);
    // Pages that were never written are all the same one.
    let values = vec![1.0f32; len.min(1 << 20)];
    for offset in (0..len).step_by(values.len().max(1)) {
        let part = &values[..values.len().min(len - offset)];
        backend.upload(&mut from, offset, part)?;
        backend.upload(&mut to, offset, part)?;
    }
    let milliseconds = fastest(backend, || backend.copy(&mut to, &from))?;
    Ok(2.0 * (len * size_of::<f32>()) as f64 / milliseconds * 1e3)
}

fn product_speed<B: Profiled>(backend: &B) -> Result<f64> {
    let [rows, inputs, outputs] = backend.product_size();
    let mut model = Model::new(Box::new(Linear::new(outputs).without_bias()), Loss::MeanSquaredError);
    let program: Program<B> = model.plan(&Input::Real(vec![inputs]), rows, Mode::Inference)?;
    let (mut arena, mut activations) = (model.arena(backend, 1, 0)?, program.activations(backend)?);
    let random = Philox::new(1, Purpose::Sampling, 0);
    let values: Vec<B::Storage> =
        (0..inputs as u64).map(|at| B::Storage::from_f32(2.0 * random.uniform(at) - 1.0)).collect();
    if let Value::Real(input) = program.input {
        for start in activations.range(input).step_by(inputs) {
            backend.upload(&mut activations.values, start, &values)?;
        }
    }
    let mut memory = Memory { arena: &mut arena, activations: &mut activations };
    let mut work = || backend.run(&program.ops, &mut memory, &StepContext::default());
    work()?;
    Ok(program.flops() as f64 / fastest(backend, work)? * 1e3)
}

/// Times the operations of a model in training, for some micro-batches.
pub struct Profile<B: Profiled> {
    backend: B,
    speed: Speed,
    log: Arc<Mutex<Log>>,
}

/// What is known so far.
#[derive(Default)]
struct Log {
    /// How many micro-batches are to be counted.
    wanted: u64,
    /// How many were begun, warm-up included.
    begun: u64,
    over: bool,
    costs: Vec<OpCost>,
    update_bytes: u64,
    accumulate: u32,
    /// Milliseconds of each operation, on a host.
    times: BTreeMap<&'static str, f64>,
    kernels: Vec<KernelTime>,
    since: Option<Instant>,
    last: Option<Instant>,
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    // A thread that panicked within an operation left sums behind that are whole.
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    fn counts(&self) -> bool {
        self.begun > WARM_UP && !self.over
    }

    /// A micro-batch begins.
    fn turn<B: Profiled>(&mut self, backend: &B) -> Result<()> {
        self.begun += 1;
        if self.begun == WARM_UP + 1 {
            backend.start_timing();
            self.since = Some(Instant::now());
        } else if self.begun > WARM_UP + self.wanted {
            self.begun -= 1;
            self.last = Some(Instant::now());
            self.finish(backend)?;
        }
        Ok(())
    }

    fn finish<B: Profiled>(&mut self, backend: &B) -> Result<()> {
        if !self.over {
            self.over = true;
            self.kernels = backend.finish_timing()?;
        }
        Ok(())
    }
}

impl<B: Profiled> Profile<B> {
    /// Measures the device's speed, and times the next `micro_batches` micro-batches of the model, after a few that warm it up.
    ///
    /// # Errors
    /// Not enough memory, or a device that failed.
    pub fn new(backend: &B, model: &mut Model<B>, optimizer: &OptimizerOptions, micro_batches: u64) -> Result<Self> {
        let speed = Speed::measure(backend)?;
        let log = Arc::new(Mutex::new(Log { wanted: micro_batches.max(1), accumulate: 1, ..Log::default() }));
        let (shared, optimizer) = (Arc::clone(&log), optimizer.clone());
        model.after_planning(move |program, mode, parameters| {
            let training = mode == Mode::Training;
            if training {
                let (layout, _) = parameters.layout()?;
                let plan = UpdatePlan::new(&optimizer, &layout)?;
                let mut log = lock(&shared);
                log.costs = program.costs(parameters)?;
                let copy = if size_of::<B::Storage>() < size_of::<B::Real>() { size_of::<B::Storage>() } else { 0 };
                log.update_bytes = update_bytes(&plan, layout.parameters(), copy);
            }
            let ops = std::mem::take(&mut program.ops).into_iter().enumerate();
            let clocked = |(index, op): (usize, Box<dyn Op<B>>)| -> Box<dyn Op<B>> {
                Box::new(Clocked { op, log: Arc::clone(&shared), training, first: training && index == 0 })
            };
            program.ops = ops.map(clocked).collect();
            Ok(())
        });
        // From the start, so that nothing is recorded that would then hide the operations.
        backend.start_timing();
        Ok(Profile { backend: backend.clone(), speed, log })
    }

    /// Says how many micro-batches an update takes (1 where this is not called).
    pub fn accumulating(self, micro_batches: u32) -> Self {
        lock(&self.log).accumulate = micro_batches.max(1);
        self
    }

    /// What was found, up to now where not all micro-batches have been seen.
    ///
    /// # Errors
    /// Fewer micro-batches than the warm-up takes, or a device that failed.
    pub fn table(&self) -> Result<Table> {
        let mut log = lock(&self.log);
        log.finish(&self.backend)?;
        let Some(counted) = log.begun.checked_sub(WARM_UP).filter(|&counted| counted > 0) else {
            return Err(Error::config(
                "--profile",
                format!("found {} micro-batches, expected more than the {WARM_UP} that warm the device up", log.begun),
            ));
        };
        let wall_ms = match (log.since, log.last) {
            (Some(since), Some(last)) => last.duration_since(since).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        let mut table = Table::new(self.backend.description(), self.speed, counted, wall_ms);
        table.add_operations(&log.costs, &log.times, &log.kernels);
        table.add_update(log.update_bytes, counted / u64::from(log.accumulate), &log.kernels);
        table.sort();
        Ok(table)
    }
}

/// Bytes that an update must move: the gradient twice where its norm is clipped, parameters and slots read and written, a copy
/// of `copy` bytes a value written.
pub fn update_bytes(plan: &UpdatePlan, parameters: usize, copy: usize) -> u64 {
    let real = size_of::<f32>();
    let gradient = if plan.clip.norm == NormClip::Off { real } else { 2 * real };
    (parameters * (gradient + 2 * real + 2 * real * plan.slots.len() + copy)) as u64
}

/// An operation with a clock around it.
struct Clocked<B: Profiled> {
    op: Box<dyn Op<B>>,
    log: Arc<Mutex<Log>>,
    training: bool,
    /// Whether it begins a micro-batch.
    first: bool,
}

impl<B: Profiled> Op<B> for Clocked<B> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.op.uses(visit);
    }

    fn flops(&self) -> u64 {
        self.op.flops()
    }

    fn repeated_flops(&self) -> u64 {
        self.op.repeated_flops()
    }

    fn moved(&self, used: Use) -> Option<usize> {
        self.op.moved(used)
    }

    fn as_any(&self) -> Option<&dyn Any> {
        self.op.as_any()
    }

    fn run(&self, backend: &B, memory: &mut Memory<'_, B>, step: &StepContext) -> Result<()> {
        if self.first {
            let mut log = lock(&self.log);
            if !log.over {
                log.turn(backend)?;
            }
        }
        if lock(&self.log).over {
            return self.op.run(backend, memory, step);
        }
        let name = if self.training { self.name() } else { EVALUATION };
        let milliseconds = backend.within(name, &mut || self.op.run(backend, memory, step))?;
        let mut log = lock(&self.log);
        if self.training && log.counts() {
            *log.times.entry(name).or_default() += milliseconds.unwrap_or(0.0);
            log.last = Some(Instant::now());
        }
        Ok(())
    }
}
