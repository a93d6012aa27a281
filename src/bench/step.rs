//! Whole training steps: forward, loss, backward, clip, update.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::layers::WINOGRAD;
use super::measure::{Asked, Ground, Limit, Settings, Task, measure, spread};
use super::place::Bed;
use super::results::{Figure, Floor};
use super::samples;
use super::speeds::Speeds;
use super::works::{MODELS, Training, threads, training};
use crate::backend::cpu::Cpu;
use crate::backend::profile::Kind;
use crate::backend::step::{Gather, Room};
use crate::backend::{Activations, Alone, Arena, Backend, Memory, StepContext};
use crate::data::{Picked, Table};
use crate::error::Result;
use crate::model::{Mode, Program};
use crate::optim::{StepParams, UpdatePlan};
use crate::parallel::{Collective, GradientsOptions, ParallelOptions, gather};
use crate::plan::Share;
use crate::real::Element;
use crate::train::memory::{RunMemory, Wanted};
use crate::train::sharing::exchange;
use crate::train::step::{StepReport, Trainer, TrainerParts};

/// What results call these figures.
pub const SUITE: &str = "step";
/// Floating-point operations of a step that its twin in f64 does too; a longer one is looked at without.
const TWIN_FLOPS: u64 = 20_000_000_000;
/// The learning rate: so small that thousands of steps on the same few batches do not learn them by heart, which would leave
/// gradients of nothing but rounding.
const LEARNING_RATE: f64 = 1e-4;
/// Parameters that are looked at, where there is no twin.
const SAMPLE: usize = 1 << 12;

/// A model in training, by one process or by several, each with batches of its own.
pub struct StepTask<B: Bed> {
    trainer: Trainer<B>,
    /// The processes that make each step together; this one alone where there are none.
    team: Option<Arc<dyn Collective>>,
    /// Given in turn, as training gives them where the data set lies on the device.
    batches: Vec<Picked>,
    queued: u64,
    done: u64,
    skipped: u64,
    last: Option<StepReport>,
    twin: Option<Trainer<Cpu<f64>>>,
    expected: Expected,
}

/// What the next step should find.
#[derive(Default)]
struct Expected {
    /// Steps done after it.
    steps: u64,
    /// Loss and norm, by the twin.
    values: Option<[f64; 2]>,
    /// The first parameters before it.
    parameters: Vec<f32>,
}

impl<B: Bed> StepTask<B> {
    /// Takes all memory and draws the batches.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(backend: &B, work: &Training) -> Result<Self> {
        Self::of(new_trainer(backend.clone(), work)?, None, work)
    }

    fn of(trainer: Trainer<B>, team: Option<Arc<dyn Collective>>, work: &Training) -> Result<Self> {
        let twin = || {
            let twin = new_trainer(Cpu::<f64>::new(), work)?;
            Ok(match &team {
                // What is left out by chance depends on which part of the batch it is.
                Some(team) => twin.sharing(Share::of_rank(team.rank(), team.world()), Box::new(Alone)),
                None => twin,
            })
        };
        Ok(StepTask {
            twin: (trainer.program().flops() <= TWIN_FLOPS).then(twin).transpose()?,
            trainer,
            team,
            batches: samples::batches(work)?,
            queued: 0,
            done: 0,
            skipped: 0,
            last: None,
            expected: Expected::default(),
        })
    }

    /// Trained parameters.
    pub fn parameters(&self) -> usize {
        self.trainer.arena().layout.parameters()
    }

    /// The number of this process, and how many there are.
    fn place(&self) -> (usize, usize) {
        self.team.as_ref().map_or((0, 1), |team| (team.rank(), team.world()))
    }

    /// The batch that a process trains on in the next step: no two of them on the same, but where there are fewer than processes.
    fn batch_of(&self, rank: usize) -> usize {
        let number = self.queued * self.place().1 as u64 + rank as u64;
        (number % self.batches.len() as u64) as usize
    }

    /// What this process trains on in the next step.
    pub(super) fn batch(&self) -> &Picked {
        &self.batches[self.batch_of(self.place().0)]
    }

    /// Floating-point operations of this process's part of a step: those of the model, whatever is computed again.
    pub(super) fn model_flops(&self) -> f64 {
        self.trainer.program().model_flops() as f64
    }

    fn take(&mut self, wait: bool) -> Result<()> {
        while let Some(report) = self.trainer.finished(wait)? {
            self.done += 1;
            self.skipped += u64::from(report.outcome.skipped);
            self.last = Some(report);
        }
        Ok(())
    }

    fn parameters_now(&self, len: usize) -> Result<Vec<f32>> {
        let arena = self.trainer.arena();
        let mut values = vec![B::Real::default(); len.min(arena.layout.padded_len())];
        self.trainer.backend().download(&arena.parameters, 0, &mut values)?;
        Ok(values.into_iter().map(Element::f32).collect())
    }

    /// What is wrong with what this process found of the step that [`Task::prepare`] was for.
    fn wrong(&mut self) -> Result<Option<String>> {
        self.take(true)?;
        let Expected { steps, values, parameters } = &self.expected;
        if self.done != *steps || self.done != self.queued {
            return Ok(Some(format!("{} steps were queued and {} finished, expected {steps}", self.queued, self.done)));
        }
        let Some(report) = &self.last else { return Ok(Some("the last step left no report".to_owned())) };
        let [loss, norm] = [report.loss, report.outcome.grad_norm];
        if report.outcome.skipped && B::Storage::NAME != "f16" {
            return Ok(Some("the update was skipped, since a gradient was not finite".to_owned()));
        }
        if let Some([expected_loss, expected_norm]) = *values {
            let [of_loss, of_norm] = tolerances(self.trainer.backend());
            let off = |found: f64, expected: f64, by: f64| (found - expected).abs() > by * (expected.abs() + 1e-3);
            // An update that f16 skipped to find its loss scale has no norm.
            let skipped = report.outcome.skipped;
            return Ok((off(loss, expected_loss, of_loss) || (!skipped && off(norm, expected_norm, of_norm))).then(
                || format!("loss {loss} and gradient norm {norm}, its twin in f64 {expected_loss} and {expected_norm}"),
            ));
        }
        let now = self.parameters_now(SAMPLE)?;
        let moved = now.iter().zip(parameters).filter(|(now, before)| now != before).count();
        Ok((!loss.is_finite() || (moved == 0 && !report.outcome.skipped))
            .then(|| format!("loss {loss}, and {moved} of {} parameters moved", now.len())))
    }
}

impl<B: Bed + Backend<Real = f32>> StepTask<B> {
    /// As [`StepTask::new`], as one of several processes that make each step together: a batch of `work` each, gradients summed
    /// while the backward goes on.
    ///
    /// # Errors
    /// Not enough memory, or a thread that cannot be started.
    pub fn together(backend: &B, work: &Training, team: &Arc<dyn Collective>) -> Result<Self> {
        let ParallelOptions { wire, overlap, .. } = ParallelOptions::default();
        let share = Share::of_rank(team.rank(), team.world());
        let trainer = new_trainer(backend.clone(), work)?;
        let options = GradientsOptions { share, wire, overlap };
        let exchange = exchange(&trainer, options, team, ParallelOptions::default().bucket_elements())?;
        Self::of(trainer.sharing(share, exchange), Some(Arc::clone(team)), work)
    }
}

fn new_trainer<B: Bed>(backend: B, work: &Training) -> Result<Trainer<B>> {
    Trainer::new(TrainerParts {
        backend,
        model: work.model()?,
        input: work.input.clone(),
        batch_size: work.batch,
        accumulate: 1,
        optimizer: &work.optimizer,
        ema: None,
        seed: 1,
    })
}

/// Loss and gradient norm of a step of all processes, out of this one's loss and gradients.
fn of_all(team: &dyn Collective, loss: f64, gradients: &[f64]) -> Result<[f64; 2]> {
    let own: Vec<f64> = std::iter::once(loss).chain(gradients.iter().copied()).collect();
    let mut sums = vec![0.0; own.len()];
    for bytes in gather(team, bytemuck::cast_slice(&own))? {
        let found = bytemuck::pod_collect_to_vec::<u8, f64>(&bytes);
        sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += found / team.world() as f64);
    }
    Ok([sums[0], sums[1..].iter().map(|gradient| gradient * gradient).sum::<f64>().sqrt()])
}

impl<B: Bed> Task for StepTask<B> {
    fn run(&mut self) -> Result<()> {
        let batch = &self.batches[self.batch_of(self.place().0)];
        self.trainer.queue(batch, Some(LEARNING_RATE))?;
        self.queued += 1;
        self.take(false)
    }

    fn finish(&mut self) -> Result<()> {
        self.take(true)
    }

    fn sets(&self) -> usize {
        B::INPUT_SLOTS
    }

    fn round_bytes(&self) -> usize {
        let parts = self.trainer.program().activation_parts(B::INPUT_SLOTS);
        parts.total() + 3 * 4 * self.parameters()
    }

    fn prepare(&mut self) -> Result<()> {
        self.take(true)?;
        self.last = None;
        self.expected = Expected { steps: self.queued + 1, ..Expected::default() };
        let Some(mut twin) = self.twin.take() else {
            self.expected.parameters = self.parameters_now(SAMPLE)?;
            return Ok(());
        };
        let now = self.parameters_now(usize::MAX)?;
        twin.arena_mut().parameters.iter_mut().zip(now).for_each(|(to, from)| *to = f64::from(from));
        twin.set_counters(self.trainer.counters());
        let report = twin.step(std::slice::from_ref(self.batch()), LEARNING_RATE)?;
        self.expected.values = Some(match &self.team {
            Some(team) => of_all(&**team, report.loss, &twin.arena().gradients)?,
            None => [report.loss, report.outcome.grad_norm],
        });
        self.twin = Some(twin);
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        let own = self.wrong()?;
        let Some(team) = &self.team else { return Ok(own) };
        // What one of them sees, all refuse.
        let all = gather(&**team, own.unwrap_or_default().as_bytes())?;
        let wrong = all.iter().enumerate().find(|(_, told)| !told.is_empty());
        Ok(wrong.map(|(rank, told)| format!("rank {rank}: {}", String::from_utf8_lossy(told))))
    }
}

/// How far loss and norm may be from those in f64.
fn tolerances<B: Bed>(backend: &B) -> [f64; 2] {
    match B::Storage::NAME {
        "f32" if backend.product_bits() >= 23 => [1e-4, 1e-3],
        "f32" => [1e-2, 3e-2],
        _ => [3e-2, 1e-1],
    }
}

/// The figures of the suite.
///
/// # Errors
/// What a step reports.
pub fn figures<B: Bed>(
    backend: &B,
    ground: &dyn Ground,
    settings: &Settings,
    speeds: &Speeds,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let precision = speeds.precision.name();
    for model in MODELS {
        let name = if backend.kind() == Kind::Host { model.to_owned() } else { format!("{model}/{precision}") };
        if !wanted(&name) {
            continue;
        }
        let work = training(backend, model)?;
        let mut task = StepTask::new(backend, &work)?;
        let flops = task.model_flops();
        let limit = |_: Option<&_>| Some(limit(model, flops, speeds));
        let asked = Asked {
            figure: Figure {
                suite: SUITE.to_owned(),
                name,
                amount: work.amount(),
                flops: Some(flops),
                memory_bytes: Some(memory(backend, &work, task.batch().table(), [0, 1])? as u64),
                work: Some(work.work(task.parameters(), precision, threads(backend))),
                ..Figure::default()
            },
            limit: &limit,
        };
        let mut figure = measure(ground, settings, &mut task, None, asked)?;
        let batch = task.batch().clone();
        drop(task);
        figure.parts = shares(backend, &work, batch, ground, settings.seconds / 4.0)?;
        told(figure)?;
    }
    Ok(())
}

/// What a step of a model, of so many operations, is held to. They are those of the model alone, whatever is computed again: so the
/// share of the floor is the model's FLOP utilization.
pub(super) fn limit(model: &str, flops: f64, speeds: &Speeds) -> Limit {
    let seconds = flops / speeds.product;
    let what = format!("its {:.3} GFLOP at this run's fastest product, {}", flops / 1e9, speeds.product_text());
    let floor = Floor { seconds, what, doubt: speeds.product_doubt.clone() };
    // Of a network of convolutions, most may do with fewer operations than are counted.
    let fewer = if model.contains("cnn") || model.contains("resnet") { WINOGRAD } else { 1.0 };
    Limit { floor, passable: fewer, least: flops / speeds.fastest_product / fewer, from_memory: false }
}

/// Bytes that a run of this plans in a process, by its number and that of all.
pub(super) fn memory<B: Bed>(backend: &B, work: &Training, table: &Table, [rank, world]: [usize; 2]) -> Result<usize> {
    let share = Share::of_rank(rank, world);
    let sharding = || ParallelOptions::default().sharding((rank, world), &share, 1);
    let wanted = Wanted {
        input: work.input.clone(),
        batch_size: work.batch,
        left: None,
        evaluations: Vec::new(),
        optimizer: &work.optimizer,
        average: false,
        share: (world > 1).then(|| (share, sharding())),
    };
    Ok(RunMemory::plan_on(&mut work.model()?, &wanted, Some(backend))?.1.with_table::<B>(table).total())
}

/// The share of each part of a step, by the medians of its times, for about so many seconds.
pub(super) fn shares<B: Bed>(
    backend: &B,
    work: &Training,
    batch: Picked,
    ground: &dyn Ground,
    seconds: f64,
) -> Result<BTreeMap<String, f64>> {
    Pieces::new(backend, work, batch)?.shares(ground, seconds)
}

/// A step in pieces, each timed alone.
struct Pieces<'a, B: Bed> {
    backend: &'a B,
    program: Program<B>,
    plan: UpdatePlan,
    arena: Arena<B>,
    activations: Activations<B>,
    batch: Picked,
    steps: u64,
}

impl<'a, B: Bed> Pieces<'a, B> {
    fn new(backend: &'a B, work: &Training, batch: Picked) -> Result<Self> {
        let mut model = work.model()?;
        let program = model.plan(&work.input, work.batch, Mode::Training)?;
        let (layout, _) = model.parameters().layout()?;
        let plan = UpdatePlan::new(&work.optimizer, &layout)?;
        let arena = model.arena(backend, 1, plan.slots.len())?;
        let activations = program.activations(backend)?;
        Ok(Pieces { backend, program, plan, arena, activations, batch, steps: 0 })
    }

    /// A batch brought to where the program reads it.
    fn data(&mut self) -> Result<()> {
        let (input, target) = (self.program.input.into(), self.program.target.map(Room::from));
        self.backend.gather(&mut self.activations, &Gather { picked: &self.batch, input, target })
    }

    fn ops(&mut self, backward: bool) -> Result<()> {
        let (forward, back) = self.program.ops.split_at(self.program.forward_ops);
        let mut memory = Memory { arena: &mut self.arena, activations: &mut self.activations };
        self.backend.run(if backward { back } else { forward }, &mut memory, &StepContext::default())
    }

    fn update(&mut self) -> Result<()> {
        self.steps += 1;
        let params = StepParams { learning_rate: 1e-6, step: self.steps, divisor: 1.0, zero_gradients: false };
        self.backend.update(&mut self.arena, &self.plan, &params).map(drop)
    }

    /// The share of each part, by the medians of its times, for about so many seconds.
    fn shares(mut self, ground: &dyn Ground, seconds: f64) -> Result<BTreeMap<String, f64>> {
        let mut times: [Vec<f64>; 4] = Default::default();
        let began = ground.now();
        while times[0].len() < 3 || (ground.now() - began < seconds && !ground.is_over()) {
            for (part, times) in times.iter_mut().enumerate() {
                let from = ground.now();
                match part {
                    0 => self.data()?,
                    1 => self.ops(false)?,
                    2 => self.ops(true)?,
                    _ => self.update()?,
                }
                ground.wait()?;
                times.push(ground.now() - from);
            }
        }
        // The first of each loads kernels, the second is recorded.
        let medians = times.map(|times| spread(&times[times.len().min(3) - 1..]).median);
        let all: f64 = medians.iter().sum();
        let names = ["data", "forward", "backward", "update"];
        Ok(names.into_iter().zip(medians).map(|(name, median)| (name.to_owned(), median / all)).collect())
    }
}
