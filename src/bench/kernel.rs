//! Each operation alone: a layer's forward, and its backward, beside their floors.
//!
//! What an operation reads comes out of memory: repetitions take sets of memory in turn that together are more than the caches
//! hold, since in a step, too, much lies between two runs of the same operation.

use std::ops::Range;

use super::layers::{Case, cases};
use super::measure::{Asked, Ground, Limit, Settings, Task, measure};
use super::place::Bed;
use super::results::{Figure, Floor};
use super::speeds::{Speeds, words};
use crate::backend::cpu::Cpu;
use crate::backend::{Act, Activations, Arena, Backend, Memory, StepContext};
use crate::error::Result;
use crate::model::{Alone, Input, Value};
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
    /// Gradients of parameters.
    Gradients(Range<usize>),
}

/// A layer with several sets of memory.
pub struct KernelTask<B: Bed> {
    backend: B,
    alone: Alone<B>,
    sets: Vec<(Arena<B>, Activations<B>)>,
    next: usize,
    /// The set that is looked at.
    looked: usize,
    way: Way,
    /// What forward and backward should leave, by the twin; none where that would take too long.
    expected: Option<[Vec<Vec<f64>>; 2]>,
    round_bytes: usize,
}

/// Random values of a layer's input, targets and output gradient, as the device stores them.
struct Given<'a> {
    case: &'a Case,
    stream: Philox,
}

impl Given<'_> {
    fn reals<S: Element>(&self, len: usize, part: u64) -> impl Iterator<Item = S> + '_ {
        let first = part << 40;
        (0..len as u64).map(move |at| S::from_f32(2.0 * self.stream.uniform(first + at) - 1.0))
    }

    /// Fills input, targets and gradient, rounded as `S` has them.
    fn fill<B: Backend, S: Element>(
        &self,
        backend: &B,
        alone: &Alone<B>,
        activations: &mut Activations<B>,
    ) -> Result<()> {
        let mut put = |act: Act, part: u64| {
            let range = activations.range(act);
            let values: Vec<B::Storage> =
                self.reals::<S>(range.len(), part).map(|value| B::Storage::from_f64(value.f64())).collect();
            backend.upload(&mut activations.values, range.start, &values)
        };
        put(alone.dy, 1)?;
        if let Value::Real(act) = alone.program.input {
            put(act, 2)?;
        }
        // Tokens and targets alike; other whole numbers are written before they are read.
        let len = alone.program.indices.peak;
        let below = |at: u64| self.stream.below(at, self.case.below as u64) as i32;
        let indices: Vec<i32> = (0..len as u64).map(below).collect();
        backend.upload(&mut activations.indices, 0, &indices)
    }
}

impl<B: Bed> KernelTask<B> {
    /// Takes the memory, fills it, and runs the layer once in each set.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(backend: &B, case: &Case) -> Result<Self> {
        let mut layer = case.layer::<B>()?;
        let alone = Alone::plan(&mut *layer, &case.input, case.batch, case.mode)?;
        let given = Given { case, stream: Philox::new(1, Purpose::Sampling, 3) };
        let parts = alone.program.activation_parts(1);
        let bytes = parts.total() + alone.parameters.elements() * (size_of::<B::Storage>() + size_of::<f32>());
        let count = (5 * backend.cache_bytes() / 2).div_ceil(bytes.max(1)).clamp(1, MOST_SETS);
        let mut sets = Vec::with_capacity(count);
        for _ in 0..count {
            let (mut arena, mut activations) =
                (alone.parameters.arena(backend, 1, 0)?, alone.program.activations(backend)?);
            given.fill::<B, B::Storage>(backend, &alone, &mut activations)?;
            // What the backward reads of the forward.
            let mut memory = Memory { arena: &mut arena, activations: &mut activations };
            backend.run(&alone.program.ops, &mut memory, &StepContext::default())?;
            sets.push((arena, activations));
        }
        let mut task = KernelTask {
            backend: backend.clone(),
            alone,
            sets,
            next: 0,
            looked: 0,
            way: Way::Forward,
            expected: None,
            round_bytes: count * bytes,
        };
        if task.alone.program.flops() <= TWIN_FLOPS {
            task.expected = Some(task.twin(&given)?);
        }
        Ok(task)
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
            self.backend.run(&self.alone.program.ops, &mut memory, &StepContext::default())?;
        }
        Ok(!self.ops().is_empty())
    }

    /// What the layer leaves in f64, from the same values.
    fn twin(&self, given: &Given<'_>) -> Result<[Vec<Vec<f64>>; 2]> {
        let cpu = Cpu::<f64>::new();
        let mut layer = given.case.layer::<Cpu<f64>>()?;
        let alone = Alone::plan(&mut *layer, &given.case.input, given.case.batch, given.case.mode)?;
        let (mut arena, mut activations) = (alone.parameters.arena(&cpu, 1, 0)?, alone.program.activations(&cpu)?);
        for value in &mut arena.parameters {
            *value = B::Storage::from_f64(B::Real::from_f64(*value).f64()).f64();
        }
        given.fill::<Cpu<f64>, B::Storage>(&cpu, &alone, &mut activations)?;
        let mut memory = Memory { arena: &mut arena, activations: &mut activations };
        cpu.run(&alone.program.ops, &mut memory, &StepContext::default())?;
        let read = |left: Vec<Left>| -> Vec<Vec<f64>> {
            left.into_iter()
                .map(|left| match left {
                    Left::Activation(act) => activations.values[activations.range(act)].to_vec(),
                    Left::Gradients(range) => arena.gradients[range].to_vec(),
                })
                .collect()
        };
        Ok([read(left(&alone, &arena, Way::Forward)), read(left(&alone, &arena, Way::Backward))])
    }

    /// The operations of the present way.
    fn ops(&self) -> Range<usize> {
        let program = &self.alone.program;
        match self.way {
            Way::Forward => 0..program.forward_ops,
            Way::Backward => program.forward_ops..program.ops.len(),
        }
    }
}

/// What a way through a layer leaves.
fn left<B: Backend>(alone: &Alone<B>, arena: &Arena<B>, way: Way) -> Vec<Left> {
    match way {
        Way::Forward => vec![Left::Activation(alone.program.output)],
        Way::Backward => {
            let gradients = arena.layout.entries().iter().map(|entry| Left::Gradients(entry.range()));
            alone.dx.map(Left::Activation).into_iter().chain(gradients).collect()
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
        self.backend.run(&self.alone.program.ops[ops], &mut memory, &StepContext::default())?;
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
        for left in left(&self.alone, arena, self.way) {
            match left {
                Left::Activation(act) => {
                    let range = activations.range(act);
                    let values = vec![B::Storage::from_f32(f32::NAN); range.len()];
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
        for (number, left) in left(&self.alone, arena, self.way).into_iter().enumerate() {
            let found: Vec<f64> = match left {
                Left::Activation(act) => {
                    let range = activations.range(act);
                    let mut values = vec![B::Storage::default(); range.len()];
                    self.backend.download(&activations.values, range.start, &mut values)?;
                    values.into_iter().map(Element::f64).collect()
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
        let costs = task.alone.program.costs(&task.alone.parameters)?;
        for (way, name) in ways {
            // What is asked for may end meanwhile.
            if ground.is_over() || !task.go(way)? {
                continue;
            }
            let costs = &costs[task.ops()];
            let mut bytes: f64 = costs.iter().map(|cost| cost.bytes as f64).sum();
            let flops: f64 = costs.iter().map(|cost| cost.flops as f64).sum();
            if let (Input::Tokens(tokens), Way::Forward) = (&case.input, way) {
                // Of a table, the rows of the batch alone.
                let output: usize = task.alone.program.output_shape.iter().product();
                bytes = (2 * output * size_of::<B::Storage>() + tokens * case.batch * size_of::<i32>()) as f64;
            }
            let limit = |_: Option<&_>| {
                let (of_bytes, of_flops) = (bytes / speeds.memory(), flops / speeds.product);
                let from_memory = of_bytes >= of_flops;
                let (what, doubt) = if from_memory {
                    let pass = words(speeds.pass());
                    let what =
                        format!("its {:.2} MB at the speed of {pass}, {:.1} GB/s", bytes / 1e6, speeds.memory() / 1e9);
                    (what, &speeds.memory_doubt)
                } else {
                    let fewer = if case.fewer > 1.0 {
                        format!("; Winograd's method does with {} times fewer", case.fewer)
                    } else {
                        String::new()
                    };
                    let fastest = speeds.product_text();
                    let what = format!("its {:.3} GFLOP at this run's fastest product, {fastest}{fewer}", flops / 1e9);
                    (what, &speeds.product_doubt)
                };
                let seconds = of_bytes.max(of_flops);
                let of_flops = flops / speeds.fastest_product / case.fewer;
                Some(Limit {
                    floor: Floor { seconds, what, doubt: doubt.clone() },
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
