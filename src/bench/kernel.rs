//! Each operation alone: a layer's forward, and its backward, beside their floors.
//!
//! What an operation reads comes out of memory: repetitions take sets of memory in turn that together are more than the caches
//! hold, since in a step, too, much lies between two runs of the same operation.

use std::collections::HashSet;
use std::ops::Range;

use super::layers::{Case, Planned, cases};
use super::measure::{Asked, Ground, Limit, Settings, Task, measure};
use super::place::Bed;
use super::results::{Figure, Floor};
use super::speeds::Speeds;
use crate::backend::cpu::Cpu;
use crate::backend::ops::METRICS;
use crate::backend::step::LossScale;
use crate::backend::{Act, Activations, Arena, Backend, Memory, StepContext};
use crate::error::Result;
use crate::model::{Alone, Value};
use crate::random::{Philox, Purpose};
use crate::real::Element;

/// Operations that a twin in f64 does too; of a larger layer only the shape of the outcome is looked at.
const TWIN_FLOPS: u64 = 40_000_000_000;
/// Sets of memory at most.
const MOST_SETS: usize = 256;

/// Which way through a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Forward.
    Forward,
    /// Backward, of a forward that was run before.
    Backward,
}

/// Memory that a layer leaves something in.
#[derive(Clone, Debug)]
enum Left {
    /// Activations.
    Activation(Act),
    /// A loss's metrics.
    Metrics(Act),
    /// Gradients of parameters.
    Gradients(Range<usize>),
}

/// A layer with several sets of memory.
pub struct KernelTask<B: Bed> {
    backend: B,
    planned: Planned<B>,
    given: Given,
    sets: Vec<(Arena<B>, Activations<B>)>,
    next: usize,
    /// The set that is looked at.
    looked: usize,
    way: Way,
    /// What forward and backward should leave, by the twin; none where that would take too long.
    expected: Option<[Vec<Vec<f64>>; 2]>,
    round_bytes: usize,
}

/// Random values of what a layer is given, as the device stores them.
struct Given {
    stream: Philox,
    /// What whole numbers are below.
    below: u64,
}

impl Given {
    /// What an activation is given, rounded as `S` has it; none where the layer makes it.
    fn values<B: Backend, S: Element>(&self, planned: &Planned<B>, act: Act, len: usize) -> Option<Vec<B::Storage>> {
        let given = planned.given();
        let number = given.iter().position(|&(other, _)| other == act)?;
        let (first, least) = ((number as u64 + 1) << 40, given[number].1);
        let value = |at: u64| S::from_f32(least + (1.0 - least) * self.stream.uniform(first + at));
        Some((0..len as u64).map(|at| B::Storage::from_f64(value(at).f64())).collect())
    }

    fn index(&self, at: usize) -> i32 {
        self.stream.below(at as u64, self.below) as i32
    }

    /// Fills what the layer is given.
    fn fill<B: Backend, S: Element>(
        &self,
        backend: &B,
        planned: &Planned<B>,
        activations: &mut Activations<B>,
    ) -> Result<()> {
        for (act, _) in planned.given() {
            let range = activations.range(act);
            if let Some(values) = self.values::<B, S>(planned, act, range.len()) {
                backend.upload(&mut activations.values, range.start, &values)?;
            }
        }
        // Tokens and targets alike; other whole numbers are written before they are read.
        let indices: Vec<i32> = (0..planned.alone.program.indices.peak).map(|at| self.index(at)).collect();
        backend.upload(&mut activations.indices, 0, &indices)
    }
}

impl<B: Bed> KernelTask<B> {
    /// Takes the memory, fills it, and runs the layer once in each set.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(backend: &B, case: &Case) -> Result<Self> {
        let planned = case.plan::<B>()?;
        let given = Given { stream: Philox::new(1, Purpose::Sampling, 3), below: case.below as u64 };
        let Alone { program, parameters, .. } = &planned.alone;
        let activations = program.activation_parts(1).total();
        let bytes = activations + parameters.elements() * (size_of::<B::Storage>() + size_of::<f32>());
        // Of a table, the rows of a batch alone are touched, which are no more than what they are copied to and its gradient.
        let touched = if matches!(program.input, Value::Tokens(_)) { activations } else { bytes };
        let room = (backend.free_bytes() / 2 / bytes.max(1)).max(1);
        let count = (5 * backend.cache_bytes() / 2).div_ceil(touched.max(1)).clamp(1, MOST_SETS).min(room);
        let mut sets = Vec::with_capacity(count);
        for _ in 0..count {
            let (mut arena, mut activations) = (parameters.arena(backend, 1, 0)?, program.activations(backend)?);
            // As training scales losses where gradients need it, else small ones would be rounded away.
            backend.set_loss_scale(&mut arena, LossScale::INITIAL)?;
            given.fill::<B, B::Storage>(backend, &planned, &mut activations)?;
            // What the backward reads of the forward.
            let mut memory = Memory { arena: &mut arena, activations: &mut activations };
            backend.run(&program.ops, &mut memory, &StepContext::default())?;
            sets.push((arena, activations));
        }
        let expected = if program.flops() <= TWIN_FLOPS { Some(twin::<B>(case, &given)?) } else { None };
        Ok(KernelTask {
            backend: backend.clone(),
            planned,
            given,
            sets,
            next: 0,
            looked: 0,
            way: Way::Forward,
            expected,
            round_bytes: count * touched,
        })
    }

    /// From now on repetitions go this way: false where the layer has no operations that way.
    ///
    /// # Errors
    /// A device that failed.
    pub fn go(&mut self, way: Way) -> Result<bool> {
        self.way = way;
        // What was looked at may have been left wrong, and a backward reads what the forward left.
        for (arena, activations) in &mut self.sets {
            let mut memory = Memory { arena, activations };
            self.backend.run(&self.planned.alone.program.ops, &mut memory, &StepContext::default())?;
        }
        Ok(!self.ops().is_empty())
    }

    /// The operations of the present way.
    fn ops(&self) -> Range<usize> {
        let program = &self.planned.alone.program;
        match self.way {
            Way::Forward => 0..program.forward_ops,
            Way::Backward => program.forward_ops..program.ops.len(),
        }
    }

    /// Bytes read, bytes written and floating-point operations of the present way: what it leaves is written, all else it moves is read.
    fn costs(&self) -> Result<([f64; 2], f64)> {
        let Alone { program, parameters, .. } = &self.planned.alone;
        let costs = &program.costs(parameters)?[self.ops()];
        let mut bytes: u64 = costs.iter().map(|cost| cost.bytes).sum();
        if let (Value::Tokens(tokens), Way::Forward) = (program.input, self.way) {
            // Of a table, rows of tokens that are all different were counted.
            let range = self.sets[0].1.index_range(tokens);
            let most = range.len().min(self.given.below as usize);
            let named: HashSet<i32> = range.map(|at| self.given.index(at)).collect();
            let width = program.output_shape.last().copied().unwrap_or(1);
            bytes -= ((most - named.len()) * width * size_of::<B::Storage>()) as u64;
        }
        let (arena, activations) = &self.sets[0];
        let written = left(&self.planned, arena, self.way).into_iter().map(|left| match left {
            Left::Activation(act) | Left::Metrics(act) => activations.range(act).len() * size_of::<B::Storage>(),
            Left::Gradients(range) => range.len() * size_of::<B::Real>(),
        });
        // Of a table's gradient a part alone may be touched.
        let written = (written.sum::<usize>() as u64).min(bytes);
        let flops = costs.iter().map(|cost| cost.flops as f64).sum();
        Ok(([(bytes - written) as f64, written as f64], flops))
    }

    /// By what the values that were left are multiplied before they are compared: as the twin's, and a loss's gradient may be scaled.
    fn factor(&self, left: &Left) -> Result<f64> {
        let Some(terms) = terms(&self.planned, left) else { return Ok(1.0) };
        Ok(terms / self.backend.loss_scale(&self.sets[0].0)?.map_or(1.0, |scale| f64::from(scale.scale)))
    }
}

/// Of a loss's gradient, the terms of the mean that it is the gradient of: without them it would be compared with what may be
/// rounding.
fn terms<B: Backend>(planned: &Planned<B>, left: &Left) -> Option<f64> {
    let gradient = matches!(left, &Left::Activation(act) if act == planned.alone.program.output);
    planned.more.terms.filter(|_| gradient).map(|terms| terms as f64)
}

/// What the layer leaves in f64, from the same values.
fn twin<B: Bed>(case: &Case, given: &Given) -> Result<[Vec<Vec<f64>>; 2]> {
    let cpu = Cpu::<f64>::new();
    let planned = case.plan::<Cpu<f64>>()?;
    let Alone { program, parameters, .. } = &planned.alone;
    let (mut arena, mut activations) = (parameters.arena(&cpu, 1, 0)?, program.activations(&cpu)?);
    for value in &mut arena.parameters {
        *value = B::Storage::from_f64(B::Real::from_f64(*value).f64()).f64();
    }
    given.fill::<Cpu<f64>, B::Storage>(&cpu, &planned, &mut activations)?;
    let mut memory = Memory { arena: &mut arena, activations: &mut activations };
    cpu.run(&program.ops, &mut memory, &StepContext::default())?;
    let read = |way: Way| -> Vec<Vec<f64>> {
        let values = left(&planned, &arena, way).into_iter().map(|left| {
            let factor = terms(&planned, &left).unwrap_or(1.0);
            let values = match left {
                Left::Activation(act) | Left::Metrics(act) => &activations.values[activations.range(act)],
                Left::Gradients(range) => &arena.gradients[range],
            };
            values.iter().map(|value| value * factor).collect()
        });
        values.collect()
    };
    Ok([read(Way::Forward), read(Way::Backward)])
}

/// What a way through a layer leaves.
fn left<B: Backend>(planned: &Planned<B>, arena: &Arena<B>, way: Way) -> Vec<Left> {
    let Planned { alone, more } = planned;
    let [forward, backward] = more.left.each_ref().map(|left| left.iter().copied().map(Left::Activation));
    match way {
        Way::Forward => {
            let output = std::iter::once(Left::Activation(alone.program.output));
            output.chain(forward).chain(more.metrics.map(Left::Metrics)).collect()
        }
        Way::Backward => {
            let gradients = arena.layout.entries().iter().map(|entry| Left::Gradients(entry.range()));
            alone.dx.map(Left::Activation).into_iter().chain(backward).chain(gradients).collect()
        }
    }
}

/// How far what is left may be from the twin's, as a share of its norm.
fn tolerance<B: Bed>(backend: &B) -> f64 {
    match B::Storage::NAME {
        "f32" if backend.product_bits() >= 23 => 1e-4,
        "f32" => 1e-2,
        "f16" => 2e-2,
        _ => 5e-2,
    }
}

impl<B: Bed> Task for KernelTask<B> {
    fn run(&mut self) -> Result<()> {
        let ops = self.ops();
        let (arena, activations) = &mut self.sets[self.next];
        let mut memory = Memory { arena, activations };
        self.backend.run(&self.planned.alone.program.ops[ops], &mut memory, &StepContext::default())?;
        self.next = (self.next + 1) % self.sets.len();
        Ok(())
    }

    fn sets(&self) -> usize {
        self.sets.len()
    }

    fn round_bytes(&self) -> usize {
        self.round_bytes
    }

    fn prepare(&mut self) -> Result<()> {
        self.looked = self.next;
        let (arena, activations) = &mut self.sets[self.next];
        for left in left(&self.planned, arena, self.way) {
            match left {
                Left::Activation(act) | Left::Metrics(act) => {
                    let range = activations.range(act);
                    // What is changed where it is starts from what was given: as wrong, until it is changed once.
                    let given = self.given.values::<B, B::Storage>(&self.planned, act, range.len());
                    let values = given.unwrap_or_else(|| vec![B::Storage::from_f32(f32::NAN); range.len()]);
                    self.backend.upload(&mut activations.values, range.start, &values)?;
                }
                Left::Gradients(range) => {
                    let values = vec![B::Real::from_f32(f32::NAN); range.len()];
                    self.backend.upload(&mut arena.gradients, range.start, &values)?;
                }
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        let (arena, activations) = &self.sets[self.looked];
        for (number, left) in left(&self.planned, arena, self.way).into_iter().enumerate() {
            let factor = self.factor(&left)?;
            let found: Vec<f64> = match left {
                Left::Activation(act) => {
                    let range = activations.range(act);
                    let mut values = vec![B::Storage::default(); range.len()];
                    self.backend.download(&activations.values, range.start, &mut values)?;
                    values.into_iter().map(|value| value.f64() * factor).collect()
                }
                Left::Metrics(act) => {
                    let mut values = [B::Real::default(); METRICS];
                    self.backend.read_statistic(activations, act, &mut values)?;
                    values.map(Element::f64).to_vec()
                }
                Left::Gradients(range) => {
                    let mut values = vec![B::Real::default(); range.len()];
                    self.backend.download(&arena.gradients, range.start, &mut values)?;
                    values.into_iter().map(Element::f64).collect()
                }
            };
            let off = match &self.expected {
                Some(expected) => {
                    let expected = &expected[usize::from(self.way == Way::Backward)][number];
                    let (mut off, mut norm) = (0.0, 0.0);
                    for (found, expected) in found.iter().zip(expected) {
                        off += (found - expected).powi(2);
                        norm += expected.powi(2);
                    }
                    // What should be nothing may be rounding.
                    (off / norm.max(1e-12 * expected.len() as f64)).sqrt()
                }
                None if found.iter().all(|&value| value == 0.0) => 1.0,
                // No number, where any of them is none.
                None => found.iter().sum::<f64>() * 0.0,
            };
            // Written so that a value which is no number is wrong.
            if off.is_nan() || off > tolerance(&self.backend) {
                let what = if self.way == Way::Forward { "output" } else { "gradient" };
                return Ok(Some(format!("{what} {number} is off by {off:.1e} of its norm in f64")));
            }
        }
        Ok(None)
    }
}

/// The figures of the suite.
///
/// # Errors
/// What an operation reports.
pub fn figures<B: Bed>(
    backend: &B,
    ground: &dyn Ground,
    settings: &Settings,
    speeds: &Speeds,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let precision = speeds.precision.name();
    for case in cases(backend.kind()) {
        let ways = [(Way::Forward, "forward"), (Way::Backward, "backward")];
        let ways = ways.into_iter().filter(|(way, _)| *way == Way::Forward || case.has_backward());
        // Each is asked for once, since who asks may count.
        let ways: Vec<(Way, String)> = ways
            .map(|(way, word)| (way, format!("{}/{word}/{precision}", case.name)))
            .filter(|(_, name)| wanted(name))
            .collect();
        if ways.is_empty() {
            continue;
        }
        let mut task = KernelTask::new(backend, &case)?;
        for (way, name) in ways {
            // What is asked for may end meanwhile.
            if ground.is_over() || !task.go(way)? {
                continue;
            }
            let (moved, flops) = task.costs()?;
            let bytes: f64 = moved.iter().sum();
            let limit = |_: Option<&_>| {
                let (of_bytes, of_flops) = (speeds.least_of(moved), flops / speeds.product);
                let from_memory = of_bytes.seconds >= of_flops;
                let floor = if from_memory {
                    of_bytes
                } else {
                    let fewer = if case.fewer > 1.0 {
                        format!("; Winograd's method does with {} times fewer", case.fewer)
                    } else {
                        String::new()
                    };
                    let fastest = speeds.product_text();
                    let what = format!("its {:.3} GFLOP at this run's fastest product, {fastest}{fewer}", flops / 1e9);
                    Floor { seconds: of_flops, what, doubt: speeds.product_doubt.clone() }
                };
                let of_flops = flops / speeds.fastest_product / case.fewer;
                Some(Limit {
                    floor,
                    passable: if from_memory { 1.0 } else { case.fewer },
                    least: (bytes / speeds.fastest_memory).max(of_flops),
                    from_memory,
                })
            };
            let asked = Asked {
                figure: Figure {
                    suite: "kernel".to_owned(),
                    name,
                    amount: (1.0, "call".to_owned()),
                    bytes: Some(bytes),
                    flops: Some(flops),
                    ..Figure::default()
                },
                limit: &limit,
            };
            told(measure(ground, settings, &mut task, None, asked)?)?;
        }
    }
    Ok(())
}
