//! The update alone, in turn with a plain pass through memory: a copy, or one in place where that is faster.

use super::device::TrafficTask;
use super::measure::{Asked, Ground, Limit, Settings, Task, measure};
use super::place::{Bed, Place};
use super::results::{Figure, Floor, Spread};
use super::speeds::{Speeds, words};
use super::works::{USUAL, USUAL_ON_GPUS, Updating, clips, rules, threads};
use crate::backend::Arena;
use crate::backend::cpu;
use crate::backend::profile::Kind;
use crate::backend::step::{UpdateWork, Work};
use crate::error::{Error, Result};
use crate::optim::{Clip, NormClip, Rule, StepOutcome, StepParams, UpdatePlan};
use crate::plan::{ParamLayout, ParamSpec};
use crate::random::{Philox, Purpose};
use crate::real::Element;
use crate::train::profile::update_bytes;

/// How far the way that parameters went may differ from that of their twin in f64, as a share of it.
const TOLERANCE: f64 = 0.02;
/// The same where parameters are rounded to 16 bits.
const TOLERANCE_ALONE: f64 = 0.1;

/// An arena, and its updates in flight.
struct Set<B: Bed> {
    /// Names memory of the arena, and goes before it.
    queue: B::Queue,
    arena: Arena<B>,
    steps: u64,
    done: u64,
    last: Option<StepOutcome>,
}

/// The tensor that is looked at.
struct Looked {
    tensor: usize,
    before: Vec<f64>,
    expected: Vec<f64>,
    steps: u64,
}

/// Updates of random parameters by random gradients.
pub struct UpdateTask<B: Bed> {
    backend: B,
    sets: Vec<Set<B>>,
    next: usize,
    /// The device's recordings know it by where it lies.
    plan: Box<UpdatePlan>,
    work: Updating,
    shapes: Vec<Vec<usize>>,
    /// The norm of all gradients, after a value clip.
    norm: f64,
    looked: Option<Looked>,
    looks: u64,
}

impl<B: Bed> UpdateTask<B> {
    /// Takes the memory of so many arenas that they pass by the caches together, and fills it with random values.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(backend: &B, work: &Updating) -> Result<Self> {
        let layout = layout(work)?;
        let plan = UpdatePlan::new(&work.optimizer, &layout)?;
        let plan = Box::new(UpdatePlan { rounding: work.alone.then_some(1), ..plan });
        let bytes = layout.padded_len() * size_of::<f32>() * (2 + plan.slots.len());
        let count = (5 * backend.cache_bytes() / 2).div_ceil(bytes).max(1);
        let mut filler = Filler::new(layout.padded_len(), work.optimizer.clip.value);
        let sets = (0..count).map(|_| filler.set(backend, &layout, &plan, work.alone)).collect::<Result<Vec<_>>>()?;
        Ok(UpdateTask {
            backend: backend.clone(),
            sets,
            next: 0,
            plan,
            work: work.clone(),
            shapes: work.shapes(),
            norm: (filler.squares / count as f64).sqrt(),
            looked: None,
            looks: 0,
        })
    }

    /// Bytes that an update has to move, and its floating-point operations where it multiplies matrices.
    pub fn cost(&self) -> (f64, f64) {
        cost::<B>(&self.work, &self.plan)
    }

    /// The same, without the memory.
    ///
    /// # Errors
    /// Options that do not validate.
    pub fn cost_of(work: &Updating) -> Result<(f64, f64)> {
        Ok(cost::<B>(work, &UpdatePlan::new(&work.optimizer, &layout(work)?)?))
    }

    fn take(&mut self, wait: bool) -> Result<()> {
        for set in &mut self.sets {
            while let Some(finished) = self.backend.finished(&mut set.queue, wait)? {
                set.done += 1;
                set.last = finished.outcome;
            }
        }
        Ok(())
    }

    fn params(&self) -> StepParams {
        let step = self.sets[self.next].steps + 1;
        StepParams { learning_rate: self.work.optimizer.learning_rate, step, divisor: 1.0, zero_gradients: false }
    }

    /// A tensor's parameters.
    fn parameters(&self, set: usize, tensor: usize) -> Result<Vec<f64>> {
        let arena = &self.sets[set].arena;
        let range = arena.layout.entries()[tensor].range();
        if self.work.alone {
            return wide::<B, _>(&self.backend, &arena.stored, range);
        }
        wide::<B, _>(&self.backend, &arena.parameters, range)
    }

    /// What the next update makes of a tensor, in f64.
    fn expected(&self, tensor: usize, before: &[f64]) -> Result<Vec<f64>> {
        let (set, shape) = (&self.sets[self.next], self.shapes[tensor].clone());
        let range = set.arena.layout.entries()[tensor].range();
        let layout = ParamLayout::new(&[ParamSpec { name: "0.weight".to_owned(), shape }])?;
        let mut options = self.work.optimizer.clone();
        let mut params = self.params();
        if let NormClip::Global { .. } = options.clip.norm {
            // One tensor does not know the norm of all.
            params.divisor /= options.clip.coefficient(self.norm);
            options.clip = Clip::default();
        }
        let plan = UpdatePlan::new(&options, &layout)?;
        let padded = |mut values: Vec<f64>| {
            values.resize(layout.padded_len(), 0.0);
            values
        };
        let mut theta = padded(before.to_vec());
        let mut gradient = padded(wide::<B, _>(&self.backend, &set.arena.gradients, range.clone())?);
        let mut slots = Vec::new();
        for slot in &set.arena.slots {
            slots.push(padded(wide::<B, _>(&self.backend, slot, range.clone())?));
        }
        let mut slots: Vec<&mut [f64]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
        cpu::update(&mut theta, &mut gradient, &mut slots, &plan, &params)?;
        theta.truncate(before.len());
        Ok(theta)
    }
}

/// The layout of an update's tensors.
fn layout(work: &Updating) -> Result<ParamLayout> {
    let named = |(number, shape)| ParamSpec { name: format!("{number}.weight"), shape };
    ParamLayout::new(&work.shapes().into_iter().enumerate().map(named).collect::<Vec<_>>())
}

/// Bytes that an update has to move, and the operations of its products.
fn cost<B: Bed>(work: &Updating, plan: &UpdatePlan) -> (f64, f64) {
    let Updating { parameters, alone, .. } = *work;
    let (real, storage) = (size_of::<f32>(), size_of::<B::Storage>());
    let copy = if storage < real && !alone { storage } else { 0 };
    let mut bytes = update_bytes(plan, parameters, copy);
    if alone {
        bytes -= (2 * (real - storage) * parameters) as u64;
    }
    let again = match work.optimizer.rule {
        // The norms of weights and gradients come before the update, that of Adam's direction after its moments.
        Rule::Lars { .. } => 2 * real,
        Rule::Lamb { .. } => 3 * real,
        _ => 0,
    };
    let flops = match work.optimizer.rule {
        Rule::Muon { steps, .. } => work.shapes().iter().map(|shape| f64::from(steps) * iteration(shape)).sum(),
        _ => 0.0,
    };
    ((bytes + (again * parameters) as u64) as f64, flops)
}

/// Operations of an iteration of Newton and Schulz for a matrix: three products along its smaller side.
fn iteration(shape: &[usize]) -> f64 {
    let [rows, columns] = [shape[0], shape.get(1).copied().unwrap_or(1)].map(|side| side as f64);
    let (small, large) = (rows.min(columns), rows.max(columns));
    2.0 * small * small * (2.0 * large + small)
}

fn wide<B: Bed, T: Element>(backend: &B, buffer: &B::Buffer<T>, range: std::ops::Range<usize>) -> Result<Vec<f64>> {
    let mut values = vec![T::default(); range.len()];
    backend.download(buffer, range.start, &mut values)?;
    Ok(values.into_iter().map(Element::f64).collect())
}

/// Random values for arenas: a tile of them, from another place on for each tensor.
struct Filler {
    tile: Vec<f32>,
    at: usize,
    bound: f32,
    /// The sum of squares of all gradients so far, after the value clip.
    squares: f64,
}

impl Filler {
    fn new(most: usize, bound: Option<f64>) -> Self {
        let stream = Philox::new(1, Purpose::Sampling, 0);
        let len = most.min(1 << 20) as u64;
        let tile = (0..len).map(|at| 2.0 * stream.uniform(at) - 1.0).collect();
        Filler { tile, at: 0, bound: bound.map_or(f32::INFINITY, |bound| bound as f32), squares: 0.0 }
    }

    /// The next values, in `[-scale, scale)`.
    fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        self.at = (self.at + 7919) % self.tile.len();
        self.tile.iter().cycle().skip(self.at).take(len).map(|value| value * scale).collect()
    }

    fn set<B: Bed>(&mut self, backend: &B, layout: &ParamLayout, plan: &UpdatePlan, alone: bool) -> Result<Set<B>> {
        let len = layout.padded_len();
        let one_type = size_of::<B::Storage>() == size_of::<B::Real>();
        if alone && one_type {
            return Err(Error::config("bench", "found parameters in 16 bits alone, on a device that stores 32"));
        }
        let mut arena: Arena<B> = Arena {
            layout: layout.clone(),
            ranges: layout.entries().iter().map(|entry| entry.range()).collect(),
            parameters: backend.allocate(if alone { 0 } else { len })?,
            stored: backend.allocate(if one_type { 0 } else { len })?,
            gradients: backend.allocate(len)?,
            slots: plan.slots.iter().map(|_| backend.allocate(len)).collect::<Result<_>>()?,
            state_layout: ParamLayout::default(),
            state: backend.allocate(0)?,
            held: None,
            prepared: B::Prepared::default(),
        };
        for entry in layout.entries() {
            let theta = self.values(entry.len, 0.1);
            if alone {
                let theta: Vec<B::Storage> = theta.into_iter().map(B::Storage::from_f32).collect();
                backend.upload(&mut arena.stored, entry.offset, &theta)?;
            } else {
                let theta: Vec<B::Real> = theta.into_iter().map(B::Real::from_f32).collect();
                backend.upload(&mut arena.parameters, entry.offset, &theta)?;
            }
            let gradient = self.values(entry.len, 1.0);
            self.squares += gradient.iter().map(|g| f64::from(g.clamp(-self.bound, self.bound)).powi(2)).sum::<f64>();
            let gradient: Vec<B::Real> = gradient.into_iter().map(B::Real::from_f32).collect();
            backend.upload(&mut arena.gradients, entry.offset, &gradient)?;
            // Pages that were never written are all the same one.
            for slot in &mut arena.slots {
                let values: Vec<B::Real> =
                    self.values(entry.len, 1e-3).into_iter().map(|value| B::Real::from_f32(value.abs())).collect();
                backend.upload(slot, entry.offset, &values)?;
            }
        }
        backend.parameters_changed(&mut arena)?;
        Ok(Set { queue: B::Queue::default(), arena, steps: 0, done: 0, last: None })
    }
}

impl<B: Bed> Task for UpdateTask<B> {
    fn run(&mut self) -> Result<()> {
        let params = self.params();
        let set = &mut self.sets[self.next];
        let update = Some(UpdateWork { plan: &self.plan, params, average: None });
        self.backend.submit(&mut set.queue, Work { arena: &mut set.arena, pass: None, turn: None, update })?;
        set.steps += 1;
        self.next = (self.next + 1) % self.sets.len();
        self.take(false)
    }

    fn finish(&mut self) -> Result<()> {
        self.take(true)
    }

    fn sets(&self) -> usize {
        // Each has two slots in which steps are recorded.
        2 * self.sets.len()
    }

    fn round_bytes(&self) -> usize {
        let arena = self.sets[0].arena.layout.padded_len() * size_of::<f32>() * (2 + self.plan.slots.len());
        self.sets.len() * arena
    }

    fn prepare(&mut self) -> Result<()> {
        self.take(true)?;
        self.looks += 1;
        let word = Philox::new(1, Purpose::Sampling, 1).below(self.looks, self.shapes.len() as u64);
        let tensor = word as usize;
        let before = self.parameters(self.next, tensor)?;
        let expected = self.expected(tensor, &before)?;
        self.looked = Some(Looked { tensor, before, expected, steps: self.sets[self.next].steps + 1 });
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        self.take(true)?;
        let Some(Looked { tensor, before, expected, steps }) = &self.looked else { return Ok(None) };
        let looked = (self.next + self.sets.len() - 1) % self.sets.len();
        let set = &self.sets[looked];
        if set.done != *steps || set.steps != *steps {
            return Ok(Some(format!("{} updates of {} were done, expected {steps}", set.done, set.steps)));
        }
        let outcome = set.last.unwrap_or_default();
        if outcome.skipped || (outcome.grad_norm / self.norm - 1.0).abs() > 1e-3 {
            return Ok(Some(format!("the norm of the gradients is {}, expected {}", outcome.grad_norm, self.norm)));
        }
        let after = self.parameters(looked, *tensor)?;
        let (mut along, mut whole) = (0.0, 0.0);
        for ((after, before), expected) in after.iter().zip(before).zip(expected) {
            let way = expected - before;
            along += (after - before) * way;
            whole += way * way;
        }
        let tolerance = if self.work.alone { TOLERANCE_ALONE } else { TOLERANCE };
        let went = along / whole;
        // Written so that a way which is no number is wrong.
        Ok((went.is_nan() || (went - 1.0).abs() > tolerance)
            .then(|| format!("tensor {tensor} went {:.1} % of the way that its twin in f64 went", 100.0 * went)))
    }
}

/// Numbers of parameters beside the default.
const SIZES: [usize; 5] = [1_000_000, 10_000_000, 124_000_000, 355_000_000, 1_558_000_000];

/// The updates that peers do too, as figures name them but for the precision: the usual ones first.
pub fn of_peers(place: Place) -> Vec<String> {
    let usual = if place == Place::Cpu { USUAL } else { USUAL_ON_GPUS };
    let sizes = || [usual].into_iter().chain(SIZES.into_iter().filter(move |&size| size != usual));
    let named = |rule| sizes().map(move |size| format!("{rule}+global_norm/{}M", size as f64 / 1e6));
    ["momentum", "adamw"].into_iter().flat_map(named).collect()
}

/// The update of a name as [`of_peers`] gives it.
pub fn by_name(name: &str) -> Option<Updating> {
    let (update, size) = name.split_once('/')?;
    let (rule, clip) = update.split_once('+')?;
    let millions: f64 = size.strip_suffix('M')?.parse().ok()?;
    Updating::new(rule, clip, (millions * 1e6) as usize, false)
}

/// The updates of the suite, by the names of their figures.
fn updates<B: Bed>(backend: &B, precision: &str) -> Vec<(String, Updating)> {
    let usual = super::works::update(backend).parameters;
    let mut all = Vec::new();
    let mut add = |rule: &str, clip: &str, parameters: usize, alone: bool| {
        if let Some(work) = Updating::new(rule, clip, parameters, alone) {
            let millions = parameters as f64 / 1e6;
            let told = work.work(precision, 0).update;
            let alone = if alone { "_alone" } else { "" };
            all.push((format!("{told}/{millions}M/{precision}{alone}"), work));
        }
    };
    for (rule, _) in rules() {
        // Muon's products take seconds at the usual size on a CPU.
        let parameters = if rule == "muon" { usual.min(4_000_000) } else { usual };
        for (clip, _) in clips() {
            add(rule, clip, parameters, false);
        }
    }
    for parameters in SIZES.into_iter().filter(|_| backend.kind() != Kind::Emulated) {
        if parameters != usual {
            add("momentum", "global_norm", parameters, false);
            add("adamw", "global_norm", parameters, false);
        }
    }
    if size_of::<B::Storage>() == 2 && precision == "bf16" {
        add("momentum", "global_norm", usual, true);
        add("adamw", "global_norm", usual, true);
    }
    all
}

/// The figures of the suite.
///
/// # Errors
/// What an update reports.
pub fn figures<B: Bed>(
    backend: &B,
    ground: &dyn Ground,
    settings: &Settings,
    speeds: &Speeds,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let precision = speeds.precision.name();
    let mut pass = None;
    for (name, work) in updates(backend, precision) {
        if !wanted(&name) {
            continue;
        }
        // Parameters, gradients, two slots, what is looked at.
        if 20 * work.parameters > backend.free_bytes() {
            let refused = format!("not enough memory: {:.1} GB", 20.0 * work.parameters as f64 / 1e9);
            told(Figure { suite: "update".to_owned(), name, refused: Some(refused), ..Figure::default() })?;
            continue;
        }
        let mut task = UpdateTask::new(backend, &work)?;
        let pass = match &mut pass {
            Some(pass) => pass,
            None => pass.insert(TrafficTask::in_memory(backend, speeds.pass())?),
        };
        let (bytes, flops) = task.cost();
        let passed = pass.bytes();
        let limit = |beside: Option<&Spread>| {
            let beside = beside?;
            let products = flops / speeds.product;
            let seconds = bytes * beside.median / passed + products;
            let also = if flops > 0.0 { format!(", and {:.1} GFLOP of products", flops / 1e9) } else { String::new() };
            let what = format!(
                "{} bytes a parameter at the speed of {} taken in turn with it, {:.1} GB/s{also}",
                bytes / work.parameters as f64,
                words(speeds.pass()),
                passed / beside.median / 1e9
            );
            // The pass beside it has a spread of its own; the product has been measured before.
            let doubt = speeds.product_doubt.clone().filter(|_| flops > 0.0);
            let fastest = speeds.fastest_memory.max(passed / beside.lower_quartile);
            let least = (bytes / fastest).max(flops / speeds.fastest_product);
            Some(Limit { floor: Floor { seconds, what, doubt }, passable: 1.0, least, from_memory: flops == 0.0 })
        };
        let asked = Asked {
            figure: Figure {
                suite: "update".to_owned(),
                name,
                amount: (work.parameters as f64, "parameter".to_owned()),
                bytes: Some(bytes),
                flops: (flops > 0.0).then_some(flops),
                memory_bytes: Some(task.round_bytes() as u64),
                work: Some(work.work(precision, threads(backend))),
                ..Figure::default()
            },
            limit: &limit,
        };
        told(measure(ground, settings, &mut task, Some(pass), asked)?)?;
    }
    Ok(())
}
