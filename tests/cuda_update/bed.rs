//! What the tests of the update share: rules, clips, tensors around every edge, and runs of updates on both devices.

use std::time::{SystemTime, UNIX_EPOCH};

use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{Cuda, Storage};
use warpstep::backend::ops::Update;
use warpstep::backend::{Arena, Backend};
use warpstep::optim::{
    Clip, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule, StepOutcome, StepParams, UpdatePlan,
};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};
use warpstep::real::Element;

pub const MOMENTUM: Rule =
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.5, nesterov: false, gamma: 1.0 };
pub const POLYAK: Rule =
    Rule::Momentum { form: MomentumForm::Polyak, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
pub const NESTEROV: Rule =
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: true, gamma: 1.0 };
pub const ADAM: Rule = Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 };
pub const LION: Rule = Rule::Lion { betas: [0.9, 0.99] };
pub const LAMB: Rule = Rule::Lamb { betas: [0.9, 0.999], epsilon: 1e-6 };
pub const LARS: Rule = Rule::Lars { momentum: 0.9, trust: 0.01 };
pub const MUON: Rule = Rule::Muon { momentum: 0.95, nesterov: true, steps: 5, scale: MuonScale::Original };

/// Tensors around every edge: of a block of the arena, of an access, of a piece of the norm.
pub const EDGES: [(&str, &[usize]); 8] = [
    ("none", &[0, 5]),
    ("one", &[1]),
    ("a.weight", &[127]),
    ("b.weight", &[2, 64]),
    ("c.weight", &[3, 43]),
    ("scalar", &[]),
    ("d.weight", &[61, 33]),
    ("piece", &[(1 << 12) + 3]),
];

/// A few tensors, small: for many short runs.
pub const SMALL: [(&str, &[usize]); 4] = [("a", &[3]), ("b.weight", &[2, 66]), ("none", &[0]), ("scalar", &[])];

/// All rules whose bits are the CPU's.
pub const RULES: [Rule; 8] = [Rule::Sgd, MOMENTUM, NESTEROV, POLYAK, ADAM, LION, LARS, LAMB];

pub fn clips() -> [Clip; 6] {
    let value = Some(0.5);
    [
        Clip { value: None, norm: NormClip::Off },
        Clip { value, norm: NormClip::Off },
        Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        Clip { value: None, norm: NormClip::Tensor { max_norm: 0.5 } },
        Clip { value: None, norm: NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 } },
        Clip { value, norm: NormClip::Global { max_norm: 1.0 } },
    ]
}

pub fn options(rule: Rule, clip: Clip) -> OptimizerOptions {
    let mut options = OptimizerOptions::new(rule, 0.01);
    options.clip = clip;
    options.weight_decay = 0.1;
    options
}

/// Parameters or gradients: normal values, zeros in the padding.
pub fn draw(layout: &ParamLayout, seed: u64, stream: u32) -> Vec<f32> {
    let random = Philox::new(seed, Purpose::Initialization, stream);
    let mut values = vec![0.0; layout.padded_len()];
    for entry in layout.entries() {
        entry.range().for_each(|i| values[i] = random.normal(i as u64) as f32);
    }
    values
}

/// What a run of updates leaves.
#[derive(Debug, PartialEq)]
pub struct Left {
    pub parameters: Vec<u32>,
    pub slots: Vec<Vec<u32>>,
    pub gradients: Vec<u32>,
    pub outcomes: Vec<Found>,
    /// Sums of squares of each tensor at the last step.
    pub norm_squares: Vec<u64>,
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// An outcome's norm, least coefficient, count of clamped values, and whether it was skipped.
pub type Found = (u64, u32, u64, bool);

pub fn outcome(outcome: &StepOutcome) -> Found {
    // A skipped step has no norm to compare: not a number, or infinite.
    let norm = if outcome.skipped { 0 } else { outcome.grad_norm.to_bits() };
    (norm, (outcome.clip_coefficient as f32).to_bits(), outcome.clamped, outcome.skipped)
}

/// Bits of finite sums; 0 for the others, which are infinite or no numbers as the sum happened to go.
pub fn sums(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| if value.is_finite() { value.to_bits() } else { 0 }).collect()
}

/// Gradients of each step; in some a value that is not finite.
pub struct Case {
    pub layout: ParamLayout,
    pub plan: UpdatePlan,
    pub parameters: Vec<f32>,
    pub gradients: Vec<Vec<f32>>,
    /// Divisor of each step.
    pub divisors: Vec<f64>,
    pub zero_gradients: bool,
}

impl Case {
    pub fn new(options: &OptimizerOptions, seed: u64, broken: &[usize]) -> Self {
        Self::of(&EDGES, options, seed, broken)
    }

    pub fn of(tensors: &[(&str, &[usize])], options: &OptimizerOptions, seed: u64, broken: &[usize]) -> Self {
        let specs: Vec<_> =
            tensors.iter().map(|&(name, shape)| ParamSpec { name: name.into(), shape: shape.into() }).collect();
        let layout = ParamLayout::new(&specs).unwrap();
        let plan = UpdatePlan::new(options, &layout).unwrap();
        let mut gradients: Vec<_> = (0..4).map(|step| draw(&layout, seed, step + 1)).collect();
        for &step in broken {
            let at = layout.entries().iter().rev().find(|entry| !entry.range().is_empty()).unwrap().range().end - 1;
            gradients[step][at] = if step % 2 == 0 { f32::INFINITY } else { f32::NAN };
        }
        let parameters = draw(&layout, seed, 0);
        let divisors = vec![4.0; gradients.len()];
        Case { layout, plan, parameters, gradients, divisors, zero_gradients: seed.is_multiple_of(2) }
    }

    pub fn step(&self, number: usize, applied: u64) -> StepParams {
        let zero_gradients = self.zero_gradients;
        StepParams { learning_rate: 0.01, step: applied + 1, divisor: self.divisors[number], zero_gradients }
    }

    pub fn on_the_cpu(&self) -> Left {
        let cpu = Cpu::<f32>::new();
        let mut arena = self.arena(&cpu);
        self.run(&cpu, &mut arena)
    }

    /// The same on the device, and the low-precision copy where there is one.
    pub fn on_the_device<S: Storage>(&self, backend: &Cuda<S>) -> (Left, Vec<S>) {
        let mut arena = self.arena(backend);
        let left = self.run(backend, &mut arena);
        let mut copy = vec![S::from_f32(0.0); if S::HAS_MASTER { self.layout.padded_len() } else { 0 }];
        backend.download(&arena.stored, 0, &mut copy).unwrap();
        (left, copy)
    }

    pub fn arena<B: Backend<Real = f32>>(&self, backend: &B) -> Arena<B> {
        let len = self.layout.padded_len();
        let kept = if B::Storage::NAME == "f32" { 0 } else { len };
        let zeros = || backend.allocate::<f32>(len).unwrap();
        let mut arena = Arena {
            layout: self.layout.clone(),
            ranges: self.layout.entries().iter().map(|entry| entry.range()).collect(),
            parameters: zeros(),
            stored: backend.allocate(kept).unwrap(),
            gradients: zeros(),
            slots: self.plan.slots.iter().map(|_| zeros()).collect(),
            state_layout: ParamLayout::new(&[]).unwrap(),
            state: backend.allocate(0).unwrap(),
            prepared: B::Prepared::default(),
            held: None,
        };
        backend.upload(&mut arena.parameters, 0, &self.parameters).unwrap();
        backend.parameters_changed(&mut arena).unwrap();
        arena
    }

    fn run<B: Backend<Real = f32> + Update>(&self, backend: &B, arena: &mut Arena<B>) -> Left {
        self.run_by(backend, arena, |arena, step| backend.update(arena, &self.plan, step).unwrap())
    }

    /// A run whose updates `update` does.
    pub fn run_by<B: Backend<Real = f32> + Update>(
        &self,
        backend: &B,
        arena: &mut Arena<B>,
        mut update: impl FnMut(&mut Arena<B>, &StepParams) -> StepOutcome,
    ) -> Left {
        let (mut outcomes, mut applied) = (Vec::new(), 0);
        for (number, gradient) in self.gradients.iter().enumerate() {
            backend.upload(&mut arena.gradients, 0, gradient).unwrap();
            let found = update(arena, &self.step(number, applied));
            applied += u64::from(!found.skipped);
            outcomes.push(outcome(&found));
        }
        let read = |buffer| {
            let mut values = vec![0.0f32; self.layout.padded_len()];
            backend.download(buffer, 0, &mut values).unwrap();
            bits(&values)
        };
        Left {
            parameters: read(&arena.parameters),
            slots: arena.slots.iter().map(read).collect(),
            gradients: read(&arena.gradients),
            outcomes,
            norm_squares: sums(&backend.norm_squares(arena).unwrap()),
        }
    }
}

pub fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}
