//! Whole training steps: forward, loss, backward, clip, update.

use std::collections::BTreeMap;

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
use crate::backend::{Activations, Arena, Memory, StepContext};
use crate::data::{Picked, Table};
use crate::error::Result;
use crate::model::{Mode, Program};
use crate::optim::{StepParams, UpdatePlan};
use crate::real::Element;
use crate::train::memory::{RunMemory, Wanted};
use crate::train::step::{StepReport, Trainer, TrainerParts};

/// Floating-point operations of a step that its twin in f64 does too; a longer one is looked at without.
const TWIN_FLOPS: u64 = 20_000_000_000;
/// The learning rate: so small that thousands of steps on the same few batches do not learn them by heart, which would leave
/// gradients of nothing but rounding.
const LEARNING_RATE: f64 = 1e-4;
/// Parameters that are looked at, where there is no twin.
const SAMPLE: usize = 1 << 12;

/// A model in training.
pub struct StepTask<B: Bed> {
    trainer: Trainer<B>,
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
        let trainer = trainer(backend.clone(), work)?;
        let twin = (trainer.program().flops() <= TWIN_FLOPS).then(|| trainer_of_twin(work)).transpose()?;
        Ok(StepTask {
            trainer,
            batches: samples::batches(work)?,
            queued: 0,
            done: 0,
            skipped: 0,
            last: None,
            twin,
            expected: Expected::default(),
        })
    }

    /// Trained parameters.
    pub fn parameters(&self) -> usize {
        self.trainer.arena().layout.parameters()
    }

    fn batch(&self) -> &Picked {
        &self.batches[(self.queued % self.batches.len() as u64) as usize]
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
}

fn trainer<B: Bed>(backend: B, work: &Training) -> Result<Trainer<B>> {
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

fn trainer_of_twin(work: &Training) -> Result<Trainer<Cpu<f64>>> {
    trainer(Cpu::<f64>::new(), work)
}

impl<B: Bed> Task for StepTask<B> {
    fn run(&mut self) -> Result<()> {
        let batch = &self.batches[(self.queued % self.batches.len() as u64) as usize];
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
        self.expected.values = Some([report.loss, report.outcome.grad_norm]);
        self.twin = Some(twin);
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
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
        // Those of the model alone, whatever is computed again: so the share of the floor is the model's FLOP utilization.
        let (flops, amount) = (task.trainer.program().model_flops() as f64, work.amount());
        let limit = |_: Option<&_>| {
            let seconds = flops / speeds.product;
            let what = format!("its {:.3} GFLOP at this run's fastest product, {}", flops / 1e9, speeds.product_text());
            let floor = Floor { seconds, what, doubt: speeds.product_doubt.clone() };
            // Of a network of convolutions, most may do with fewer operations than are counted.
            let fewer = if model.contains("cnn") || model.contains("resnet") { WINOGRAD } else { 1.0 };
            let least = flops / speeds.fastest_product / fewer;
            Some(Limit { floor, passable: fewer, least, from_memory: false })
        };
        let asked = Asked {
            figure: Figure {
                suite: "step".to_owned(),
                name,
                amount,
                flops: Some(flops),
                memory_bytes: Some(memory(backend, &work, task.batch().table())? as u64),
                work: Some(work.work(task.parameters(), precision, threads(backend))),
                ..Figure::default()
            },
            limit: &limit,
        };
        let mut figure = measure(ground, settings, &mut task, None, asked)?;
        let batch = task.batch().clone();
        drop(task);
        figure.parts = Pieces::new(backend, &work, batch)?.shares(ground, settings.seconds / 4.0)?;
        told(figure)?;
    }
    Ok(())
}

/// Bytes that a run of this plans.
fn memory<B: Bed>(_: &B, work: &Training, table: &Table) -> Result<usize> {
    let wanted = Wanted {
        input: work.input.clone(),
        batch_size: work.batch,
        left: None,
        evaluations: Vec::new(),
        optimizer: &work.optimizer,
        average: false,
        share: None,
    };
    Ok(RunMemory::plan::<B>(&mut work.model()?, &wanted)?.1.with_table::<B>(table).total())
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
