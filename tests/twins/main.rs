//! Every operation of a backend against a plain reference in f64, on odd sizes, with any number of threads.
//!
//! One bed serves every backend: it holds memory, runs an operation, and gives back what it left.

mod activation;
mod attention;
mod batch_norm;
mod conv;
#[path = "../common/device.rs"]
mod device;
mod embedding;
mod layer_norm;
mod linear;
mod loss;
mod on_the_device;
mod pool;

use std::time::{SystemTime, UNIX_EPOCH};

use warpstep::backend::cpu::Cpu;
use warpstep::backend::{Act, Activations, Arena, Backend, Grad, Indices, Memory, Op, Param, State, StepContext};
use warpstep::plan::{MemoryPlan, ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};
use warpstep::real::{Element, Real};

/// A seed of the moment, printed, so that a failure can be seen again.
pub fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

/// Normal values that f32 holds exactly; the same for a seed and a name of the tensor.
pub fn normal(seed: u64, tensor: u32, len: usize) -> Vec<f64> {
    let stream = Philox::new(seed, Purpose::Augmentation, tensor);
    (0..len as u64).map(|i| f64::from(stream.normal(i) as f32)).collect()
}

/// Whole numbers below `bound`.
pub fn whole(seed: u64, tensor: u32, len: usize, bound: u64) -> Vec<i32> {
    let stream = Philox::new(seed, Purpose::Shuffle, tensor);
    (0..len as u64).map(|i| stream.below(i, bound) as i32).collect()
}

/// Values as a reference in `R` takes them.
pub fn cast<R: Element>(values: &[f64]) -> Vec<R> {
    values.iter().map(|&v| R::from_f64(v)).collect()
}

/// Values as they are compared.
pub fn wide<R: Element>(values: &[R]) -> Vec<f64> {
    values.iter().map(|v| v.f64()).collect()
}

/// Memory for one operation on a backend.
pub struct Bed<B: Backend> {
    backend: B,
    values: Vec<B::Storage>,
    ranges: Vec<std::ops::Range<usize>>,
    indices: Vec<i32>,
    index_ranges: Vec<std::ops::Range<usize>>,
    parameters: Vec<Vec<f64>>,
    states: Vec<Vec<f64>>,
    /// The step under which operations run.
    pub step: StepContext,
}

impl<R: Real> Bed<Cpu<R>> {
    /// A bed on the CPU.
    pub fn cpu() -> Self {
        Bed::new(Cpu::new())
    }
}

impl<B: Backend> Bed<B> {
    /// A bed without memory.
    pub fn new(backend: B) -> Self {
        Bed {
            backend,
            values: Vec::new(),
            ranges: Vec::new(),
            indices: Vec::new(),
            index_ranges: Vec::new(),
            parameters: Vec::new(),
            states: Vec::new(),
            step: StepContext { seed: 7, micro_step: 3, part: 0, accumulate: false },
        }
    }

    /// An activation of these values.
    pub fn real(&mut self, values: &[f64]) -> Act {
        let values = cast::<B::Storage>(values);
        self.place(&values)
    }

    /// A statistic of these values, in the backend's arithmetic type ([`warpstep::model::Planner::statistic`]).
    pub fn statistic(&mut self, values: &[f64]) -> Act {
        let bytes: Vec<u8> = bytemuck::cast_slice(&cast::<B::Real>(values)).to_vec();
        self.place(&bytemuck::pod_collect_to_vec(&bytes))
    }

    /// A statistic that holds nothing of meaning.
    pub fn empty_statistic(&mut self, len: usize) -> Act {
        self.statistic(&vec![f64::NAN; len])
    }

    /// As memory is planned: what starts, starts aligned.
    fn place(&mut self, values: &[B::Storage]) -> Act {
        let start = self.values.len().next_multiple_of(MemoryPlan::ALIGNMENT);
        self.values.resize(start, B::Storage::default());
        self.values.extend_from_slice(values);
        self.ranges.push(start..self.values.len());
        Act(self.ranges.len() as u32 - 1)
    }

    /// An activation that holds nothing of meaning, as planned memory does.
    pub fn empty(&mut self, len: usize) -> Act {
        self.real(&vec![f64::NAN; len])
    }

    /// Whole numbers.
    pub fn whole(&mut self, values: &[i32]) -> Indices {
        let start = self.indices.len();
        self.indices.extend_from_slice(values);
        self.index_ranges.push(start..self.indices.len());
        Indices(self.index_ranges.len() as u32 - 1)
    }

    /// A parameter of these values. Its gradient holds 1 at first.
    pub fn parameter(&mut self, values: &[f64]) -> Param {
        self.parameters.push(values.to_vec());
        Param(self.parameters.len() as u32 - 1)
    }

    /// A kept tensor of these values.
    pub fn state(&mut self, values: &[f64]) -> State {
        self.states.push(values.to_vec());
        State(self.states.len() as u32 - 1)
    }

    /// Runs an operation, as a program of its own: the device takes the step's position from what runs programs.
    pub fn run(&self, op: &(impl Op<B> + Clone + 'static)) -> warpstep::Result<Ran<B>> {
        let layout = |tensors: &[Vec<f64>]| {
            let spec = |(i, values): (usize, &Vec<f64>)| ParamSpec { name: format!("t{i}"), shape: vec![values.len()] };
            ParamLayout::new(&tensors.iter().enumerate().map(spec).collect::<Vec<_>>())
        };
        let (layout, state_layout) = (layout(&self.parameters)?, layout(&self.states)?);
        let ranges: Vec<_> = layout.entries().iter().map(|e| e.range()).collect();
        let backend = &self.backend;
        let mut parameters = backend.allocate(layout.padded_len())?;
        let mut gradients = backend.allocate(layout.padded_len())?;
        for (range, values) in ranges.iter().zip(&self.parameters) {
            backend.upload(&mut parameters, range.start, &cast::<B::Real>(values))?;
            backend.upload(&mut gradients, range.start, &vec![B::Real::from_f64(1.0); values.len()])?;
        }
        let mut state = backend.allocate(state_layout.padded_len())?;
        for (entry, values) in state_layout.entries().iter().zip(&self.states) {
            backend.upload(&mut state, entry.range().start, &cast::<B::Real>(values))?;
        }
        let same = std::any::TypeId::of::<B::Real>() == std::any::TypeId::of::<B::Storage>();
        let stored = backend.allocate::<B::Storage>(if same { 0 } else { layout.padded_len() })?;
        let mut arena = Arena {
            layout,
            ranges,
            parameters,
            gradients,
            slots: Vec::new(),
            state_layout,
            state,
            stored,
            prepared: B::Prepared::default(),
            held: None,
        };
        backend.parameters_changed(&mut arena)?;
        let mut values = backend.allocate(self.values.len())?;
        backend.upload(&mut values, 0, &self.values)?;
        let mut indices = backend.allocate(self.indices.len())?;
        backend.upload(&mut indices, 0, &self.indices)?;
        let (ranges, index_ranges) = (self.ranges.clone(), self.index_ranges.clone());
        let recording = B::Recording::default();
        let mut activations = Activations { ranges, index_ranges, values, indices, slots: Vec::new(), recording };
        let mut memory = Memory { arena: &mut arena, activations: &mut activations };
        let program: [Box<dyn Op<B>>; 1] = [Box::new(op.clone())];
        backend.run(&program, &mut memory, &self.step)?;
        let mut values = self.values.clone();
        backend.download(&activations.values, 0, &mut values)?;
        let mut gradients = vec![B::Real::from_f64(0.0); arena.layout.padded_len()];
        backend.download(&arena.gradients, 0, &mut gradients)?;
        let mut indices = self.indices.clone();
        backend.download(&activations.indices, 0, &mut indices)?;
        let mut states = vec![B::Real::from_f64(0.0); arena.state_layout.padded_len()];
        backend.download(&arena.state, 0, &mut states)?;
        Ok(Ran {
            values,
            ranges: activations.ranges,
            indices,
            index_ranges: activations.index_ranges,
            gradients,
            gradient_ranges: arena.ranges,
            states,
            state_ranges: arena.state_layout.entries().iter().map(|e| e.range()).collect(),
        })
    }
}

/// What an operation left.
pub struct Ran<B: Backend> {
    values: Vec<B::Storage>,
    ranges: Vec<std::ops::Range<usize>>,
    indices: Vec<i32>,
    index_ranges: Vec<std::ops::Range<usize>>,
    gradients: Vec<B::Real>,
    gradient_ranges: Vec<std::ops::Range<usize>>,
    states: Vec<B::Real>,
    state_ranges: Vec<std::ops::Range<usize>>,
}

impl<B: Backend> Ran<B> {
    /// An activation.
    pub fn get(&self, act: Act) -> Vec<f64> {
        wide(&self.values[self.ranges[act.0 as usize].clone()])
    }

    /// A statistic.
    pub fn get_statistic(&self, act: Act) -> Vec<f64> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.values[self.ranges[act.0 as usize].clone()]);
        wide(&bytemuck::pod_collect_to_vec::<u8, B::Real>(bytes))
    }

    /// Whole numbers.
    pub fn get_whole(&self, indices: Indices) -> Vec<i32> {
        self.indices[self.index_ranges[indices.0 as usize].clone()].to_vec()
    }

    /// A kept tensor.
    pub fn state(&self, state: State) -> Vec<f64> {
        wide(&self.states[self.state_ranges[state.0 as usize].clone()])
    }

    /// A parameter's gradient.
    pub fn gradient(&self, param: Param) -> Vec<f64> {
        wide(&self.gradients[self.gradient_ranges[param.0 as usize].clone()])
    }
}

/// The first write of a gradient.
pub fn first(param: Param) -> Grad {
    Grad { param, first: true }
}

/// Runs `work` with 1, 2, 3 and 8 threads and asks for the same bits.
pub fn same_bits(what: &str, work: impl Fn() -> Vec<Vec<f64>> + Sync) -> Vec<Vec<f64>> {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&work)
    };
    let alone = with(1);
    for threads in [2, 3, 8] {
        let found = with(threads);
        for (tensor, (a, b)) in alone.iter().zip(&found).enumerate() {
            assert_eq!(a.len(), b.len());
            let differs = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{what}: tensor {tensor} differs with {threads} threads");
        }
    }
    alone
}

/// Compares what f32 gave with the reference in f64: at most twice the error of the reference in f32, and four roundings of
/// the largest value (or of 1, the size of what goes in) besides, since the largest error of a few values is a matter of luck.
pub fn judge(what: &str, found: &[Vec<f64>], plain: &[Vec<f64>], reference: &[Vec<f64>]) {
    assert_eq!(found.len(), reference.len(), "{what}");
    for (tensor, ((found, plain), reference)) in found.iter().zip(plain).zip(reference).enumerate() {
        assert_eq!(found.len(), reference.len(), "{what}: tensor {tensor}");
        let worst = |values: &[f64]| {
            values.iter().zip(reference).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }).fold(0.0, nan_max)
        };
        let size = reference.iter().map(|v| v.abs()).fold(0.0, nan_max);
        let (error, allowed) = (worst(found), 2.0 * worst(plain) + 4.0 * f64::from(f32::EPSILON) * size.max(1.0));
        assert!(
            error <= allowed,
            "{what}: tensor {tensor}: error {error:e}, allowed {allowed:e}, values up to {size:e}"
        );
    }
}

/// The larger; what is no number counts as the largest.
fn nan_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}
